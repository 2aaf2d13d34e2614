"""Opens the pages that `make docs` built in a headless Chromium: console, requests, width of a phone, search.

python .ci/browser.py [--chromium PATH] [--pictures DIR]

Needs playwright, and the browser that `playwright install chromium` fetches, or one given by its path.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pages import BUILT, SOUGHT
from playwright.sync_api import Browser, sync_playwright

SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

COVERED = """[...document.querySelectorAll("div.math > .eqno")].filter(number => number.getBoundingClientRect().left <
    number.parentElement.querySelector("math").getBoundingClientRect().right - 1).length"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The folder on a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def faults_of(browser: Browser, address: str, names: list[str], size: str, pictures: Path | None) -> Iterator[str]:
    """What is wrong with pages at one size of window, a line each."""
    page = browser.new_page(viewport=SIZES[size])
    said: list[str] = []
    page.on(
        "console", lambda message: said.append(f"console: {message.text}") if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: said.append(f"script: {error}"))
    page.on("requestfailed", lambda request: said.append(f"request failed: {request.url}"))
    page.on("request", lambda request: said.append(f"other host: {request.url}") if not local(request.url, address) else None)
    page.on("response", lambda answer: said.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    for name in names:
        page.goto(f"{address}/{name}", wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > SIZES[size]["width"]:
            said.append(f"{width} pixels wide")
        if covered := page.evaluate(COVERED):
            said.append(f"{covered} numbers of equations lie on their formulas")
        if pictures is not None:
            page.screenshot(path=pictures / f"{size}-{name.replace('/', '-')}.png")
        yield from (f"{size} {name}: {what}" for what in said)
        said.clear()
    page.close()


def local(url: str, address: str) -> bool:
    """Whether a request stays on this machine."""
    return url.startswith((address, "data:", "blob:"))


def unfound(browser: Browser, address: str) -> Iterator[str]:
    """What the search does not find among its first ten results."""
    page = browser.new_page()
    for words, sought in SOUGHT.items():
        page.goto(f"{address}/search.html?q={words.replace(' ', '+')}")
        page.wait_for_selector("#search-results .search-summary:has-text('found')", timeout=20000)
        links = [link.get_attribute("href") or "" for link in page.query_selector_all("#search-results li > a")]
        if not any(link.partition("#")[0].partition("?")[0].endswith(f"{sought}.html") for link in links[:10]):
            yield f"search for {words!r} does not show {sought} among {links[:10]}"
    page.close()


def main() -> int:
    """1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", help="path of a browser; default: playwright's own")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page and size")
    options = parser.parse_args()
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    names = sorted(
        str(path.relative_to(BUILT)) for path in BUILT.rglob("*.html") if path.relative_to(BUILT).parts[0] != "_static"
    )
    if not names:
        sys.exit(f"browser: no page in {BUILT}: run make docs")
    with served(BUILT) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium)
        faults = [fault for size in SIZES for fault in faults_of(browser, address, names, size, options.pictures)]
        faults += unfound(browser, address)
        version = browser.version
        browser.close()
    print(*faults, sep="\n")
    print(f"Chromium {version}: {len(names)} pages at {len(SIZES)} sizes, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
