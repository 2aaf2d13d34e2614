"""The tiers of the tests: what `make test` leaves to `make test-all`, and that it says so."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXAMPLES = """
import pytest

@pytest.mark.sampled(3)
@pytest.mark.parametrize("n", range(7))
def test_of_seven_cases(n):
    assert n % 3 == 0

@pytest.mark.slow
def test_that_takes_minutes():
    raise AssertionError

@pytest.mark.parametrize("n", range(2))
def test_skipped(n):
    pytest.skip("needs a device")
"""


def test_groups_of_processes_are_made_where_a_process_can_be_ended():
    """Never in the tests' own: torch's gloo can wait for ever as it destroys one after a backward pass."""
    names = {
        (path.name, getattr(node, field, None))
        for path in TESTS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for field in ("attr", "id", "name")  # x.name, name, import name
    }
    calls = {file for file, name in names if name == "init_process_group"}
    assert calls == {"ranks.py", "test_faults.py"}


def test_every_file_has_a_test_in_the_fast_tier(files_with_fast_tests):
    assert not [file for file, fast in files_with_fast_tests.items() if not fast]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two"])
def test_the_first_case_and_every_nth_are_fast_and_what_is_left_out_is_counted(processes, tmp_path):
    if processes:
        pytest.importorskip("xdist", reason="needs pytest-xdist: pip install pytest-xdist")
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    options = [
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
        *processes,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not slow", *options, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed, 2 skipped" in done.stdout
    assert "2 skipped: needs a device\n5 left to `make test-all`\n" in done.stdout


@pytest.mark.slow
def test_the_shares_of_the_slow_tests_are_all_of_them(tmp_path):
    """Each with the fast ones, and what it leaves is counted. A share that is none is refused."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_examples.py").write_text(EXAMPLES)
    options = ["-c", str(TESTS.parent / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-v"]

    def run(share):
        command = [sys.executable, "-m", "pytest", *options, "--share", share, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    chosen = []
    for share in ("1/3", "2/3", "3/3"):
        done = run(share)
        names = {
            line.partition(" ")[0].partition("::")[2]
            for line in done.stdout.splitlines()
            if " PASSED " in line or " FAILED " in line or " SKIPPED " in line
        }
        chosen.append(names)
        assert f"{10 - len(names)} left to `make test-all`" in done.stdout
    assert len(set.union(*chosen)) == 10
    assert sum(map(len, chosen)) == 10 + 2 * 5  # the five fast ones each time
    refused = run("4/3")
    assert refused.returncode != 0
    assert "expected K/N with 1 <= K <= N, got '4/3'" in refused.stderr
