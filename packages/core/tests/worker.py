"""A rank of the test pool: starts megatron once, then runs functions of test files until it is told to stop.

Started by conftest.py as a script, with RANK, WORLD_SIZE and the address of the pool in its environment.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
from functools import cache
from multiprocessing.connection import Client
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


@cache
def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def main() -> None:
    torch.set_num_threads(1)
    from modellink.core import engine
    from modellink.kernels.device import find
    engine.start(find("cpu"))
    dist.init_process_group("gloo")
    with Client(os.environ["POOL_ADDRESS"]) as connection:
        connection.send_bytes(pickle.dumps(int(os.environ["RANK"])))  # not send(): torch would share memory
        while (task := pickle.loads(connection.recv_bytes())) is not None:
            path, name, kwargs = task
            try:
                answer = (True, getattr(module(path), name)(**kwargs))
            except BaseException:
                answer = (False, traceback.format_exc())
            connection.send_bytes(pickle.dumps(answer))
    os._exit(0)  # gloo's threads need no goodbye, and the groups may be of a task that failed half way


if __name__ == "__main__":
    main()
