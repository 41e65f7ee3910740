# SPDX-License-Identifier: Apache-2.0
"""The wheels of the six packages: which package needs which, and building them into one folder when their sources changed.

Sessions install these files by path, never by name: `modellink-*` is not looked up on a package index, and the tests use what a
user would install. Not here: publishing.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PACKAGES = ("kernels", "ckpt-convert", "data-prep", "core", "infer", "eval")
_OURS = re.compile(r"modellink-([a-z-]+?)(?:\[([a-z,]+)\])?(?=[>=<!~;\s]|$)")
# The files that affect a wheel; a changed test does not rebuild it.
_INPUTS = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "src")


def project(root: Path, package: str) -> dict[str, Any]:
    with (root / "packages" / package / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_needs(root: Path, package: str) -> list[str]:
    """The requirements in the package's dependency group `test`."""
    return list(project(root, package)["dependency-groups"]["test"])


def closure(root: Path, package: str, extras: tuple[str, ...] = ()) -> list[str]:
    """The package and every sibling it declares, directly or through another, in the order of PACKAGES."""
    found: set[str] = set()
    todo = [(package, extras)]
    while todo:
        name, wanted = todo.pop()
        found.add(name)
        table = project(root, name)["project"]
        lines = list(table["dependencies"])
        for extra in wanted:
            lines += table["optional-dependencies"][extra]
        for line in lines:
            if match := _OURS.match(line):
                more = (match[1], tuple((match[2] or "").split(",")) if match[2] else ())
                if match[1] not in found or more[1]:
                    todo.append(more)
    return [name for name in PACKAGES if name in found]


def fingerprint(folder: Path) -> str:
    """A digest over names and bytes of everything that goes into the wheel."""
    digest = hashlib.sha256()
    for part in _INPUTS:
        top = folder / part
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def wheel(root: Path, package: str) -> Path:
    """The package's wheel in `.nox/wheels`, built again if its sources are not those it was built from."""
    folder, target = root / "packages" / package, root / ".nox" / "wheels"
    target.mkdir(parents=True, exist_ok=True)
    stamp, digest = target / f"{package}.sha256", fingerprint(folder)
    old = sorted(target.glob(f"modellink_{package.replace('-', '_')}-*.whl"))
    if len(old) == 1 and stamp.exists() and stamp.read_text() == digest:
        return old[0]
    for path in old:
        path.unlink()
    with tempfile.TemporaryDirectory(dir=target) as fresh:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", fresh, str(folder)]
        subprocess.run(command, check=True, cwd=root)
        (built,) = Path(fresh).glob("*.whl")
        result = Path(shutil.move(built, target / built.name))
    stamp.write_text(digest)
    return result


def wheels(root: Path, package: str, extras: tuple[str, ...] = ()) -> list[str]:
    """Paths of the package's wheel (with `[extras]`) and of those of the siblings it declares: arguments for pip install."""
    suffix = f"[{','.join(extras)}]" if extras else ""
    return [f"{wheel(root, name)}{suffix if name == package else ''}" for name in closure(root, package, extras)]
