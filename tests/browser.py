"""A page in a real headless Chromium."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium")
NO_CHROMIUM = "no chromium here (apt-get install chromium): THE PAGE WAS NOT OPENED IN A BROWSER"
# Without the network settings Chromium looks for its maker's hosts.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=8000"
)


def run(url: str, *arguments: str, size: tuple[int, int] = (1280, 1000)) -> str:
    """Open a page, let it draw, and return what Chromium prints."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM,
            *FLAGS.split(),
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        ]
        done = subprocess.run(
            [*command, *arguments, url], capture_output=True, text=True, timeout=60, check=True
        )
    return done.stdout


def document(url: str, size: tuple[int, int] = (1280, 1000)) -> str:
    """The page's document once it has drawn."""
    return run(url, "--dump-dom", size=size)


def screenshot(url: str, path: Path, size: tuple[int, int] = (1280, 1000)) -> None:
    """Write a picture of the page."""
    run(url, f"--screenshot={path}", size=size)


def cards(text: str) -> dict[str, str]:
    """State of every panel by its title: drawn, empty or unrecorded."""
    pattern = r'<section class="card" id="panel-\d+" data-state="(\w+)"><h3>([^<]+)</h3>'
    return {title: state for state, title in re.findall(pattern, text)}
