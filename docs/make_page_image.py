"""Take docs/images/page.png, a picture of the page of a running server."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.browser import Browser, find_browser

IMAGE = Path(__file__).parent / "images" / "page.png"
ANSWERED = (
    "document.querySelector('#results').ariaBusy === 'false'"
    " && document.querySelector('#results h2')"
)


def picture(url: str, scheme: str = "light") -> bytes:
    """The page with answers to its last example, as PNG."""
    binary = find_browser()
    if binary is None:
        raise SystemExit(
            "no Chromium is installed (Debian: apt-get install chromium-headless-shell)"
        )
    with tempfile.TemporaryDirectory() as profile, Browser(binary, Path(profile)) as browser:
        browser.open(url, prefers_color_scheme=scheme)
        for _ in range(2):  # the first answer of a fresh server is its slowest
            browser.js("document.querySelector('#results').replaceChildren()")
            browser.click("#examples button:last-of-type")
            browser.wait(ANSWERED)
        return browser.screenshot()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--output", type=Path, default=IMAGE)
    arguments = parser.parse_args()
    arguments.output.write_bytes(picture(arguments.url, arguments.scheme))


if __name__ == "__main__":
    main()
