"""What is installed in a site-packages folder, read from its file names: no import, no subprocess."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path


def normalised(name: str) -> str:
    """A package name in the form in which two spellings of it are equal."""
    return re.sub(r'[-_.]+', '-', name).lower()


def read_pins(path: Path) -> list[str]:
    """The `name==version` lines of a requirements file, comments left out."""
    lines = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def installed_versions(site_packages: Path) -> dict[str, str]:
    """Version of each installed package by normalised name; a local part such as `+cpu` is left out."""
    versions = {}
    for folder in site_packages.glob('*.dist-info'):
        name, _, version = folder.name.removesuffix('.dist-info').partition('-')
        versions[normalised(name)] = version.partition('+')[0]
    return versions


def is_installed(site_packages: Path, pins: list[str]) -> bool:
    """True when every pin is installed in exactly its version."""
    versions = installed_versions(site_packages)
    for pin in pins:
        name, _, version = pin.partition('==')
        if versions.get(normalised(name)) != version:
            return False
    return True


def is_complete(dist_info: Path) -> bool:
    """True when every file that the package recorded is there in its recorded size.

    pip writes the record last, so a package without one was broken off. Compiled files (.pyc) may be missing.
    """
    record = dist_info / 'RECORD'
    if not record.is_file():
        return False
    with record.open(newline='', encoding='utf-8') as file:
        for path, _, size in csv.reader(file):
            if path.endswith('.pyc'):
                continue
            recorded = dist_info.parent / path
            if not recorded.is_file() or (size and recorded.stat().st_size != int(size)):
                return False
    return True


def remove_incomplete(site_packages: Path) -> list[str]:
    """Remove the metadata of packages that are there in part, and return the names of the removed folders.

    pip takes a package whose metadata is there for installed, whether its files are or not. The folders that
    pip moves aside while it replaces a package (`~name`) go too.
    """
    removed = [folder for folder in site_packages.glob('*.dist-info') if not is_complete(folder)]
    for folder in [*removed, *site_packages.glob('~*')]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    return [folder.name for folder in removed]
