# SPDX-License-Identifier: Apache-2.0
"""Rules of the repository: file sizes, complete package folders, and names that must not occur.

Not covered: style within a file (ruff) and types (mypy), which have sessions of their own.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from phrases import findings  # noqa: E402

PACKAGES = ("kernels", "ckpt-convert", "data-prep", "core", "infer", "eval")
FOLDERS = ("packages", "tests", "tools", "examples", "benchmarks", "docs", ".ci", ".github")
MAX_LINES = 600
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".html", ".js", ".css", ".cfg", ".sh", ""}

# Written in pieces so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": re.compile("|".join((r"/wor" + r"k/", r"/tm" + r"p/[a-z]", r"/roo" + r"t/", r"/hom" + r"e/[a-z]"))),
    "a package index": re.compile("|".join((r"\bpyp" + r"i\.org", r"load\.pytor" + r"ch\.org", r"files\.python" + r"hosted"))),
}


def files() -> Iterator[Path]:
    """Yield the files of the repository, without build and tool output."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and not {"__pycache__", "dist", "build", ".pytest_cache", ".hypothesis"} & set(path.parts):
                yield path


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_hand_written_file_is_too_long() -> None:
    lengths = {relative(path): path.read_text("utf-8").count("\n") for path in files() if path.suffix == ".py"}
    assert len(lengths) > 10
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_notes_are_printed_by_one_function() -> None:
    """`kernels.messages.note` prints them once for all ranks; `modellink-train models show` prints notes about a preset."""
    allowed = {"packages/kernels/src/modellink/kernels/messages.py", "packages/core/src/modellink/core/models.py"}
    prints = re.compile(r'print\(\s*f?"note\b')
    found = {relative(path) for path in ROOT.glob("packages/*/src/**/*.py") if prints.search(path.read_text("utf-8"))}
    assert found == allowed


def test_modellink_is_a_namespace() -> None:
    assert not [relative(path) for path in ROOT.glob("packages/*/src/modellink/*.py")]


def test_the_packages_are_these() -> None:
    assert {path.name for path in (ROOT / "packages").iterdir() if path.is_dir()} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_folder_is_complete(package: str) -> None:
    folder = ROOT / "packages" / package
    source = folder / "src" / "modellink" / package.replace("-", "_")
    for path in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        assert (folder / path).is_file(), f"{package}: no {path}"
    assert (source / "__init__.py").is_file() and (source / "py.typed").is_file()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes(), "a package's license is a copy of the root's"
    assert [path.name for path in (folder / "src" / "modellink").iterdir() if path.name != "__pycache__"] == [source.name]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_follows_the_metadata_rules(package: str) -> None:
    table = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))
    project = table["project"]
    assert (project["name"], project["license"], project["dynamic"]) == (
        f"modellink-{package}", "Apache-2.0", ["readme", "urls", "version"])
    assert len(project["scripts"]) == 1
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    for line in [*project["dependencies"], *extras]:
        if line != "megatron-core==0.16.1":
            assert re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?>=[0-9.]+", line), f"{line}: lower bounds only"


def test_every_dependency_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    tested = {name(line) for line in lines if line and not line.startswith("#")}
    for package in PACKAGES:
        table = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))
        wanted = [*table["project"]["dependencies"], *table["dependency-groups"]["test"]]
        missing = {name(line) for line in wanted} - tested - {f"modellink-{other}" for other in PACKAGES}
        assert not missing, f"constraints.txt lacks {sorted(missing)}, which {package} needs"


def test_the_hooks_before_a_commit_use_the_tested_ruff() -> None:
    pinned = re.findall(r"^ruff==\S+", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    assert [need for hook in hooks for need in hook.get("additional_dependencies", ())] == pinned


def name(requirement: str) -> str:
    return re.split(r"[\[>=<!~; ]", requirement)[0].lower().replace("_", "-")


def test_core_names_no_family() -> None:
    """A family is one file in ckpt-convert; core reads only ModelSpec. Only presets and flags of the original may
    contain names of families."""
    families = ROOT / "packages/ckpt-convert/src/modellink/ckpt_convert/families"
    names = [path.stem for path in families.glob("*.py") if not path.stem.startswith("_")]
    assert names
    pattern = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, names))})", re.IGNORECASE)
    source = ROOT / "packages/core/src/modellink/core"
    found = []
    for path in sorted(source.rglob("*")):
        outside = {"presets", "original_flags.yaml", "__pycache__"} & set(path.relative_to(source).parts)
        if path.suffix in TEXT and path.is_file() and not outside:
            found += [f"{relative(path)}:{line}: {m[0]}" for line, m in matches(path, pattern)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    found = []
    for path in files():
        if path.suffix in TEXT:
            found += [f"{relative(path)}:{line}: {m[0]}" for line, m in matches(path, FORBIDDEN[what])]
    assert not found, f"{what}:\n" + "\n".join(found)


def matches(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, re.Match[str]]]:
    """Yield (line number, match) for every line of a text file that matches `pattern`."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if match := pattern.search(line):
            yield number, match


def test_the_table_of_models_is_complete() -> None:
    """`python tools/models_table.py` makes it from test outcomes; it must have a line per preset and no open cell."""
    text = (ROOT / "packages/core/README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- models -->")[2].partition("<!-- end of models -->")[0].strip().splitlines()[2:]
    names = [line.split(" | ")[0].removeprefix("| ") for line in table]
    presets = [name for path in sorted((ROOT / "packages/core/src/modellink/core/presets").glob("*.yaml"))
               for name in yaml.safe_load(path.read_text(encoding="utf-8"))["presets"]]
    assert sorted(names) == sorted(presets)
    assert not re.findall(r"FAILED|no test|none alike", "\n".join(table))


def test_dialect_is_found_across_lines_and_in_names(tmp_path: Path) -> None:
    """Written in pieces so that this file does not match itself."""
    path = tmp_path / "module.py"
    path.write_text('A = option("Width; where noth' 'ing "\n           "is sa' 'id.")\n# It starts\n# an' 'ew.\n'
                    'def tokeni' 'se(): "Return the ids of a text."\n')
    assert [(found.line, found.words) for found in findings(path)] == [
        (1, "where noth" "ing is"), (2, "is sa" "id"), (4, "an" "ew"), (5, "tokeni" "se")]
    path.write_text("def tokenize():\n    'Return the ids of a text. Default: the text column, a whole sample.'\n")
    assert list(findings(path)) == []
