"""Plugins that are broken in every way: `import diffmax` survives, each is listed with its reason, nothing else is hidden."""

import importlib
import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path

import importlib_metadata
import pytest
from packaging.requirements import Requirement

from diffmax.machine import discovery, metadata
from diffmax.plugin import API_VERSION

pytestmark = pytest.mark.sampled(3)

_spec = importlib.util.spec_from_file_location("overlay", Path(__file__).with_name("overlay.py"))
overlay = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(overlay)
add_plugin, run = overlay.add_plugin, overlay.run

OWN_API = ".".join(map(str, API_VERSION))
VENDORS = ("diffmax-cuda", "diffmax-rocm", "diffmax-npu")  # installed for their own tests, if they are

HOOK = """
from diffmax.plugin import hookimpl
class P:
    @hookimpl
    def {signature}:
        return {returns}
plugin = P()
"""

LIST = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import diffmax
records = {r.backend + "@" + r.distribution: [r.status, r.reason] for r in diffmax.backends()}
import torch
values = diffmax.diffmax_bisect(torch.tensor([3.0, 2.0, 1.0, 0.0]), 0.5).tolist()
def attempt(name):
    try: return diffmax.diffmax_bisect(torch.randn(3), 0.5, backend=name).sum().item()
    except Exception as error: return f"{type(error).__name__}: {error}"
