# SPDX-License-Identifier: Apache-2.0
"""All checks of the repository as nox sessions; `nox -l` lists them, `nox` runs the default ones.

Each `tests-<package>` session has its own virtual environment with only that package's wheel, its dependencies and its
test dependencies. Sessions that need all six packages (types, npu, e2e, quickstart, bench, stress) share one environment,
and so do the releases, because torch is large. Building wheels, the summary and the release checks are in `tools/`.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

from npu import prepare  # noqa: E402
from report import Entry, Report  # noqa: E402
from wheels import PACKAGES, project, test_needs, wheels  # noqa: E402

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    "lint", "types", *(f"tests-{name}" for name in PACKAGES), *(f"release-{name}" for name in PACKAGES), "npu", "e2e",
]  # fmt: skip

CONSTRAINTS = ROOT / "constraints.txt"
REPORT = Report(ROOT)
PEERS = ("accelerate", "gguf", "hypothesis", "peft", "pytest", "transformers")
HARNESS = "lm-eval[hf]"  # the benchmark peer of modellink-eval
WORKERS = ("-n", "2", "--dist", "loadfile")
"""Of pytest-xdist: two processes share the test files of a package. Each computes with one thread; more would compete."""


class Env:
    """A session with the interpreter of its commands and the entry that records its time."""

    def __init__(self, session: nox.Session, entry: Entry, shared: str | None) -> None:
        self.session, self.entry = session, entry
        self.bin = ROOT / ".nox" / shared / "bin" if shared else Path(str(session.bin))
        if shared and not (self.bin / "python").exists():
            with entry.installing():
                session.run(sys.executable, "-m", "virtualenv", "--quiet", str(self.bin.parent), external=True)

    def python(self, *args: str, **environment: str) -> None:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        self.session.run(str(self.bin / "python"), *args, env={"PATH": path, **environment}, external=True)

    def pip(self, *requirements: str) -> None:
        with self.entry.installing():
            self.python("-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *requirements)

    def install(self, package: str, *needs: str, extras: tuple[str, ...] = ()) -> None:
        """Install the wheels of a package and its siblings with their dependencies; remove siblings of an earlier run first."""
        with self.entry.installing():
            files = wheels(ROOT, package, extras)
            self.python("-m", "pip", "uninstall", "--quiet", "--yes", *(f"modellink-{name}" for name in PACKAGES))
        self.pip(*files, *needs)

    def install_all(self, *needs: str) -> None:
        """Install all six packages with the server and the peers of tests and benchmarks."""
        extras = project(ROOT, "infer")["project"]["optional-dependencies"]
        self.install("eval", *PEERS, *extras["server"], *extras["constrained"], *needs,
                     extras=("local",))  # eval[local] needs infer, which needs all others

    def pytest(self, *args: str, **environment: str) -> None:
        junit = f"--junitxml={REPORT.junit(self.session.name)}"
        self.python("-m", "pytest", junit, *args, *self.session.posargs, MODELLINK_WHEELS=str(ROOT / ".nox" / "wheels"),
                    **environment)


def session(name: str, shared: str | None = None) -> Callable[[Callable[[Env], None]], object]:
    """Register `func` as the nox session `name`, timed; `shared` names an environment that several sessions use."""

    def register(func: Callable[[Env], None]) -> object:
        @functools.wraps(func)
        def body(session: nox.Session) -> None:
            entry = REPORT.begin(session.name)
            start = time.monotonic()
            try:
                func(Env(session, entry, shared))
                if entry.status != "skipped":
                    entry.status = "passed"
            finally:
                entry.seconds = time.monotonic() - start

        return nox.session(name=name, venv_backend="none" if shared else "virtualenv")(body)

    return register


@session("lint")
def lint(env: Env) -> None:
    """Ruff over the whole repository, phrases that texts may not contain, license identifiers, and links of documents."""
    env.pip("ruff")
    env.python("-m", "ruff", "check", *(env.session.posargs or ["."]))
    for tool in (["phrases.py"], ["spdx.py", "--check"], ["links.py"]):
        env.python(f"tools/{tool[0]}", *tool[1:])


@session("types", shared="all")
def types(env: Env) -> None:
    """Mypy, strict, over the packages pyproject.toml names."""
    env.install_all("mypy", "types-psutil", "types-PyYAML")
    env.python("-m", "mypy", *env.session.posargs)


def tests_of(package: str) -> Callable[[Env], None]:
    def tests(env: Env) -> None:
        env.install(package, *test_needs(ROOT, package), "pytest-xdist")
        env.pytest(*WORKERS, "-m", "not stress", str(ROOT / "packages" / package / "tests"), OMP_NUM_THREADS="1")

    tests.__doc__ = f"The tests of modellink-{package} against its wheel, installed on its own."
    return tests


def release_of(package: str) -> Callable[[Env], None]:
    def release(env: Env) -> None:
        env.pip("hatchling", "twine")
        env.python("tools/release.py", package)

    release.__doc__ = f"Check that modellink-{package} could be published; uploads nothing."
    return release


for _package in PACKAGES:
    session(f"tests-{_package}")(tests_of(_package))
    session(f"release-{_package}", shared="release")(release_of(_package))


@session("e2e", shared="all")
def e2e(env: Env) -> None:
    """Tests across packages: imports, separate installation, README commands, and comparisons with transformers and lm-eval."""
    env.install_all(HARNESS, "openai", "hatchling")
    env.pytest("-m", "not stress", "tests")


@session("npu", shared="all")
def npu(env: Env) -> None:
    """The NPU path against the real torch_npu, without an NPU; then a table of what is proven. See the README of kernels."""
    env.install_all()
    folder = ROOT / ".nox" / "npu"
    with env.entry.installing():
        reason = prepare(folder, env.bin / "python")
    if reason is not None:
        env.entry.status = "skipped"
        print(f"npu skipped: {reason}", flush=True)
        return
    env.pytest("-m", "not stress", "tests/npu", MODELLINK_NPU=str(folder))
    env.python("tests/npu/table.py", "--last", MODELLINK_NPU=str(folder))


@session("quickstart", shared="all")
def quickstart(env: Env) -> None:
    """The quickstart with real weights and real text; `nox -s quickstart -- --layout tp1pp2` for another layout."""
    env.install_all()
    env.python("examples/quickstart/run.py", *env.session.posargs)


@session("stress", shared="all")
def stress(env: Env) -> None:
    """Long tests: many kills, soaks, big inputs. The default run has a short form of each."""
    files = (*ROOT.glob("packages/*/tests/**/*.py"), *ROOT.glob("tests/**/*.py"))
    marked = [path for path in files if "mark.stress" in path.read_text("utf-8")]
    env.install_all(*{need for package in PACKAGES for need in test_needs(ROOT, package)})
    env.pytest("-m", "stress", *sorted(map(str, marked)))


@session("bench", shared="all")
def bench(env: Env) -> None:
    """All scripts in benchmarks/, as one table and results/bench.json; `nox -s bench -- NAME` for some of them."""
    env.install_all(HARNESS)
    env.python("tools/bench.py", *env.session.posargs)
