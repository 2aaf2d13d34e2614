""".ci/pages.py, which reads what `make docs` built, finds each kind of fault."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("bs4", reason="needs beautifulsoup4: pip install 'diffmax-core[dev]'")
spec = importlib.util.spec_from_file_location("pages", Path(__file__).parents[1] / ".ci" / "pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)

HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'


def faults(folder, body="", head=HEAD):
    (folder / "index.html").write_text(f"<html><head>{head}</head><body>{body}</body></html>")
    return list(pages.Site(folder).faults())


def test_a_sound_page_has_no_fault(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    links = "".join(f'<a href="{address}">x</a>' for address in ("#top", "index.html#top", "https://a.org"))
    assert faults(tmp_path, f'<h1 id="top">T</h1>{links}<img src="image.png">') == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('<a href="gone.html">x</a>', "index.html: links to gone.html, which is not there"),
        ('<a href="#gone">x</a>', "index.html: links to #gone, whose anchor is not there"),
        ('<img src="gone.png">', "index.html: lacks gone.png"),
        ('<script src="https://cdn.org/x.js"></script>', "index.html: needs https://cdn.org/x.js of another host"),
        ('<script src="//cdn.org/x.js"></script>', "index.html: needs //cdn.org/x.js of another host"),
        ('<table style="width: 900px"></table>', "index.html: <table> is 900 pixels wide, more than a phone's 360"),
    ],
)
def test_a_fault_is_found(tmp_path, body, words):
    assert faults(tmp_path, body) == [words]


def test_a_page_without_a_viewport_and_a_site_without_pages_are_faults(tmp_path):
    assert list(pages.Site(tmp_path).faults()) == [f"no page in {tmp_path}"]
    assert faults(tmp_path, head="") == ["index.html: no viewport for phones"]


def test_the_search_takes_words_that_are_on_one_page_or_in_a_title(tmp_path):
    index = {
        "docnames": ["a", "b", "c"],
        "terms": {"which": [0, 1], "alpha": 1, "contain": 2},
        "titleterms": {},
        "alltitles": {"How to install": [[0, None]]},
    }
    (tmp_path / "searchindex.js").write_text(f"Search.setIndex({json.dumps(index)})")
    assert pages.found(tmp_path, "which alpha") == {"b"}
    assert pages.found(tmp_path, "container") == {"c"}
    assert pages.found(tmp_path, "install") == {"a"}
    assert pages.found(tmp_path, "else") == set()
