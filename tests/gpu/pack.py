# SPDX-License-Identifier: Apache-2.0
"""Collects wheels for a machine without a network, and makes an environment there with them and its torch.

Carried are our six packages, megatron-core, safetensors, and what our packages declare. Not carried: torch
and what only torch needs, and pyarrow, which is large and only imported to read tables. Imports nothing that
a bare machine may lack.
"""

from __future__ import annotations

import importlib.metadata
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNUSED = {"pyarrow"}  # by the rows; large
LEFT_OUT = {"torch"} | UNUSED
WITHOUT_NEEDS = {"megatron-core", "tokenizers"}
"""Installed without what they require: torch, and a client for downloads that we do not call."""
MORE = ("safetensors",)  # the rows write weights with it
LIMIT = 56 * 2**20  # bytes; a machine may accept 64 MiB together with the repository
GLIBC = range(5, 29)  # minor versions of glibc 2 for which a wheel may be built


class PackError(Exception):
    """The wheels cannot be collected or installed; the message says what to do."""


def requirements() -> list[str]:
    """Return the names of third-party distributions that our packages declare and that are carried."""
    sys.path.append(str(ROOT / "tools"))
    from wheels import PACKAGES, project

    lines = [line for package in PACKAGES for line in project(ROOT, package)["project"]["dependencies"]]
    found = {re.split(r"[\[<>=!~;\s]", line, maxsplit=1)[0] for line in lines}
    return sorted({name for name in found if not name.startswith("modellink-")} - LEFT_OUT | set(MORE))


def pack(folder: Path, python: str) -> list[Path]:
    """Collect the wheels for a Python version such as "3.12" on Linux x86-64, and return them.

    Raises:
        PackError: a wheel is missing, or they are too large.
    """
    sys.path.append(str(ROOT / "tools"))
    from wheels import PACKAGES, wheel

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    names = requirements()
    _download(folder, python, [name for name in names if name not in WITHOUT_NEEDS])
    _download(folder, python, [name for name in names if name in WITHOUT_NEEDS], "--no-deps")
    for package in PACKAGES:
        built = wheel(ROOT, package)
        (folder / built.name).write_bytes(built.read_bytes())
    files = sorted(folder.glob("*.whl"))
    if (size := sum(path.stat().st_size for path in files)) > LIMIT:
        raise PackError(f"the wheels take {size / 2**20:.0f} MiB, at most {LIMIT / 2**20:.0f} can be "
                        "carried: add the largest one to LEFT_OUT in pack.py")
    return files


def _download(folder: Path, python: str, names: list[str], *options: str) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder),
               "--constraint", str(ROOT / "constraints.txt"), "--only-binary=:all:",
               "--implementation=cp", f"--python-version={python}", "--platform=manylinux2014_x86_64",
               "--platform=manylinux1_x86_64", *platforms, *options, *names]
    if subprocess.run(command).returncode:
        raise PackError(f"no wheels of {', '.join(names)} for Python {python}")


def name_of(wheel: Path) -> str:
    """Return the normalized distribution name of a wheel file."""
    return wheel.name.split("-")[0].lower().replace("_", "-")


def missing(wheels: list[Path]) -> list[Path]:
    """Return the wheels to install: ours, megatron-core, and those that this interpreter cannot import."""
    installed = {re.sub(r"[-_.]+", "-", name).lower() for dist in importlib.metadata.distributions()
                 if (name := dist.metadata["Name"])}
    always = ("modellink-", "megatron-")
    return [path for path in wheels
            if name_of(path).startswith(always) or name_of(path) not in installed]


def environment(wheels: Path, folder: Path) -> Path:
    """Create a virtual environment with the missing wheels and everything that this interpreter can import.

    `venv --system-site-packages` shows the packages of the base interpreter, not those of a virtual
    environment that this interpreter belongs to, so its folders are added by a .pth file.

    Returns:
        The interpreter of the environment.

    Raises:
        PackError: the wheels are missing or do not fit this interpreter.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise PackError(f"{wheels} has no wheels: fill it with --pack")
    venv.EnvBuilder(symlinks=True).create(folder)
    (target,) = folder.glob("lib/python*/site-packages")
    here = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir()]
    (target / "found.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in here))
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index",
               "--no-deps", "--no-compile", "--disable-pip-version-check", *map(str, missing(files))]
    if subprocess.run(command).returncode:
        version = ".".join(map(str, sys.version_info[:2]))
        raise PackError(f"the wheels in {wheels} could not be installed with Python {version}: if they are "
                        f"for another version, pack them with --python {version}")
    return python
