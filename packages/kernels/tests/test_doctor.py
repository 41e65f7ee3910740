# SPDX-License-Identifier: Apache-2.0
"""modellink-doctor as a user runs it."""

from __future__ import annotations

import subprocess
import sys

from modellink.kernels.doctor import advice, versions


def test_it_checks_this_machine():
    done = subprocess.run([sys.executable, "-c", "from modellink.kernels.doctor import main; main()"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "modellink-kernels" in done.stdout and "rms_norm" in done.stdout and "works" in done.stdout


def test_a_device_that_is_not_there_is_one_message():
    code = "import sys; sys.argv[1:] = ['--device', 'npu']; from modellink.kernels.doctor import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no npu device is available" in done.stderr and "Traceback" not in done.stderr


def test_versions_that_do_not_fit_are_named():
    found = versions() | {"torch": "2.13.0+cpu", "torch-npu": "2.7.1", "megatron-core": "0.17.0"}
    assert len(advice(found)) == 2
    assert advice(found | {"torch-npu": "2.13.0", "megatron-core": "0.16.1"}) == []
