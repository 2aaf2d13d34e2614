"""docs/examples/diffmax-example-backend as an overlay. .ci/example_backend.py installs it and runs its kit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from diffmax.cli.new_backend import STARTS, write

EXAMPLE = Path(__file__).parents[1] / "docs/examples/diffmax-example-backend"


@pytest.fixture
def run_with_plugin(tmp_path, monkeypatch):
    """Make a plugin's source folder importable, with the metadata that an installation would leave; run code beside it."""

    def run(code, plugin=EXAMPLE):
        project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
        info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"])
        names = f"Name: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{names}{requires}")
        points = "".join(f"{name} = {value}\n" for name, value in project["entry-points"]["diffmax.backends"].items())
        (info / "entry_points.txt").write_text(f"[diffmax.backends]\n{points}")
        (package,) = (plugin / "src").iterdir()
        (tmp_path / package.name).symlink_to(package)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.slow
def test_the_example_is_listed_and_computes(run_with_plugin):
    output = run_with_plugin("""
import json, sys, torch, diffmax
torch.manual_seed(0)
from diffmax.testing.rows import checks
kernels_loaded = "diffmax_example.kernels" in sys.modules
records = [(r.distribution, r.version, r.operator, r.status, r.reason) for r in diffmax.backends() if r.backend == "example"]
for dtype in (torch.float16, torch.float32, torch.float64):
    for alpha in (0.1, 0.85, 0.999):
        checks.forward_passes_the_gate("example", "cpu", checks.random_scores((7, 129), dtype), alpha)
        checks.backward_passes_the_gate("example", "cpu", checks.random_scores((7, 129), dtype), alpha)
    checks.nasty_rows_pass_the_gate("example", "cpu", dtype, 0.5)
    checks.residuals_are_exchangeable("example", "cpu", dtype)
try:
    diffmax.diffmax_bisect(torch.zeros(3, dtype=torch.bfloat16), 0.5, backend="example")
except diffmax.NoBackendError as error:
    refusal = str(error)
chosen = diffmax.explain("diffmax_bisect", torch.zeros(3)).chosen
print(json.dumps([kernels_loaded, records, refusal, chosen]))
""")
    kernels_loaded, records, refusal, chosen = json.loads(output)
    assert not kernels_loaded
    assert records == [
        ["diffmax-example", "0.1.0", operator, "available", "opt-in: pass backend="]
        for operator in ("bisect", "bisect_backward")
    ]
    assert "example: takes float16, float32, float64, not bfloat16" in refusal
    assert chosen == "numba"


@pytest.mark.parametrize(("operator", "checks"), [("bisect", 28), ("attention", 28), ("power_attention", 14)])
def test_a_new_backend_is_listed_and_passes_the_selftest(run_with_plugin, tmp_path, operator, checks):
    output = run_with_plugin(
        "import sys; from diffmax.__main__ import main; sys.exit(main(['selftest', '--backend', 'acme']))",
        write("acme", tmp_path / "plugin", operator),
    )
    assert output.splitlines()[-1].startswith(f"all passed: {checks} checks")


@pytest.mark.parametrize("operator", ["attention", "power_attention"])
def test_a_new_backend_claims_what_its_template_says_and_no_more(run_with_plugin, tmp_path, operator):
    output = run_with_plugin(
        """
import json
from diffmax.machine.dispatch import registry
from diffmax.plugin import OPERATOR_FEATURES
(backend,) = [backend for backend in registry.backends() if backend.name == "acme"]
print(json.dumps({name: [sorted(kernel.features), sorted(OPERATOR_FEATURES[name] - kernel.features)]
    for name, kernel in backend.provided.items()}))
""",
        write("acme", tmp_path / "plugin", operator),
    )
    claims = json.loads(output)
    claimed, left = claims[operator]
    assert tuple(claimed) == STARTS[operator].features
    assert left
    assert set(claims[f"{operator}_backward"][0]) == {*claimed} | ({"alpha_gradient"} if operator == "attention" else set())


@pytest.mark.parametrize(
    ("operator", "kit", "forward", "cases"),
    [
        ("attention", "attention", "forward_passes_the_gate", ["causal, lower right", "grouped heads, causal, alpha per head"]),
        ("power_attention", "power", "results_pass_the_gate", ["chunks that do not divide", "grouped heads", "degree 4"]),
    ],
)
def test_the_kernels_of_a_new_backend_pass_the_gate(run_with_plugin, tmp_path, operator, kit, forward, cases):
    """A few of the kit's checks; .ci/example_backend.py runs the kit."""
    output = run_with_plugin(
        f"""
import torch
from diffmax.testing.{kit} import checks
torch.manual_seed(0)
for name in {cases!r}:
    for dtype in (torch.bfloat16, torch.float32):
        checks.{forward}("acme", "cpu", checks.CASES[name], dtype)
        checks.gradients_are_right_on_average("acme", "cpu", checks.CASES[name], dtype)
checks.residuals_are_exchangeable("acme", "cpu", torch.float32)
print("passed")
""",
        write("acme", tmp_path / "plugin", operator),
    )
    assert output == "passed\n"


@pytest.mark.parametrize("operator", STARTS)
def test_a_new_backend_is_formatted_as_the_house_asks(tmp_path, operator):
    """The template is no Python file, so that nothing else looks at it."""
    pytest.importorskip("ruff", reason="ruff comes with diffmax-core[dev]")
    folder = write("acme", tmp_path / "plugin", operator)
    config = str(EXAMPLE.parents[2] / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", config, str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
