# SPDX-License-Identifier: Apache-2.0
"""Checks that one package could be published: `python tools/release.py kernels`. Run by `nox -s release-<package>`.

The source archive is built first, and the wheel from the unpacked archive, so a file missing from the archive is found.
Checked: version and date in the changelog, complete metadata, a README that renders and has no relative links, the license
file, py.typed, no stray files in either. A repository whose address is not set (see hatch_build.py) is noted, because the wheel
then has no project URLs. Nothing is uploaded.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from links import links  # noqa: E402

SOURCE_FILES = {"PKG-INFO", "pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"}
STRAY = re.compile(r"(^|/)(__pycache__|\.[^/]+|[^/]+\.(pyc|orig|rej|tmp|log))(/|$)")
REQUIRED = ("Name", "Version", "Summary", "Requires-Python", "License-Expression", "License-File", "Description-Content-Type")


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def build(folder: Path, out: Path) -> tuple[Path, Path]:
    """(source archive, wheel made from it)."""
    run("hatchling", "build", "-t", "sdist", "-d", str(out), cwd=folder)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out)  # an archive we built
    run("hatchling", "build", "-t", "wheel", "-d", str(out), cwd=out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def check_metadata(package: str, meta: Message) -> list[str]:
    problems = [f"metadata: no {field}" for field in REQUIRED if not meta.get(field)]
    if meta["Name"] != f"modellink-{package}":
        problems.append(f"metadata: the name is {meta['Name']}")
    if not any(value.startswith("Programming Language :: Python :: 3.") for value in meta.get_all("Classifier") or []):
        problems.append("metadata: no classifier names a Python version")
    readme = str(meta.get_payload())
    if len(readme) < 200:
        problems.append("README.md: too short to be the description of a package")
    problems += [f"metadata: line {link.line} of the README has the relative link {link.target}"
                 for link in links(readme) if not link.is_absolute]
    changelog = (ROOT / "packages" / package / "CHANGELOG.md").read_text("utf-8")
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    if released[:1] != [meta["Version"]]:
        problems.append(f"CHANGELOG.md: the newest version with a date is {released[:1]}, the package has {meta['Version']}")
    return problems


def check_files(package: str, sdist: Path, wheel: Path) -> list[str]:
    module = f"modellink/{package.replace('-', '_')}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        members = [str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()]
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    problems = [f"wheel: no {need}" for need in (f"{module}/py.typed", f"{info}/licenses/LICENSE") if need not in names]
    problems += [f"wheel: stray file {name}" for name in names if not name.startswith((f"{module}/", f"{info}/"))]
    problems += [f"wheel: stray file {name}" for name in names if STRAY.search(name)]
    source = ROOT / "packages" / package / "src"
    sources = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    expected = {name for name in sources if not STRAY.search(name)}
    problems += [f"wheel: {name} is in src and was left out" for name in sorted(expected - names)]
    for name in members:
        known = name in SOURCE_FILES or name.startswith(("src/", "tests/", "docs/", "examples/", "attacks/"))
        if not known or (name != ".gitignore" and STRAY.search(name)):
            problems.append(f"source archive: stray file {name}")
    return problems


def check(package: str) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        sdist, wheel = build(ROOT / "packages" / package, Path(temporary))
        run("twine", "check", "--strict", str(sdist), str(wheel), cwd=ROOT)  # renders the README as a package index does
        with zipfile.ZipFile(wheel) as archive:
            (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            meta = message_from_string(archive.read(metadata).decode("utf-8"))
        if not meta.get("Project-URL"):
            print("note: the repository's address is not set: the wheel has no project URLs, and its README no links to files")
        return check_metadata(package, meta) + check_files(package, sdist, wheel)


if __name__ == "__main__":
    found = check(sys.argv[1])
    print("\n".join(found) or f"modellink-{sys.argv[1]}: ready to release")
    raise SystemExit(1 if found else 0)
