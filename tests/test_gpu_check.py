# SPDX-License-Identifier: Apache-2.0
"""The GPU check on a CPU: some of its rows, how rows end, and the environment for a bare machine.

Not covered: all rows, which `python tests/gpu/run.py --device cpu` runs, and collecting wheels of other distributions.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).resolve().parent / "gpu"
WHEELS = os.environ.get("MODELLINK_WHEELS")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU))
    import registry
    return registry


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU))
    import pack
    return pack


BUSY = ("--seconds", 900, "--call-seconds", 300)  # limits for a machine that is busy with other tests


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GPU / "run.py"), *map(str, arguments)], capture_output=True, text=True)


def test_rows_pass_on_a_cpu(tmp_path: Path) -> None:
    selected = ("environment: torch", "environment: versions", "ops: every", "ops: rms_norm", "ops: matmul_all_reduce",
                "training: the loss falls", "training: losses equal", "decode: graphs")
    done = run("--device", "cpu", *BUSY, "--json", tmp_path / "gpu.json", "--only", *selected)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert report["device"]["kind"] == "cpu" and report["failed"] == 0
    assert (report["passed"], report["skipped"]) == (7, 1)
    outcomes = {row["name"]: (row["status"], row["detail"]) for row in report["rows"]}
    assert outcomes["training: losses equal the CPU's"] == ("skipped", "the device is the CPU")
    assert outcomes["ops: rms_norm"][1].startswith("1 use, fused; float32 ")
    assert "graphs" in outcomes["decode: graphs give the same tokens"][1]
    assert all(f"{name}  " in done.stdout for name in outcomes) and "7 passed, 0 failed, 1 skipped" in done.stdout


def test_how_a_row_ends(registry: ModuleType, tmp_path: Path) -> None:
    machine = registry.Machine("cpu", tmp_path, io.BytesIO(), time.monotonic() + 60, 60)

    def wrong(_: object) -> str:
        registry.require(True, "not this")
        registry.require(False, "a trace\nlosses differ")
        return "not reached"

    def skipped(_: object) -> str:
        raise registry.Skipped("no second GPU")

    def broken(_: object) -> str:
        return str(dict[str, int]()["tokens"])

    def shared(_: object) -> str:
        return str(machine.once("key", lambda: broken(machine)))

    def last(_: object) -> str:
        machine.deadline = 0.0
        return "3 tokens"

    checks = (wrong, skipped, broken, shared, shared, last, last)
    results = list(registry.run_rows([registry.Row(f"row {at}", check) for at, check in enumerate(checks)], machine))
    assert [(result.status, result.detail) for result in results] == [
        ("failed", "losses differ"), ("skipped", "no second GPU"), ("failed", "'tokens'"), ("failed", "'tokens'"),
        ("failed", "'tokens'"), ("passed", "3 tokens"),
        ("skipped", "there was no time left")]
    assert results[0].trace == "a trace\nlosses differ" and "in broken" in results[2].trace


def leave() -> None:
    """On a rank."""
    print("the last words", flush=True)
    os._exit(3)


def test_a_process_that_ends_costs_one_row(registry: ModuleType, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        machine = registry.Machine("cpu", tmp_path, log, time.monotonic() + 300, 300)
        try:
            (result,) = registry.run_rows([registry.Row("row", lambda machine: machine.on_device(leave))], machine)
        finally:
            machine.stop()
    assert (result.status, result.detail) == ("failed", "rank 0 ended with status 3")
    assert "| the last words" in result.trace


def test_an_unknown_row_lists_the_known_ones() -> None:
    done = run("--only", "no such row")
    assert done.returncode == 2 and "ops: attention\n" in done.stdout
    assert run("--list").stdout == done.stdout


def test_what_a_machine_has_is_not_installed(pack: ModuleType) -> None:
    names = ("megatron_core-0.16.1-cp312-cp312-manylinux_2_28_x86_64.whl", "modellink_core-0.1.0-py3-none-any.whl",
             "pytest-9.2.0-py3-none-any.whl", "no_such_distribution-1.0-py3-none-any.whl")
    chosen = [path.name for path in pack.missing([Path(name) for name in names])]
    assert chosen == [names[0], names[1], names[3]]


def test_a_folder_without_wheels(tmp_path: Path) -> None:
    done = run("--wheels", tmp_path, "--device", "cpu")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path} has no wheels: fill it with --pack\n"


@pytest.mark.skipif(WHEELS is None, reason="the wheels are built by `nox -s e2e`")
def test_the_rows_run_with_wheels_next_to_the_torch_that_is_found(tmp_path: Path) -> None:
    done = run("--wheels", WHEELS, "--device", "cpu", *BUSY, "--json", tmp_path / "gpu.json", "--only", "environment: versions")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["passed"] == 1