print(json.dumps(dict(
    records=records, warnings=[str(w.message) for w in caught], values=values,
    good=attempt("good"), kernelraises=attempt("kernelraises"), kernelmissing=attempt("kernelmissing"),
    importerror=attempt("importerror"),
)))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One process with all of them installed at once."""
    folder, second = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("more")
    add_plugin(folder, "good")
    add_plugin(folder, "importerror", "import a_module_that_is_not_there")
    add_plugin(folder, "syntaxerror", "def (:")
    add_plugin(folder, "oserror", "raise OSError('libvendor.so.3: cannot open shared object file')")
    add_plugin(folder, "exits", "import sys; sys.exit('no gpu')")
    add_plugin(folder, "badsignature", HOOK.format(signature="diffmax_backends(self, device)", returns="[]"))
    add_plugin(folder, "unknownhook", HOOK.format(signature="diffmax_backend(self)", returns="[]"))
    add_plugin(folder, "nohook", "plugin = object()")
    add_plugin(folder, "noplugin", "")
    add_plugin(folder, "badreturn", HOOK.format(signature="diffmax_backends(self)", returns="'cuda'"))
    add_plugin(folder, "badelement", HOOK.format(signature="diffmax_backends(self)", returns="[1]"))
    add_plugin(folder, "badfield", fields="dtypes=('float32',)")
    add_plugin(folder, "oldapi", fields="api_version=(0, 9)")
    add_plugin(folder, "futureminor", fields="api_version=(1, 99)")
    add_plugin(folder, "futuremajor", fields="api_version=(2, 0)")
    add_plugin(folder, "sharedkernels", fields="shared_kernels=99")
    add_plugin(folder, "unmet", "import os; os.abort()", requires=["torch>=99"])
    add_plugin(folder, "missing", "import os; os.abort()", requires=["a-package-that-is-not-there>=2 ; python_version>'3'"])
    add_plugin(folder, "otherextra", requires=["a-package-that-is-not-there ; extra == 'fast'"])
    add_plugin(folder, "stale", value="plug_gone._plugin:plugin")
    add_plugin(folder, "blocked", "import os; os.abort()")
    add_plugin(folder, "contested", fields="priority=1")
    add_plugin(folder, "contested", distribution="zz-late", value="plug_contested._other:plugin")
    add_plugin(folder, "takesname", fields="name='cpu'")
    add_plugin(
        folder,
        "probesays",
        fields="probe='plug_probesays:probe', install_hint='run: pip install acme-driver'",
        init="def probe(): return 'no acme device'",
    )
    add_plugin(folder, "proberaises", fields="probe='plug_proberaises:probe'", init="def probe(): raise RuntimeError('driver')")
    add_plugin(
        folder,
        "kernelraises",
        fields="kernels={'bisect': 'plug_kernelraises:kernel'}",
        init="def kernel(*_): raise RuntimeError('launch failed')",
    )
    add_plugin(folder, "kernelmissing", fields="kernels={'bisect': 'plug_kernelmissing.gone:kernel'}")
    add_plugin(second, "good")  # the same distribution twice on the path, as an editable install beside a wheel leaves it
    return run(LIST, folder, second, DIFFMAX_BLOCK="blocked")


EXPECTED = {
    "good@plug-good": ("available", "opt-in: pass backend="),
    "otherextra@plug-otherextra": ("available", "opt-in: pass backend="),
    "importerror@plug-importerror": ("failed", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    "syntaxerror@plug-syntaxerror": ("failed", "SyntaxError: invalid syntax"),
    "oserror@plug-oserror": ("failed", "OSError: libvendor.so.3: cannot open shared object file"),
    "exits@plug-exits": ("failed", "SystemExit: no gpu"),
    "badsignature@plug-badsignature": ("failed", "Argument(s) {'device'} are declared in the hookimpl but can not be found"),
    "unknownhook@plug-unknownhook": ("failed", "unknown hook 'diffmax_backend'"),
    "nohook@plug-nohook": ("failed", "implements no diffmax_backends marked with diffmax.plugin.hookimpl"),
    "noplugin@plug-noplugin": ("failed", "AttributeError: module 'plug_noplugin._plugin' has no attribute 'plugin'"),
    "badreturn@plug-badreturn": ("failed", "diffmax_backends must return a sequence of Backend, got 'cuda'"),
    "badelement@plug-badelement": ("failed", "diffmax_backends must return a sequence of Backend, got one of 1"),
    "badfield@plug-badfield": ("failed", "TypeError: Backend badfield: dtypes must be torch dtypes, got ['float32']"),
    "oldapi@plug-oldapi": ("incompatible", f"written for plugin API 0.9, this diffmax-core has {OWN_API}; upgrade the plugin"),
    "futureminor@plug-futureminor": ("incompatible", f"plugin API 1.99, this diffmax-core has {OWN_API}; upgrade diffmax-core"),
    "futuremajor@plug-futuremajor": ("incompatible", f"plugin API 2.0, this diffmax-core has {OWN_API}; upgrade diffmax-core"),
    "sharedkernels@plug-sharedkernels": ("incompatible", "written for version 99 of diffmax.kernels, this diffmax-core has 2"),
    "unmet@plug-unmet": ("incompatible", "requires torch>=99, found "),
    "missing@plug-missing": ("incompatible", "which is not installed; run: pip install 'a-package-that-is-not-there>=2"),
    "stale@plug-stale": ("failed", "ModuleNotFoundError: No module named 'plug_gone'"),
    "blocked@plug-blocked": ("blocked", "by DIFFMAX_BLOCK"),
    "contested@plug-contested": ("available", "opt-in: pass backend="),
    "contested@zz-late": ("shadowed", "the name is taken by plug-contested; uninstall one of the two"),
    "takesname@plug-takesname": ("shadowed", "the backend name 'cpu' is taken by diffmax-core"),
    "probesays@plug-probesays": ("unavailable", "no acme device; run: pip install acme-driver"),
    "proberaises@plug-proberaises": ("failed", "its probe raised RuntimeError: driver"),
    "kernelraises@plug-kernelraises": ("available", "opt-in: pass backend="),
    "kernelmissing@plug-kernelmissing": ("available", "opt-in: pass backend="),
}


@pytest.mark.parametrize("plugin", EXPECTED)
@pytest.mark.sampled(4)
def test_is_listed_with_its_status_and_reason(outcome, plugin):
    status, reason = outcome["records"][plugin]
    assert status == EXPECTED[plugin][0]
    assert EXPECTED[plugin][1] in reason


def test_nothing_else_is_listed_and_core_works(outcome):
    records = {key for key in outcome["records"] if key.rpartition("@")[2] not in VENDORS}
    assert records == {*EXPECTED, *(f"{name}@diffmax-core" for name in ("numba", "cpu", "reference"))}
    assert outcome["records"]["numba@diffmax-core"] == ["active", ""]
    assert outcome["values"] == pytest.approx([0.8307, 0.1693, 0, 0], abs=1e-4)


def test_each_refused_plugin_is_warned_about_once_with_what_to_do(outcome):
    refused = [name for name, (status, _) in EXPECTED.items() if status in ("incompatible", "shadowed", "failed")]
    refused.remove("proberaises@plug-proberaises")  # nobody asked its probe during the import
    for key in refused:
        name, distribution = key.split("@")
        about = [w for w in outcome["warnings"] if w.startswith(f"diffmax: plugin '{name}' of {distribution} 1.0 is ")]
        assert len(about) == 1
        both = "uninstall one of the two" in about[0]  # the variable would leave out the first too
        assert (f"set DIFFMAX_BLOCK={name} to leave it out without this warning" in about[0]) == (not both)
    assert len(outcome["warnings"]) == len(refused)


def test_a_kernel_that_raises_is_not_retried_elsewhere(outcome):
    assert outcome["good"] == pytest.approx(1)
    assert outcome["kernelraises"] == "RuntimeError: launch failed"
    assert outcome["kernelmissing"].startswith("BackendError: backend kernelmissing: its kernel plug_kernelmissing.gone:kernel")
    assert "to leave it out, set DIFFMAX_BLOCK=kernelmissing" in outcome["kernelmissing"]


def test_naming_a_plugin_that_is_not_loaded_says_why(outcome):
    assert outcome["importerror"].startswith("NoBackendError: no backend is named 'importerror'\n  loaded: ")
    assert "  plugin 'importerror' of plug-importerror 1.0 is failed: ModuleNotFoundError" in outcome["importerror"]


@pytest.mark.parametrize(
    "order",
    [
        "import diffmax, plug_eager",
        "import plug_eager, diffmax",
        "import plug_eager._plugin",
        "import plug_eager.kernels, torch",
    ],
)
def test_a_plugin_may_be_imported_before_core(order, tmp_path):
    """A plugin's package that imports diffmax is half initialised when diffmax finds it: the top cause of dropped plugins."""
    add_plugin(tmp_path, "eager", init="import diffmax\n")
    (tmp_path / "plug_eager" / "kernels.py").write_text("from diffmax import diffmax_bisect\n")
    code = f"{order}\nimport diffmax, json\nprint(json.dumps([r.status for r in diffmax.backends() if r.backend == 'eager']))"
    assert run(code, tmp_path) == ["available", "available"]


