"""The packaging metadata as it stands in the repository; `make packages` checks what is built from it."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import diffmax

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11, as the pinned environment does")

ROOT = Path(__file__).parents[1]
CORE = tomllib.loads((ROOT / "diffmax-core" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = CORE["optional-dependencies"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
PINS = {canonicalize_name(name): version for name, version in PINS.items()}

# Extras that ask for what the pinned environment leaves out: other devices; timm, which the Makefile pins, without torchvision.
NOT_PINNED = {"cuda", "rocm", "npu", "timm"}


def packages_script():
    spec = importlib.util.spec_from_file_location("packages", ROOT / ".ci" / "packages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_extras_that_users_and_vendors_rely_on_are_there():
    assert set(EXTRAS) >= {
        "numba",
        "cuda",
        "rocm",
        "npu",
        "monitoring",
        "transformers",
        "timm",
        "diffusers",
        "examples",
        "testing",
        "dev",
    }


def test_a_plain_install_asks_for_four_things():
    assert {Requirement(r).name for r in CORE["dependencies"]} == {"torch", "pluggy", "importlib-metadata", "packaging"}


def test_nothing_asks_for_triton_or_torch_npu_which_come_with_the_users_torch():
    names = {canonicalize_name(Requirement(r).name) for r in sum(EXTRAS.values(), CORE["dependencies"])}
    assert not names & {"triton", "pytorch-triton-rocm", "triton-ascend", "torch-npu"}


def test_the_version_is_the_same_everywhere():
    version = CORE["version"]
    assert diffmax.__version__ == version, "reinstall diffmax-core: the installed metadata is of another version"
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
    for vendor in ("cuda", "rocm", "npu"):
        assert EXTRAS[vendor] == [f"diffmax-{vendor}=={version}"]
    for project in ROOT.glob("diffmax-*/pyproject.toml"):
        assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == version


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in ROOT.glob("diffmax-*/pyproject.toml")))
def test_each_distribution_carries_the_licence_of_the_repository(folder):
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_every_distribution_is_a_member_of_the_workspace():
    folders = {p.parent for p in ROOT.glob("diffmax-*/pyproject.toml")}
    assert set(packages_script().members()) == folders


@pytest.mark.parametrize("extra", ["", *sorted(set(EXTRAS) - NOT_PINNED)])
def test_the_pins_satisfy_the_bounds(extra):
    for requirement in map(Requirement, EXTRAS[extra] if extra else CORE["dependencies"]):
        if requirement.name == "diffmax-core":
            continue
        name = canonicalize_name(requirement.name)
        assert name in PINS, f"{requirement} has no pin in requirements.txt"
        assert requirement.specifier.contains(PINS[name], prereleases=True), f"requirements.txt has {name}=={PINS[name]}"


def test_what_the_pins_need_is_pinned_too():
    """Otherwise two machines get different environments from the same file (hf-xet was left out once)."""
    unpinned = set()
    for name in sorted(PINS.keys() - {"torch"}):  # torch's needs differ from build to build
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for needed in map(Requirement, needs):
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if wanted and canonicalize_name(needed.name) not in PINS.keys() | {"pip", "setuptools"}:
                unpinned.add(f"{needed.name} of {name}")
    assert not unpinned


def test_every_classified_python_is_within_the_bound():
    versions = [c.rsplit(" ", 1)[1] for c in CORE["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert versions[0] == "3.10"
    assert all(version in SpecifierSet(CORE["requires-python"]) for version in versions)


def test_the_install_lines_of_the_readme_are_found_as_they_stand():
    shell = "```bash\npip install a\n# pip install no\n  uv pip install 'b[c]'\n```\n"
    readme = f"`pip install no`\n{shell}```python\npip install no\n```\n"
    assert packages_script().install_lines(readme) == ["pip install a", "uv pip install 'b[c]'"]
    assert "pip install diffmax-core" in packages_script().install_lines((ROOT / "README.md").read_text(encoding="utf-8"))


def test_a_release_from_elsewhere_and_an_extra_that_is_not_there_are_refused():
    packages = packages_script()
    built = packages.Distribution(ROOT, "a", "1", Path("/dist/a-1-py3-none-any.whl"), Path("/dist/a-1.tar.gz"))

    def check(requested, url="file:///dist/a-1-py3-none-any.whl"):
        ours = {"download_info": {"url": url}, "metadata": {"name": "A", "provides_extra": ["x"]}}
        other = {"download_info": {"url": "https://example.org/b.whl"}, "metadata": {"name": "b"}}
        return packages.check_report({"install": [other, ours]}, Requirement(requested), {"a": built})

    assert check("a") == check("a[x]") == ["a", "b"]
    with pytest.raises(packages.PackagingError, match=r"a came from https://example\.org/.*: another release"):
        check("a", "https://example.org/a-1.whl")
    with pytest.raises(packages.PackagingError, match=r"a\[y\]: the extras are x"):
        check("a[y]")
