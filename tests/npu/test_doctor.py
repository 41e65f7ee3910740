# SPDX-License-Identifier: Apache-2.0
"""modellink-doctor where torch_npu is installed: without CANN, and on the simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from modellink.core.launch import free_port

HERE = Path(__file__).resolve().parent
DOCTOR = ["modellink.kernels.doctor", "main", "--device", "npu"]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"} | environment)


def test_without_cann_it_is_one_message():
    wheel = str(Path(os.environ["MODELLINK_NPU"]) / "wheel")
    path = os.pathsep.join(filter(None, (wheel, os.environ.get("PYTHONPATH"))))
    code = "import sys; sys.argv[1:] = ['--device', 'npu']; from modellink.kernels.doctor import main; main()"
    for autoload in ("1", "0"):
        done = start("-c", code, PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
        _, said = done.communicate(timeout=60)
        assert done.returncode == 2, said
        assert "CANN" in said and "set_env.sh" in said and "Traceback" not in said


def test_on_two_ranks_every_op_is_compared():
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(str(HERE / "rank.py"), *DOCTOR, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
    (first, said), (second, _) = (rank.communicate(timeout=240) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said + first
    assert "all_reduce over 2 ranks" in first and "npu:0" in first and "wrong" not in first
    for op in ("attention", "ring_update", "grouped_matmul", "matmul_all_reduce", "adamw"):
        assert op in first
    assert "kernels" not in second and "attention" not in second  # rank 0 speaks
