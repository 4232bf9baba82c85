"""Build the project's virtual environment: `make setup`, or `python3.11 tools/setup_env.py [--venv DIR]`.

Uses the standard library alone, and this file keeps to syntax that any Python 3 reads, so that the wrong
Python is told so in words instead of by a syntax error.
"""

import os
import sys

EXPECTED = (3, 11)

WRONG_PYTHON = """\
make setup: expected Python {expected}, found Python {found} ({executable}).
The compiled wheel of LightZero 0.2.0 and the pins in requirements/ are for Python {expected}.
{candidates}Install it by one of
    apt-get install python{expected} python{expected}-venv     (Debian, Ubuntu)
    brew install python@{expected}                       (macOS)
    pyenv install {expected}                             (any system)
and write
    make setup PYTHON=/path/to/python{expected}
"""


def other_pythons(name):
    """Paths of interpreters called `name` on PATH and under pyenv, this one left out."""
    folders = os.environ.get('PATH', '').split(os.pathsep)
    versions = os.path.join(os.environ.get('PYENV_ROOT', os.path.expanduser('~/.pyenv')), 'versions')
    if os.path.isdir(versions):
        folders += [os.path.join(versions, version, 'bin') for version in sorted(os.listdir(versions))]
    found = []
    for folder in folders:
        path = os.path.join(folder, name)
        is_shim = os.path.basename(folder) == 'shims'
        if os.access(path, os.X_OK) and path != sys.executable and path not in found and not is_shim:
            found.append(path)
    return found


def refuse_wrong_python():
    """Exit with status 1 and a text that says how to get the expected Python, unless this one is it."""
    if sys.version_info[:2] == EXPECTED:
        return
    expected = '.'.join(str(part) for part in EXPECTED)
    candidates = other_pythons('python' + expected)
    sys.exit(
        WRONG_PYTHON.format(
            expected=expected,
            found='.'.join(str(part) for part in sys.version_info[:3]),
            executable=sys.executable,
            candidates=''.join('Seen on this machine: ' + path + '\n' for path in candidates),
        )
    )


if __name__ == '__main__':
    refuse_wrong_python()
    from environment.build import main

    sys.exit(main())
