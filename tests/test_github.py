"""The workflows ask for what is there: make targets, scripts, versions, actions by commit; GitHub itself is not asked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")
tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11, as the pinned environment does")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((GITHUB / "workflows").glob("*.yml"))
}
ACTION = yaml.safe_load((GITHUB / "actions" / "setup" / "action.yml").read_text(encoding="utf-8"))
CORE = tomllib.loads((ROOT / "diffmax-core" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", MAKEFILE, re.MULTILINE) for name in line.split()}
JOBS = {f"{file}: {name}": job for file, workflow in WORKFLOWS.items() for name, job in workflow["jobs"].items()}
SCHEMAS = {
    "github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "github-actions": sorted((GITHUB / "actions").glob("*/action.yml")),
    "github-issue-forms": sorted(set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE" / "config.yml"}),
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "dependabot": [GITHUB / "dependabot.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}


def steps():
    return [step for job in [*JOBS.values(), ACTION["runs"]] for step in job.get("steps", [])]


def missing_targets(job, targets):
    """What the job's steps ask of make, choices of its matrix among it, and the Makefile does not have."""
    asked = {word.strip('"') for step in job["steps"] for word in re.findall(r"\bmake (\S+)", step.get("run", ""))}
    if "$VERB" in asked:
        asked = asked - {"$VERB"} | set(job["strategy"]["matrix"]["verb"])
    return sorted(asked - targets)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_files_are_what_their_schemas_say(schema):
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema: pip install check-jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, SCHEMAS[schema])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert SCHEMAS[schema]
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_every_verb_is_a_target_of_the_makefile(job):
    assert not missing_targets(JOBS[job], TARGETS)


def test_a_verb_that_is_not_there_is_noticed():
    job = {
        "steps": [{"run": "make test\nmake nothing"}, {"run": 'make "$VERB"'}],
        "strategy": {"matrix": {"verb": ["demo", "none"]}},
    }
    assert missing_targets(job, TARGETS) == ["none", "nothing"]
    assert sum("make " in step.get("run", "") for step in steps()) >= 8


def test_every_script_that_a_step_runs_is_there():
    scripts = {script for step in steps() for script in re.findall(r"python (\.ci/\S+\.py)", step.get("run", ""))}
    assert {".ci/smoke.py"} <= scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_actions_are_pinned_to_commits_that_a_comment_names_and_one_action_to_one():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(GITHUB.rglob("*.yml")))
    used = re.findall(r"uses: (\S+)(.*)", text)
    pins = {}
    for name, comment in used:
        if name.startswith("./"):
            assert (ROOT / name / "action.yml").is_file()
            continue
        action, _, commit = name.partition("@")
        assert re.fullmatch(r"[0-9a-f]{40}", commit), name
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), name
        pins.setdefault(action, set()).add((commit, comment))
    assert len(pins) > 5
    assert not {action: commits for action, commits in pins.items() if len(commits) > 1}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_a_limit_of_time_and_no_more_rights_than_it_names(job):
    assert 0 < JOBS[job]["timeout-minutes"] <= 180
    assert WORKFLOWS[job.partition(":")[0]]["permissions"] == {"contents": "read"}
    writes = {right for right, level in JOBS[job].get("permissions", {}).items() if level == "write"}
    allowed = {
        "docs.yml: deploy": {"pages", "id-token"},
        "release.yml: attest": {"attestations", "id-token"},
        "release.yml: publish": {"id-token"},
        "release.yml: page": {"contents"},
    }
    assert writes == allowed.get(job, set())


def test_pythons_and_torches_are_those_of_the_metadata_and_the_pins():
    matrix = JOBS["ci.yml: versions"]["strategy"]["matrix"]
    classified = [match[1] for name in CORE["classifiers"] if (match := re.search(r":: (3\.\d+)$", name))]
    floor = next(match[1] for need in CORE["dependencies"] if (match := re.fullmatch(r"torch>=(\S+)", need)))
    assert matrix["python"] == classified
    assert matrix["torch"] == [floor, PINS["torch"]]
    assert matrix["exclude"] == [{"python": "3.13", "torch": floor}]
    assert f"FLOOR_BOUNDS ?= torch=={floor} " in MAKEFILE
    assert f"FLOOR_PYTHON ?= python{classified[0]}" in MAKEFILE
    assert ACTION["inputs"]["python"]["default"] in classified
    for project in ROOT.glob("diffmax-*/pyproject.toml"):
        others = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        assert [name for name in others["classifiers"] if re.search(r":: 3\.\d+$", name)] == [
            f"Programming Language :: Python :: {version}" for version in classified
        ]


