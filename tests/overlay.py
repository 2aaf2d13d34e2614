"""Real distributions for tests: a package, its metadata and its entry points in a folder that goes on PYTHONPATH."""

import json
from pathlib import Path

from tests import fresh

BACKEND = """
from diffmax.plugin import Backend, hookimpl
import torch

class Plugin:
    @hookimpl
    def diffmax_backends(self):
        return [Backend(**{{**dict(
            name={name!r}, device_types=("cpu",), automatic=False, dtypes=(torch.float32,),
            kernels={{"bisect": "diffmax.reference:bisect", "bisect_backward": "diffmax.reference:bisect_backward"}},
        ), **dict({fields})}})]

plugin = Plugin()
"""


def add_plugin(folder, name, code=None, *, fields="", distribution=None, value=None, requires=(), version="1.0", init=""):
    """A distribution `plug-<name>` whose entry point `name` leads to `plug_<name>._plugin:plugin`, made of `code`."""
    distribution = distribution or f"plug-{name}"
    package = Path(folder) / f"plug_{name}"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(init)
    (package / "_plugin.py").write_text(BACKEND.format(name=name, fields=fields) if code is None else code)
    metadata = Path(folder) / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {distribution}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    (metadata / "entry_points.txt").write_text(f"[diffmax.backends]\n{name} = {value or f'plug_{name}._plugin:plugin'}\n")


def run(code, *folders, check=True, **environment):
    """Run Python code in a process that sees the folders' distributions; return what it prints, parsed if it is JSON."""
    result = fresh.python(code, *folders, check=check, **environment)
    if not check:
        return result
    try:
        return json.loads(result.stdout)
    except json.JSONDecodeError:
        return result.stdout.strip()
