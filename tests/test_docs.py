# SPDX-License-Identifier: Apache-2.0
"""Documents name what exists: files, functions, options and links; the picture of the packages is that of their imports.

A code span in docs/en/architecture.md is a path, `path.py: name, Class.method`, an option, or a file that a command writes, which
begins with a capitalized placeholder. Links are checked in all Markdown files, and for package READMEs also in the metadata that
their builds make. Not covered: commands and Python blocks of the READMEs (test_readme.py).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import house  # noqa: E402
from links import anchors, broken, links, markdown_files  # noqa: E402

PACKAGES = ("kernels", "ckpt-convert", "data-prep", "core", "infer", "eval")
ARCHITECTURE = ROOT / "docs/en/architecture.md"
SOURCES = [ROOT, *sorted(ROOT.glob("packages/*/src/modellink"))]
SPAN = re.compile(r"`([^`]+)`")
REFERENCE = re.compile(r"(?P<path>[\w./*-]+)(?:: (?P<names>[\w., ]+))?")
ADDRESS = "https://forge.example/group/modellink"


def find(path: str) -> Path | None:
    """Return the file or folder of a path in the repository, or in one of the packages' source folders."""
    places = [found for source in SOURCES for found in source.glob(path.rstrip("/"))]
    return places[0] if places else None


@cache
def defined(path: Path) -> frozenset[str]:
    """Return the functions, classes, methods and constants of a module: `name` or `Class.name`."""
    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + node.name
            elif isinstance(node, ast.ClassDef):
                yield prefix + node.name
                yield from names(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
    return frozenset(names(ast.parse(path.read_text("utf-8")).body))


def problems(text: str) -> Iterator[str]:
    """Yield what is wrong with the code spans of a text."""
    options = "\n".join(path.read_text("utf-8") for path in ROOT.glob("packages/*/README.md"))
    for span in (" ".join(found.split()) for found in SPAN.findall(text)):
        match = REFERENCE.fullmatch(span)
        if span.startswith("--"):
            if not re.search(rf"`{span}\b", options):
                yield f"{span}: no README has this option"
        elif re.match(r"[A-Z]{2,}", span):
            continue
        elif match is None or (path := find(match["path"])) is None:
            yield f"{span}: no such file"
        elif match["names"]:
            missing = set(match["names"].split(", ")) - defined(path)
            yield from (f"{match['path']}: no {name} in it" for name in sorted(missing))


def test_files_and_functions_of_the_architecture_exist() -> None:
    text = ARCHITECTURE.read_text("utf-8")
    assert len(SPAN.findall(text)) > 100
    assert list(problems(text)) == []


def test_files_of_the_security_policy_exist() -> None:
    named = [span for span in SPAN.findall((ROOT / "SECURITY.md").read_text("utf-8")) if "/" in span]
    assert len(named) > 10
    assert not [span for span in named if find(span) is None]


@pytest.mark.parametrize(("text", "message"), [
    ("`core/train/lop.py`", "core/train/lop.py: no such file"),
    ("`core/train/loop.py: Loop.iterate,\nLoop.itrate`", "core/train/loop.py: no Loop.itrate in it"),
    ("`iterate()`", "iterate(): no such file"),
    ("`--no-such-option`", "--no-such-option: no README has this option"),
])
def test_a_name_that_does_not_exist_is_found(text: str, message: str) -> None:
    assert list(problems(text)) == [message]


def test_the_lives_have_eight_steps_each() -> None:
    sections = re.split(r"^## The life of ", ARCHITECTURE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections] == [
        "a weight", "a document", "a training step", "a request", "an evaluation question"]
    for section in sections:
        assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("12345678")


def test_the_picture_shows_the_imports() -> None:
    assert house.TARGET.read_text("utf-8") == house.draw(), "run python tools/house.py"


def test_links_of_all_documents_lead_somewhere() -> None:
    files = markdown_files()
    assert len(files) > 20
    found = [problem for path in files for problem in broken(path)]
    assert not found, "\n" + "\n".join(found)


def test_links_of_all_kinds_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `x`: two\n# One x two\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text('[a](missing.md) and ![b](other.md#nowhere "title")\n\n[c]: gone.md\n<a href="lost.md">d</a>\n'
                    "`[e](code.md)` and\n```\n[f](code.md)\n```\n[g](../outside.md) [h](https://x.example/y) [i](#page)\n"
                    "[j](other.md#one-x-two) [k](other.md#one-x-two-1) [l](#heading)\n# Heading\n")
    assert list(broken(page, tmp_path)) == [
        "page.md:1: missing.md: no such file", "page.md:1: other.md#nowhere: no such heading",
        "page.md:3: gone.md: no such file", "page.md:4: lost.md: no such file",
        "page.md:9: ../outside.md: outside of the repository", "page.md:9: #page: no such heading"]
    assert anchors(tmp_path / "other.md") == {"one-x-two", "one-x-two-1"}


def metadata(package: str) -> tuple[str, dict[str, str]]:
    """Return README and URLs of a package as its build makes them."""
    core = pytest.importorskip("hatchling.metadata.core", reason="hatchling is not installed")
    from hatchling.plugin.manager import PluginManager
    found = core.ProjectMetadata(str(ROOT / "packages" / package), PluginManager()).core
    return found.readme, found.urls


@pytest.mark.parametrize("package", PACKAGES)
def test_links_work_on_a_package_index(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index shows the README alone: its links are absolute, and lead to the files that the relative ones lead to."""
    monkeypatch.setenv("MODELLINK_REPOSITORY", ADDRESS + "/")
    source = ROOT / "packages" / package / "README.md"
    readme, urls = metadata(package)
    before = [link for link in links(source.read_text("utf-8")) if not link.is_absolute]
    after = [link for link in links(readme) if link.target.startswith(ADDRESS)]
    assert [link.line for link in after] == [link.line for link in before]
    assert all(link.is_absolute for link in links(readme))
    for link in after:
        path, _, anchor = link.target.removeprefix(f"{ADDRESS}/blob/HEAD/").partition("#")
        target = ROOT / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target / "README.md" if target.is_dir() else target), link
    assert urls == {"Repository": ADDRESS, "Issues": f"{ADDRESS}/issues",
                    "Changelog": f"{ADDRESS}/blob/HEAD/packages/{package}/CHANGELOG.md"}


@pytest.mark.parametrize("package", PACKAGES)
def test_without_an_address_links_become_text(package: str) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    found = importlib.util.spec_from_file_location("hatch_build", ROOT / "packages" / package / "hatch_build.py")
    assert found is not None and found.loader is not None
    hook = importlib.util.module_from_spec(found)
    found.loader.exec_module(hook)
    source = (ROOT / "packages" / package / "README.md").read_text("utf-8")
    text = hook.absolute(source, f"packages/{package}/README.md", "")
    assert not [link for link in links(text) if not link.is_absolute]
    assert text.count("\n") == source.count("\n") and text.count("`") == source.count("`")


def test_every_package_completes_its_metadata_in_the_same_way() -> None:
    texts = {(ROOT / "packages" / package / "hatch_build.py").read_text("utf-8") for package in PACKAGES}
    assert len(texts) == 1