def test_other_systems_install_what_the_files_that_they_test_import():
    commands = " ".join(step.get("run", "") for step in JOBS["ci.yml: systems"]["steps"])
    files = [ROOT / name for name in re.findall(r"tests/\w+\.py", commands)]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in [*files, ROOT / "tests" / "conftest.py"]]
    names = {alias.name for tree in trees for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for tree in trees for node in tree.body if isinstance(node, ast.ImportFrom)}
    needed = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    installed = set(re.findall(r"[a-z]+", re.search(r"pip install (.*)", commands)[1]))
    assert len(files) >= 4
    assert needed - {"benchmarks", "diffmax", "tests", "torch"} <= installed


def test_the_page_about_versions_names_the_same():
    page = (ROOT / "docs" / "versioning.md").read_text(encoding="utf-8")
    matrix = JOBS["ci.yml: versions"]["strategy"]["matrix"]
    assert f"| Python | {matrix['python'][0]} | {matrix['python'][-1]} |" in page
    assert f"| torch | {matrix['torch'][0]} | {PINS['torch'].rpartition('.')[0]} |" in page
    assert f"| Numba (optional) | 0.60 | {PINS['numba'].rpartition('.')[0]} |" in page
    assert f"| Triton (on GPUs) | 3.6 | {PINS['triton'].rpartition('.')[0]} |" in page


def test_a_release_is_built_and_tested_before_it_is_published():
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert jobs["attest"]["needs"] == ["build", "test"]
    assert jobs["publish"]["needs"] == "attest"
    assert jobs["page"]["needs"] == "publish"
    built = " ".join(step.get("run", "") for step in jobs["build"]["steps"])
    assert "--for-tag" in built
    assert "--from-repository" in built
    assert "make test-all" in [step.get("run") for step in jobs["test"]["steps"]]
    assert not [step for step in jobs["publish"]["steps"] if "secrets." in str(step)]
    used = [(step.get("uses", "").partition("@")[0], step.get("with", {})) for step in jobs["attest"]["steps"]]
    (signed,) = [given for action, given in used if action == "actions/attest-build-provenance"]
    assert signed["subject-path"] == "release/*"  # SHA256SUMS and the bills of materials among it


def test_every_distribution_is_published_from_an_environment_of_its_own():
    """An index that knows none of them yet lets only one wait for the same repository, workflow and environment."""
    job = JOBS["release.yml: publish"]
    projects = job["strategy"]["matrix"]["project"]
    assert projects[0] == "core"  # the others ask for it
    assert sorted(f"diffmax-{project}" for project in projects) == sorted(
        path.parent.name for path in ROOT.glob("diffmax-*/pyproject.toml")
    )
    assert job["environment"] == "pypi-${{ matrix.project }}"
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"`pypi-{project}`" in page for project in projects)


def test_the_pages_are_opened_in_a_browser_before_they_are_published():
    build = WORKFLOWS["docs.yml"]["jobs"]["build"]["steps"]
    commands = [step.get("run", "") for step in build]
    uploads = [step.get("uses", "").startswith("actions/upload-pages-artifact@") for step in build]
    (browser,) = [place for place, command in enumerate(commands) if ".ci/browser.py" in command]
    assert commands.index("make docs") < browser < uploads.index(True)
    assert re.search(r"pip install --quiet playwright==\d+\.\d+\.\d+\n.*playwright install .*chromium\n", commands[browser])
    assert "if" not in build[browser]
    assert WORKFLOWS["docs.yml"]["jobs"]["deploy"]["needs"] == "build"


def test_hooks_run_tools_of_the_pinned_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    assert {entry.split()[0] for entry in entries} == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/check-jsonschema"}
    assert {"ruff", "mypy", "check-jsonschema"} <= PINS.keys()


def test_addresses_are_those_of_the_metadata():
    found = {
        link
        for path in [*GITHUB.rglob("*.yml"), *GITHUB.rglob("*.md"), ROOT / "pyproject.toml"]
        for link in re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", path.read_text(encoding="utf-8"))
    }
    assert found == {CORE["urls"]["Repository"]}


def test_make_floor_can_import_what_it_collects():
    """tests/model_types.py imports transformers, and was collected for its docstrings where `make floor` has none."""
    recipe = re.search(r"^floor:\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    named = re.findall(r"\b(pytest|hypothesis|scipy|mpmath|matplotlib|entmax|numpy)\b", recipe)
    installed = {*named, "torch", "numba", "diffmax", "tests"}
    conftest = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    ignored = next(
        ast.literal_eval(node.value)
        for node in conftest.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "collect_ignore"
    )
    helpers = [path for path in sorted((ROOT / "tests").glob("*.py")) if not path.name.startswith(("test_", "triton_"))]
    beside = {path.stem for path in helpers}
    asked = {
        path.name: sorted(imported(path) - installed - beside - sys.stdlib_module_names)
        for path in helpers
        if path.name not in ignored
    }
    assert not {name: modules for name, modules in asked.items() if modules}


def imported(path):
    """The top packages that a file imports when it is imported itself."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    named = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in body if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in named}
