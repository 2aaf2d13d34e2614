"""What .ci/version.py and .ci/release.py refuse, and that the repository stands as they want it."""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11, as the pinned environment does")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    for name in ("version", "release", "packages"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in ("version", "release", "packages"):
        sys.modules.pop(name, None)


@pytest.fixture
def copy(tmp_path):
    """The files in which a version stands."""
    for file in [*ROOT.glob("diffmax-*/pyproject.toml"), ROOT / "CITATION.cff"]:
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    return tmp_path


def test_a_version_is_written_into_every_place(script, copy):
    version = script("version")
    before = version.agreed(copy)
    version.write("7.8.9rc1", copy)
    assert version.agreed(copy) == "7.8.9rc1"
    old = re.compile(rf"(^version|diffmax-\w+==).*{re.escape(before)}\b", re.MULTILINE)
    assert not [file for file in copy.rglob("*.*") if old.search(file.read_text())]


def test_places_that_differ_are_named(script, copy):
    version = script("version")
    file = copy / "diffmax-npu" / "pyproject.toml"
    file.write_text(file.read_text().replace("diffmax-core==", "diffmax-core==9."))
    with pytest.raises(version.VersionError, match=r"must have one, got\n  .*\n  9\.\S+: diffmax-npu/pyproject\.toml\nrun:"):
        version.agreed(copy)
    file.write_text("")
    with pytest.raises(version.VersionError, match=r"diffmax-npu/pyproject\.toml must have a place .*, got none"):
        version.agreed(copy)


@pytest.mark.parametrize(("number", "says"), [("1.x", "must be one of PEP 440"), ("v1.0", "write 1.0")])
def test_what_is_no_version_is_not_written(script, copy, number, says):
    version = script("version")
    with pytest.raises(version.VersionError, match=says):
        version.write(number, copy)


def test_a_release_without_its_section_or_with_fragments_left_is_refused(script, tmp_path):
    release = script("release")
    (tmp_path / "changelog.d").mkdir()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2030-01-01)\n")
    release.check_changelog(tmp_path, "0.2.0")
    with pytest.raises(release.PackagingError, match=r"must have a section 0\.3\.0 .*\['0\.2\.0'\]"):
        release.check_changelog(tmp_path, "0.3.0")
    (tmp_path / "changelog.d" / "12.fixed.md").touch()
    with pytest.raises(release.PackagingError, match=r"fragments \['12\.fixed\.md'\]\nrun: make changelog VERSION=0\.2\.0"):
        release.check_changelog(tmp_path, "0.2.0")


def test_a_tag_needs_a_clean_tree_and_a_new_name(script, tmp_path):
    release = script("release")

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "a")
    release.check_tree(tmp_path, "v1.0")
    git("tag", "v1.0")
    with pytest.raises(release.PackagingError, match=r"the tag v1\.0 exists"):
        release.check_tree(tmp_path, "v1.0")
    (tmp_path / "new").touch()
    with pytest.raises(release.PackagingError, match=r"without changes, got\n\?\? new"):
        release.check_tree(tmp_path, "v2.0")


def test_another_repository_or_another_tag_is_refused_before_anything_is_built(script):
    release = script("release")
    options = {"tag": False, "for_tag": None, "from_repository": None}
    with pytest.raises(release.PackagingError, match=r"names the repository https://\S+, this is https://example\.org/a/fork"):
        release.release(argparse.Namespace(**options | {"from_repository": "https://example.org/a/fork"}))
    with pytest.raises(release.PackagingError, match=r"the tag must be v\S+, got v0\.0\.1"):
        release.release(argparse.Namespace(**options | {"for_tag": "v0.0.1"}))


def test_what_a_wheel_requires_must_be_in_the_environment(script, monkeypatch):
    release, packages = script("release"), script("packages")
    ours = packages.Distribution(ROOT, "a", "1", Path("a-1-py3-none-any.whl"), Path("a-1.tar.gz"))
    asks = ["pluggy>=1", "torch; python_version < '3'", "numba; extra == 'fast'"]
    monkeypatch.setattr(packages.Distribution, "requirements", lambda _: asks)
    found, theirs = release.needed(ours, {"a": ours})
    assert ([one.name for one in found], set(theirs)) == (["a"], {"pluggy"})
    asks.append("nothing-of-this-name")
    with pytest.raises(release.PackagingError, match="a requires nothing-of-this-name, which is not in this environment"):
        release.needed(ours, {"a": ours})


def test_all_distributions_the_citation_and_the_readme_name_one_repository(script):
    script("release").check_address(None)
    urls = script("tomllib").loads((ROOT / "diffmax-core" / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert f"repository-code: {urls['Repository']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    name = urls["Repository"].removeprefix("https://github.com/")
    pages = "https://{}.github.io/{}/".format(*name.split("/"))  # where GitHub shows what docs.yml builds
    assert urls.pop("Documentation") == pages
    assert f'html_baseurl = "{pages}"' in (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    for page in [ROOT / "README.md", *ROOT.glob("diffmax-*/README.md")]:
        links = re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", page.read_text(encoding="utf-8"))
        assert set(links) == {name}, page


@pytest.mark.parametrize("page", sorted(ROOT.glob("diffmax-*/README.md")), ids=lambda page: page.parent.name)
def test_links_of_what_an_index_shows_are_absolute_and_lead_to_files(page):
    links = re.findall(r"\]\((\S+?)\)", page.read_text(encoding="utf-8"))
    assert len(links) > 3
    assert not [link for link in links if not link.startswith("https://")]
    files = [match[1] for link in links if (match := re.search(r"/(?:blob|tree)/main/([^#]+)", link))]
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_change_that_waits_is_read_by_towncrier():
    pytest.importorskip("towncrier", reason="needs towncrier: pip install towncrier")
    fragments = [file for file in (ROOT / "changelog.d").glob("*.md") if file.name != "README.md"]
    # what comes before the first dot is taken for the number of an issue, and linked, unless it begins with +
    assert not [file.name for file in fragments if not re.match(r"(\+[\w-]+|\d+)\.\w+\.md$", file.name)]
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "next"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # a name that it cannot read is an error
    assert done.stdout.count("\n- ") == len(fragments)
