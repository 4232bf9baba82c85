"""Takes a picture of TensorBoard's Custom Scalars page of a log, as docs/images/dashboard.png shows it.

    python tools/screenshot_dashboard.py LOGDIR --out docs/images/dashboard.png

It starts TensorBoard on a free local port and drives a real headless Chromium. Neither is a dependency of the
library; to have them:

    apt-get install -y chromium chromium-driver
    pip install tensorboard selenium pillow
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
FLAGS = (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--hide-scrollbars',
)
START_SECONDS = 60.0
DRAW_SECONDS = 180.0
MAX_BYTES = 150_000
COLOURS = 128

# The page is built of web components: only a walk through all shadow roots sees its charts.
FIND_ALL = """
const found = [];
const walk = (root) => {
  for (const element of root.querySelectorAll('*')) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
return found;
"""


def main() -> int:
    """Run the command line; 0, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('logdir', type=Path, help='a log folder as TensorBoard takes it')
    parser.add_argument(
        '--out', type=Path, default=Path('docs/images/dashboard.png'), help='the PNG file to write'
    )
    parser.add_argument('--width', type=int, default=1450, help='pixels')
    parser.add_argument('--height', type=int, default=1130, help='pixels')
    arguments = parser.parse_args()
    try:
        screenshot(arguments.logdir, arguments.out, arguments.width, arguments.height)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f'screenshot_dashboard: {error}\n')
        return 1
    sys.stdout.write(f'{arguments.out}\n')
    return 0


def screenshot(logdir: Path, out: Path, width: int, height: int) -> None:
    """Write the picture of the page.

    Raises:
        ValueError: the log folder does not exist, or the file to write has no folder.
        RuntimeError: a browser, its driver, selenium or TensorBoard is missing, the page draws no chart in
            time, or the picture is too large for a repository.
    """
    if not logdir.is_dir():
        raise ValueError(f'{logdir} is not a folder; give the log folder of a training')
    if not out.parent.is_dir():
        raise ValueError(f'the folder {out.parent} does not exist; create it or choose another with --out')
    with _browser(width, height) as driver, _tensorboard(logdir) as address:
        driver.get(f'{address}/#custom_scalars&_smoothingWeight=0')
        driver.execute_script("localStorage.setItem('_ignoreYOutliers', 'false')")
        driver.refresh()
        _wait_for_charts(driver)
        driver.save_screenshot(str(out))
    Image.open(out).convert('RGB').quantize(COLOURS).save(out, optimize=True)
    size = out.stat().st_size
    if size > MAX_BYTES:
        raise RuntimeError(
            f'{out} has {size} bytes, at most {MAX_BYTES} were expected; choose a smaller --width or --height'
        )


@contextlib.contextmanager
def _tensorboard(logdir: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    address = f'http://127.0.0.1:{port}'
    # The page shows the folder as it was given: a relative one keeps a machine's paths out of the picture.
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir', logdir.resolve().name]
    command += ['--host', '127.0.0.1', '--port', str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=logdir.resolve().parent)
        try:
            _wait_for_server(server, address, log)
            yield address
        finally:
            server.terminate()
            server.wait()


def _wait_for_server(server: subprocess.Popen[bytes], address: str, log: Any) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            log.seek(0)
            last = log.read().decode(errors='replace').strip().splitlines()[-1:]
            raise RuntimeError(
                f'TensorBoard ended at its start: {" ".join(last)}; pip install tensorboard "setuptools<82"'
            )
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.3)
    raise RuntimeError(f'TensorBoard did not answer at {address} within {START_SECONDS:.0f} seconds')


@contextlib.contextmanager
def _browser(width: int, height: int) -> Iterator[Any]:
    binary = next((path for path in map(shutil.which, BROWSERS) if path), None)
    driver_binary = shutil.which('chromedriver')
    if binary is None or driver_binary is None:
        missing = 'no browser' if binary is None else 'no chromedriver'
        raise RuntimeError(
            f'{missing} found ({", ".join(BROWSERS)}); apt-get install -y chromium chromium-driver'
        )
    try:
        from selenium import webdriver  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError('selenium is not installed; pip install selenium') from error
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f'--user-data-dir={profile}', f'--window-size={width},{height}'):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_binary))
        try:
            driver.set_window_size(width, height)
            driver.set_script_timeout(DRAW_SECONDS)
            yield driver
        finally:
            driver.quit()


def _wait_for_charts(driver: Any) -> None:
    """Wait until every chart of the first category is drawn, then open the lists that name the lines."""
    end = time.monotonic() + DRAW_SECONDS
    while time.monotonic() < end:
        charts = driver.execute_script(FIND_ALL, 'tf-custom-scalar-multi-line-chart-card')
        lists = driver.execute_script(FIND_ALL, '#matches-container')
        if charts and len(lists) >= len(charts):
            break
        time.sleep(0.5)
    else:
        raise RuntimeError(
            f'the page drew no chart within {DRAW_SECONDS:.0f} seconds; does the log hold charts of the '
            'KV cache? Look with: lzero-kv report LOGDIR'
        )
    for button in driver.execute_script(FIND_ALL, '.toggle-matches-button'):
        driver.execute_script('arguments[0].click();', button)
    time.sleep(3)


if __name__ == '__main__':
    sys.exit(main())