def test_a_plugin_is_refused_without_an_error_where_warnings_are_errors(tmp_path):
    add_plugin(tmp_path, "broken", "import a_module_that_is_not_there")
    add_plugin(tmp_path, "good")
    code = "import warnings; warnings.simplefilter('error')\nimport diffmax, json\n"
    code += f"print(json.dumps({{r.backend: r.status for r in diffmax.backends() if r.distribution not in {VENDORS}}}))"
    expected = {"numba": "active", "cpu": "available", "reference": "active", "good": "available", "broken": "failed"}
    assert run(code, tmp_path) == expected


def test_damaged_metadata_does_not_break_the_import(tmp_path):
    """An interrupted uninstall leaves a dist-info without METADATA."""
    add_plugin(tmp_path, "good")
    add_plugin(tmp_path, "damaged")
    (tmp_path / "plug_damaged-1.0.dist-info" / "METADATA").unlink()
    older = tmp_path / "diffmax-0.1.dist-info"
    older.mkdir()
    (older / "RECORD").write_text("")
    code = "import diffmax, json; "
    code += f"print(json.dumps(sorted({{r.backend for r in diffmax.backends() if r.distribution not in {VENDORS}}})))"
    assert {"cpu", "good", "reference"} <= set(run(code, tmp_path))


def test_a_blocked_name_that_no_plugin_has_is_warned_about():
    code = "import warnings\nwith warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n"
    code += "    import diffmax\nprint(w[0].message)"
    assert run(code, DIFFMAX_BLOCK="nosuch") == "diffmax: DIFFMAX_BLOCK names nosuch, and no such plugin is installed"
    assert "numba: diffmax-core's own backends cannot be blocked" in run(code, DIFFMAX_BLOCK="numba")


@pytest.mark.slow
def test_discovery_can_be_switched_off(tmp_path):
    add_plugin(tmp_path, "good")
    code = "import diffmax, json; "
    code += f"print(json.dumps(sorted({{r.backend for r in diffmax.backends() if r.distribution not in {VENDORS}}})))"
    assert run(code, tmp_path) == ["cpu", "good", "numba", "reference"]
    assert run(code, tmp_path, DIFFMAX_PLUGINS="0") == ["cpu", "numba", "reference"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "DIFFMAX_BAKEND",
            "cpu",
            "variable DIFFMAX_BAKEND, did you mean DIFFMAX_BACKEND?\n  known: DIFFMAX_BACKEND, DIFFMAX_BLOCK",
        ),
        ("DIFFMAX_PLUGINS", "no", "DIFFMAX_PLUGINS must be 0 or 1, got 'no'"),
        ("DIFFMAX_STRICT", "true", "DIFFMAX_STRICT must be 0 or 1, got 'true'"),
    ],
)
def test_a_typo_in_a_variable_is_an_error(variable, value, message):
    result = run("import diffmax", check=False, **{variable: value})
    assert result.returncode
    assert message in result.stderr


