# SPDX-License-Identifier: Apache-2.0
"""Each package installs on its own: its wheel, in a fresh environment, and every module of it imports there.

kernels, data-prep and eval are installed as by a user, with pip resolving their dependencies; the environments of
data-prep and eval must not contain torch. For ckpt-convert, core and infer a second copy of torch would cost minutes and
gigabytes, so their environment gets symbolic links to the third-party packages of the test environment, only to those
that the package declares, directly or indirectly; an undeclared dependency is an ImportError here too. (The session
`tests-<package>` installs them with pip.)

Needs the wheels that `nox -s e2e` builds, and names them by path, so no index is asked for `modellink-*`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = {
    "kernels": [],
    "data-prep": ["kernels"],
    "eval": ["kernels", "data-prep"],
    "ckpt-convert": ["kernels"],
    "core": ["kernels", "ckpt-convert"],
    "infer": ["kernels", "ckpt-convert", "data-prep", "core"],
}
LIGHT = ("kernels", "data-prep", "eval")
WHEELS = os.environ.get("MODELLINK_WHEELS")
pytestmark = pytest.mark.skipif(WHEELS is None, reason="the wheels are built by `nox -s e2e`")

# Imports every module of a package, except ops/ and device.py without torch (extra `torch`), and the web application of infer
# without fastapi (extra `server`).
IMPORT_ALL = """
import importlib, importlib.util, json, pathlib, sys
top = importlib.import_module(sys.argv[1])
folder = pathlib.Path(top.__file__).parent
assert "site-packages" in folder.parts, folder
torch = importlib.util.find_spec("torch") is not None
extras = () if torch else ("modellink.kernels.ops", "modellink.kernels.device")
web = tuple(f"modellink.infer.server.{name}" for name in ("app", "front", "http", "replicas"))
extras += () if importlib.util.find_spec("fastapi") else web
names = []
for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).with_suffix("").parts
    name = ".".join([top.__name__, *(part for part in parts if part != "__init__")])
    if parts[-1] != "__main__" and not (extras and name.startswith(extras)):
        importlib.import_module(name)
        names.append(name)
print(json.dumps({"names": names, "torch": torch, "loaded": "torch" in sys.modules}))
"""


def wheel(package: str) -> str:
    (path,) = Path(str(WHEELS)).glob(f"modellink_{package.replace('-', '_')}-*.whl")
    return str(path)


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(folder: Path) -> Path:
    """The interpreter of a new, empty environment."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip(python: Path, *args: str) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", *args)


def import_all(python: Path, package: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(run(python, "-I", "-c", IMPORT_ALL, f"modellink.{package.replace('-', '_')}"))
    return found


def needed(package: str) -> dict[str, Distribution]:
    """Installed third-party distributions that the package declares, directly or through another, extras included."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [Requirement(f"modellink-{package}")]
    while todo:
        wanted = todo.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        dist = distribution(name)
        if not name.startswith("modellink-"):
            found[name] = dist
        for extra in {"", *wanted.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                lines = [Requirement(line) for line in dist.requires or ()]
                todo += [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    return found


def link(dists: dict[str, Distribution], folder: Path) -> None:
    """Link the top-level files and folders of installed distributions into `folder`."""
    for dist in dists.values():
        for top in {path.parts[0] for path in dist.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(dist.locate_file(top))))


@pytest.mark.parametrize("package", LIGHT)
def test_installs_alone(package: str, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    pip(python, *(wheel(name) for name in [*SIBLINGS[package], package]))
    found = import_all(python, package)
    assert found["torch"] is False, f"the environment of modellink-{package} contains torch"
    installed = {line.split("==")[0] for line in run(python, "-m", "pip", "list", "--format=freeze").split()}
    assert "torch" not in installed
    ours = {f"modellink-{name}" for name in [*SIBLINGS[package], package]}
    assert {name for name in installed if name.startswith("modellink")} == ours


@pytest.mark.parametrize("package", [name for name in SIBLINGS if name not in LIGHT])
def test_imports_with_what_it_declares(package: str, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    pip(python, "--no-deps", *(wheel(name) for name in [*SIBLINGS[package], package]))
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    link(needed(package), site)
    import_all(python, package)
    run(python, "-m", "pip", "check")


@pytest.mark.parametrize("package", ["data-prep", "eval"])
def test_torch_beside_it_is_not_imported(package: str) -> None:
    """Where torch is installed as well, as here, importing every module still does not load it."""
    found = import_all(Path(sys.executable), package)
    assert found["torch"] is True
    assert found["loaded"] is False, f"importing modellink-{package} loads torch"


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_are_what_the_wheel_declares(package: str) -> None:
    declared, todo = set(), [package]
    while todo:
        for line in distribution(f"modellink-{todo.pop()}").requires or ():
            need = Requirement(line)
            if need.name.startswith("modellink-") and (need.marker is None or need.marker.evaluate({"extra": ""})):
                declared.add(need.name.removeprefix("modellink-"))
                todo.append(need.name.removeprefix("modellink-"))
    assert declared == set(SIBLINGS[package])


def test_one_package_is_upgraded_alone(tmp_path: Path) -> None:
    """A newer kernels replaces the old one; data-prep and eval are unchanged and still import."""
    python = environment(tmp_path / "env")
    pip(python, *(wheel(name) for name in [*SIBLINGS["eval"], "eval"]))
    before = versions(python)
    newer = tmp_path / "kernels"
    shutil.copytree(ROOT / "packages" / "kernels", newer, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    init = newer / "src" / "modellink" / "kernels" / "__init__.py"
    init.write_text(re.sub(r'__version__ = "[^"]+"', '__version__ = "0.99.0"', init.read_text("utf-8")), "utf-8")
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, newer)
    (built,) = tmp_path.glob("modellink_kernels-0.99.0-*.whl")
    pip(python, "--upgrade", str(built))
    assert versions(python) == {**before, "modellink-kernels": "0.99.0"}
    for package in (*SIBLINGS["eval"], "eval"):
        import_all(python, package)


def versions(python: Path) -> dict[str, str]:
    """Name and version of everything installed."""
    return {item["name"]: item["version"] for item in json.loads(run(python, "-m", "pip", "list", "--format=json"))}
