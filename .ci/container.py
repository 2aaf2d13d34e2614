"""The Dockerfile without a container engine: its steps in order in a root of its own, then what an engine would start.

The root is this machine's, under an overlay that takes what is written, with this Python at /usr/local in place of the base
image's. Afterwards it is read-only, has no network, and the image's user runs .ci/container_check.py on it. Needs root and
Linux. `make container` runs it; with an engine, `docker build` and `docker run --read-only` do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ("PIP_", "UV_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


class ContainerError(Exception):
    """A step failed, or the Dockerfile has what is not understood here."""


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, lines that go on put together."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n?", "", text, flags=re.MULTILINE)).splitlines()
    found = [line.strip().partition(" ") for line in lines if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


@dataclass
class Image:
    """What has been built so far."""

    root: Path
    context: Path
    arguments: dict[str, str]
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    declared: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def step(self, name: str, rest: str) -> None:
        """Do what one instruction says."""
        print(f"{name} {rest}", flush=True)
        if name == "FROM":
            print(f"  (this machine's root, Python {sys.version.split()[0]})", flush=True)
        elif name == "ARG":
            key, _, default = rest.partition("=")
            self.declared[key] = self.arguments.get(key, "".join(shlex.split(default)))
        elif name == "ENV":
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                self.environment[key] = re.sub(r"\$(\w+)", lambda match: self.environment[match[1]], value)
        elif name == "COPY":
            self.copy(*rest.split())
        elif name == "RUN":
            self.run(["/bin/sh", "-c", rest], self.declared | network())
        elif name == "USER":
            self.user = rest
        elif name == "WORKDIR":
            self.folder = rest
        elif name == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif name == "CMD":
            self.command = json.loads(rest)
        else:
            raise ContainerError(f"the Dockerfile has {name}, which .ci/container.py does not know: add it there")

    def copy(self, source: str, target: str) -> None:
        """From the context, as far as .dockerignore lets it through."""
        if f"!{source}" not in (self.context / ".dockerignore").read_text(encoding="utf-8").splitlines():
            raise ContainerError(f"COPY {source}: .dockerignore hides it")
        path, place = self.context / source, self.root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, place)

    def run(self, command: list[str], more: dict[str, str] | None = None, prefix: tuple[str, ...] = ()) -> None:
        """In the root, as the user, with the image's environment."""
        uid, _, gid = self.user.partition(":")
        inside = [
            tool("chroot"),
            f"--userspec={uid}:{gid}",
            "--groups=",
            str(self.root),
            "/bin/sh",
            "-c",
            'cd "$0" && exec "$@"',
            self.folder,
        ]
        done = subprocess.run([*prefix, *inside, *command], env=self.environment | (more or {}), check=False)
        if done.returncode:
            raise ContainerError(f"`{shlex.join(command)}` failed with status {done.returncode}")


def network() -> dict[str, str]:
    """What this machine's clients of the index are told."""
    return {"HOME": "/root"} | {key: value for key, value in os.environ.items() if key.startswith(NETWORK)}


def tool(name: str) -> str:
    """Where it is on this machine."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise ContainerError(f"{name} is not installed; it comes with util-linux or coreutils")
    return found


def mount(*arguments: str) -> None:
    """Or say that it takes root."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContainerError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def build(root: Path, scratch: Path, arguments: dict[str, str]) -> Image:
    """Every instruction, in a root that is this machine's with what they write over it."""
    for name in ("upper", "work"):
        (scratch / name).mkdir()
    mount("-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work", str(root))
    mount("--bind", "-o", "ro", sys.base_prefix, str(root / "usr" / "local"))
    mount("-t", "tmpfs", "tmpfs", str(root / "tmp"), "-o", "mode=1777")
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("--rbind", "/dev", str(root / "dev"))
    image = Image(root, ROOT, arguments)
    for name, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        image.step(name, rest)
    return image


def check(image: Image) -> None:
    """As an engine runs it with --read-only --network none: with a folder for temporary files, and without."""
    mount("-o", "remount,ro", str(image.root))
    alone = (tool("unshare"), "--net")
    program = [*image.entry, "python", "/opt/diffmax/check.py"]
    print("\nread-only, no network, a tmpfs at /tmp:", flush=True)
    image.run([*program, "--kept"], prefix=alone)
    print("\nread-only, no network, nothing to write to, another user:", flush=True)
    image.user = "12345:12345"
    mount("-o", "remount,ro", str(image.root / "tmp"))
    image.run(program, prefix=alone)


def main() -> int:
    """In namespaces of its own, so that every mount ends with the process; 1 if a step failed."""
    if os.getuid() != 0 or sys.platform != "linux":
        print("container: needs root on Linux for mounts and chroot; with an engine: docker build .", file=sys.stderr)
        return 2
    if "--inside" not in sys.argv:
        with tempfile.TemporaryDirectory(prefix="diffmax-container-") as scratch:
            command = [
                tool("unshare"),
                "--mount",
                "--pid",
                "--fork",
                sys.executable,
                __file__,
                "--inside",
                scratch,
                *sys.argv[1:],
            ]
            return subprocess.run(command, check=False).returncode
    scratch = Path(sys.argv[2])
    (scratch / "root").mkdir()
    try:
        check(build(scratch / "root", scratch, dict(pair.split("=", 1) for pair in sys.argv[3:])))
    except ContainerError as error:
        print(f"\ncontainer: {error}", file=sys.stderr)
        return 1
    print("\nthe image does what it should")
    return 0


if __name__ == "__main__":
    sys.exit(main())
