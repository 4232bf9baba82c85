"""Which releases of LightZero the adapter knows."""

from __future__ import annotations

from importlib import metadata

SUPPORTED = frozenset({'0.2.0'})


def installed_version() -> str | None:
    """The version of the installed LightZero, None where there is none."""
    try:
        return metadata.version('LightZero')
    except metadata.PackageNotFoundError:
        return None


def check_supported() -> str:
    """The installed version, if the adapter knows it.

    Raises:
        RuntimeError: LightZero is missing, or is a version whose seams were not verified.
    """
    version = installed_version()
    known = ', '.join(sorted(SUPPORTED))
    if version is None:
        raise RuntimeError(
            f'expected LightZero {known}, found none; install it with: pip install "lzero-kv[lightzero]"'
        )
    if version not in SUPPORTED:
        raise RuntimeError(
            f'expected LightZero {known}, found LightZero {version}, whose caches lzero_kv does not know; '
            f'install a known version, or leave lzero_kv.plugin out of import_names'
        )
    return version
