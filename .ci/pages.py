"""Reads every page that `make docs` built: links, anchors, assets, what a phone needs, and the search's index.

Nothing may come from another host, every link inside must lead somewhere, and what strangers look for must be found.
`.ci/browser.py` opens the pages in a browser.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

BUILT = Path(__file__).resolve().parents[1] / "docs" / "_build"
SOUGHT = {"which alpha": "which-alpha", "install": "install", "container": "containers"}
LOADED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data"}
PHONE = 360  # CSS pixels


class Site:
    """The pages in a folder, each parsed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages = {
            path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in sorted(root.rglob("*.html"))
        }
        self.anchors = {
            path: {str(tag[name]) for name in ("id", "name") for tag in page.find_all(attrs={name: True})}
            for path, page in self.pages.items()
        }

    def faults(self) -> Iterator[str]:
        """What is wrong, a line each."""
        if not self.pages:
            yield f"no page in {self.root}"
        for path, page in self.pages.items():
            where = path.relative_to(self.root)
            if not where.parts[0].startswith("_"):  # those are Sphinx's own, of sources
                viewport = page.find("meta", attrs={"name": "viewport"})
                if not isinstance(viewport, Tag) or "width=device-width" not in str(viewport.get("content")):
                    yield f"{where}: no viewport for phones"
            yield from (f"{where}: {fault}" for fault in self._of_assets(path, page))
            yield from (f"{where}: {fault}" for fault in self._of_links(path, page))
            for tag in page.find_all(style=True):
                wide = re.search(r"(?<![-\w])width:\s*(\d+)px", str(tag["style"]))
                if wide and int(wide[1]) > PHONE:
                    yield f"{where}: <{tag.name}> is {wide[1]} pixels wide, more than a phone's {PHONE}"

    def _of_assets(self, path: Path, page: BeautifulSoup) -> Iterator[str]:
        for tag in page.find_all(list(LOADED)):
            address = str(tag.get(LOADED[tag.name]) or "")
            if not address or address.startswith("data:") or (tag.name == "link" and "canonical" in (tag.get("rel") or ())):
                continue
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                yield f"needs {address} of another host"
            elif not self._target(path, parts.path).is_file():
                yield f"lacks {address}"

    def _of_links(self, path: Path, page: BeautifulSoup) -> Iterator[str]:
        for tag in page.find_all("a", href=True):
            parts = urlsplit(str(tag["href"]))
            if parts.scheme or parts.netloc:
                continue
            target = self._target(path, parts.path)
            if not target.is_file():
                yield f"links to {tag['href']}, which is not there"
            elif parts.fragment and target in self.anchors and unquote(parts.fragment) not in self.anchors[target]:
                yield f"links to {tag['href']}, whose anchor is not there"

    def _target(self, path: Path, address: str) -> Path:
        target = (path.parent / unquote(address)).resolve() if address else path
        return target / "index.html" if target.is_dir() else target


def found(root: Path, words: str) -> set[str]:
    """The pages that the search's index has for all of some words, as Sphinx's script looks them up."""
    text = (root / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    pages: set[str] | None = None
    for word in words.lower().split():
        of_word: set[str] = set()
        for term, places in [*index["terms"].items(), *index["titleterms"].items()]:
            if term.startswith(word) or (word.startswith(term) and len(term) > 3):  # the index holds stems
                of_word |= {index["docnames"][place] for place in ([places] if isinstance(places, int) else places)}
        pages = of_word if pages is None else pages & of_word
    titles = {index["docnames"][i] for title, at in index["alltitles"].items() if words in title.lower() for i, _ in at}
    return (pages or set()) | titles


def main() -> int:
    """1 if something is wrong."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else BUILT
    site = Site(root)
    faults = list(site.faults())
    faults += [f"search for {words!r} does not find {page}" for words, page in SOUGHT.items() if page not in found(root, words)]
    print(*faults, sep="\n")
    print(f"{len(site.pages)} pages, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
