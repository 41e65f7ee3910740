# SPDX-License-Identifier: Apache-2.0
"""Ranks for tests: processes that import megatron once and then run one function after another.

Importing megatron takes seconds and a task milliseconds, so one set of ranks per world size serves a whole test run. A task is
a function in a file; every rank loads the file by its path and calls the function. pytest finds this module through
`pythonpath` in pyproject.toml, ranks through PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from modellink.core.launch import free_port

HERE = Path(__file__).resolve()
CONNECTION = "RANKS_CONNECTION"
"""Environment variable with the number of the file descriptor over which a rank receives tasks."""
SECONDS = 300  # that one task may take, on a machine that is busy with others
THREADS = 300  # of one rank: megatron's distributed optimizer keeps old process groups alive, with their threads


def beside(file: str, name: str) -> ModuleType:
    """The module `name`.py in the folder of `file`: test folders are not packages, so shared parts are loaded by path."""
    path = Path(file).with_name(f"{name}.py")
    key = f"{name}@{path}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


class Ranks:
    """`ranks(function, **kwargs)` calls a function on every rank and returns the results in the order of the ranks.

    Arguments and results are pickled. When a rank fails, ends or hangs, AssertionError carries its trace or exit status, and
    the next call starts new ranks, unless all ranks raised ModelLinkError: they found a mistake and can continue.

    Args:
        command: what a rank runs: this module, or a script that calls `serve`.
        output: file for what the ranks print. Default: the output of this process.

    Attributes:
        seconds: time limit of a task.
    """

    def __init__(self, world_size: int, command: Sequence[str] = (str(HERE),), output: IO[bytes] | None = None) -> None:
        self.world_size, self.command, self.output = world_size, command, output
        self.seconds: float = SECONDS
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        environment = os.environ | {
            "WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))}
        for rank in range(self.world_size):
            connection, other_end = Pipe()
            with other_end:  # if only the rank has it, the connection ends with the rank
                number = other_end.fileno()
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), CONNECTION: str(number)}
                self._processes.append(subprocess.Popen(
                    [sys.executable, *self.command], env=environment | own, pass_fds=(number,),
                    stdout=self.output, stderr=self.output))
            self._connections.append(connection)

    def __call__(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        if not self._processes:
            self._start()
        task = pickle.dumps((sys.modules[function.__module__].__file__, function.__name__, kwargs))
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the rank has ended, which is reported below
                connection.send_bytes(task)
        results, failures, refusals = list[Any](), list[str](), 0
        for rank, connection in enumerate(self._connections):
            if not connection.poll(5 if failures else self.seconds):
                failures.append(f"rank {rank} did not answer in {self.seconds:.0f} s")
                continue
            try:
                outcome, value = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                failures.append(f"rank {rank} ended with status {self._processes[rank].wait()}")
                continue
            results.append(value)
            refusals += outcome == "refused"
            if outcome != "returned":
                failures.append(f"rank {rank}:\n{value}")
        if threads_of(self._processes) > THREADS * self.world_size:
            self.stop()
        if failures:
            if refusals < self.world_size:
                self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes, self._connections = [], []


def threads_of(processes: list[subprocess.Popen[bytes]]) -> int:
    """How many threads they have; 0 if the system does not tell."""
    return sum(len(list(tasks.iterdir())) for process in processes if (tasks := Path(f"/proc/{process.pid}/task")).is_dir())


@cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def serve(kind: Literal["auto", "cpu", "cuda", "npu"] = "cpu") -> None:
    """Run tasks on a device of this kind until the test run ends."""
    import torch
    import torch.distributed as dist

    from modellink.core import engine
    from modellink.kernels.device import find
    from modellink.kernels.errors import ModelLinkError

    torch.set_num_threads(1)
    device = find(kind, int(os.environ["RANK"]))
    device.activate()
    engine.start(device)
    dist.init_process_group(device.backend)
    with Connection(int(os.environ[CONNECTION])) as connection:
        while True:
            try:
                path, name, kwargs = pickle.loads(connection.recv_bytes())
            except EOFError:
                break
            try:
                answer = ("returned", getattr(_module(path), name)(**kwargs))
            except BaseException as error:
                answer = ("refused" if isinstance(error, ModelLinkError) else "failed", traceback.format_exc())
            connection.send_bytes(pickle.dumps(answer))  # not send(): torch would share memory
    os._exit(0)  # a failed task may have left other ranks waiting in a collective


if __name__ == "__main__":
    serve()