def test_an_unknown_name_in_the_environment_is_an_error_at_the_first_call():
    code = "import diffmax, torch\nprint(len(diffmax.explain.__doc__) > 0)\ndiffmax.diffmax_bisect(torch.randn(3), 0.5)"
    result = run(code, check=False, DIFFMAX_BACKEND="cupu")
    assert result.stdout.strip() == "True"
    words = r"no backend is named 'cupu', which DIFFMAX_BACKEND asks for\n  loaded: numba, cpu, .*\n  did you mean 'cpu'\?\nrun"
    assert re.search(words, result.stderr)


@pytest.mark.slow
def test_a_source_path_on_a_bare_machine_is_imported_without_importlib_metadata_and_without_metadata():
    """It used to be a ModuleNotFoundError, and then a PackageNotFoundError for diffmax-core."""
    code = (
        "import sys\n"
        "sys.modules['importlib_metadata'] = None\n"
        "import importlib.metadata as standard\n"
        "find, points = standard.distribution, standard.entry_points\n"
        "def distribution(name):\n"
        "    if name.startswith('diffmax'): raise standard.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "standard.distribution = distribution\n"
        "standard.entry_points = lambda **of: () if of.get('group') == 'diffmax.backends' else points(**of)\n"
        "import torch, diffmax\n"
        "assert diffmax.__version__ == '0+unknown'\n"
        "from diffmax.cli import report\n"
        "assert report.collect().versions['diffmax-core'] == '0+unknown'\n"
        "assert diffmax.diffmax_bisect(torch.tensor([3.0, 0.0]), 0.5)[1] < 0.2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_requirement_that_is_surely_met_is_so_by_packaging_too(monkeypatch):
    """The short way of most plugins does without packaging, whose import takes longer than the rest of the check."""
    found = ["0.1.0", "0.1", "2.4", "2.4.0rc1", "2.4.1+cpu", "2.10.0.dev3", "10.0", "1!0.1", "2.4.post1", "nightly"]
    surely = 0
    for installed, wanted, relation in itertools.product(
        found, ["0.1", "0.1.0", "2.4", "2.4.0", "2.4.1", "9"], ["==", ">=", "~=", "<"]
    ):
        monkeypatch.setattr(discovery, "version", lambda name, installed=installed: installed)
        if discovery._is_surely_met(f"torch{relation}{wanted}"):
            surely += 1
            assert Requirement(f"torch{relation}{wanted}").specifier.contains(installed, prereleases=True), (installed, wanted)
    assert surely > 20
    assert not discovery._is_surely_met("torch>=2 ; extra == 'fast'")
    assert not discovery._is_surely_met("torch[opt]>=2")


def test_the_import_does_without_layers_and_packaging():
    """They are imported when they are used; vendors' packages are there."""
    code = (
        "import sys, torch, diffmax\n"
        "heavy = ('diffmax.nn', 'packaging.requirements', 'email.policy', 'numba', 'triton')\n"
        "assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)\n"
        "assert {'nn', 'DiffmaxBisectModule'} <= set(dir(diffmax))\n"
        "assert diffmax.DiffmaxBisectModule is diffmax.nn.DiffmaxBisectModule\n"
        "from diffmax import *\n"
        "DiffmaxBisectModule(0.5)(torch.zeros(3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_entry_points_are_those_that_importlib_metadata_finds(tmp_path, monkeypatch):
    """Of distributions with the group, without it, without METADATA, and of a copy that another one hides."""
    for folder, name, points in (
        ("one/plug-2", "plug", "[console_scripts]\nrun = plug:run\n"),
        ("two/plug-1", "plug", "[diffmax.backends]\nold = plug:old\n"),
        (
            "two/Other_Plug-3",
            "Other.Plug",
            "[console_scripts]\na = b:c\n\n[diffmax.backends]\n# late\nnew = b:new\nlate = b:late\n",
        ),
        ("two/other_plug-2", "other-plug", "[diffmax.backends]\nshadow = other:shadow\n"),
        ("two/half-1", "", ""),
    ):
        info = tmp_path / f"{folder}.dist-info"
        info.mkdir(parents=True)
        if name:
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {folder[-1]}\n")
            (info / "entry_points.txt").write_text(points)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "one"), str(tmp_path / "two"), *sys.path])
    importlib.invalidate_caches()
    found = sorted((point.name, point.value) for point in metadata.entry_points_of("diffmax.backends"))
    expected = importlib_metadata.entry_points(group="diffmax.backends")
    assert found == sorted({(point.name, point.value) for point in expected})
    names = [name for name, _ in found]
    assert "old" not in names
    assert "new" in names or "shadow" in names  # whichever of the two copies the folder lists first
