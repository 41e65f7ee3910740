# SPDX-License-Identifier: Apache-2.0
"""`modellink-doctor`: which versions and devices this machine has, and whether the ops compute what they
should.

It prints one table each for versions, the device with a collective over its backend, and every use of every
op on this device against its plain form, including gradients; under torchrun also ops over ranks, and rank 0
prints. The versions need no torch. It exits with status 1 if something does not work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import Any, Literal

from modellink.kernels.command import command
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.messages import rank
from modellink.kernels.options import Layer, option, resolve
from modellink.kernels.tables import print_table

DISTRIBUTIONS = ["modellink-kernels", "modellink-ckpt-convert", "modellink-data-prep", "modellink-core",
                 "modellink-infer", "modellink-eval", "torch", "torch-npu", "megatron-core", "numpy",
                 "safetensors", "tokenizers", "transformers"]


def versions() -> dict[str, str]:
    """Return the installed version of Python and of each distribution."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def advice(found: dict[str, str]) -> list[str]:
    """Return the problems with the combination of installed versions."""
    wrong = []
    torch, npu = found["torch"].split("+")[0], found["torch-npu"]
    if npu != "not installed" and torch.split(".")[:2] != npu.split(".")[:2]:
        wrong.append(f"torch-npu {npu} needs torch {'.'.join(npu.split('.')[:2])}, but torch {torch} is "
                     f"installed")
    if found["megatron-core"] not in ("0.16.1", "not installed"):
        wrong.append(f"megatron-core 0.16.1 is needed, {found['megatron-core']} is installed")
    return wrong


@dataclass(frozen=True)
class DoctorOptions:
    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "Device to check.")


@command(DoctorOptions, name="modellink-doctor", example="modellink-doctor --device cpu")
def doctor(given: Layer) -> None:
    """Print versions and devices, and check every op on this device."""
    device = resolve([DoctorOptions], given)[DoctorOptions].device
    found = versions()
    failures = advice(found)
    tables = [("versions", ["", "version"], list(found.items()))]
    if importlib.util.find_spec("torch") is not None:
        check = _check()
        rows, bad = check.devices(device)
        tables.append(("device", ["", ""], rows))
        failures += bad
        rows, bad = check.ops(device)
        tables.append(("ops against their plain form", ["op", "use", "dtype", "difference", "allowed", ""], rows))
        failures += bad
    if rank() == 0:
        _print(tables, failures)
    if failures:
        sys.exit(1)


def _check() -> Any:
    try:
        from modellink.kernels.ops import check
    except RuntimeError as error:  # `import torch` loads torch_npu where that is installed
        raise ModelLinkError(f"torch cannot be loaded: {str(error).splitlines()[0]}", where="torch_npu, CANN",
                             fix="source the set_env.sh of the CANN toolkit, set "
                                 "TORCH_DEVICE_BACKEND_AUTOLOAD=0, or uninstall "
                             "torch-npu where there is no NPU") from error
    return check


def _print(tables: list[tuple[str, list[str], list[Any]]], failures: list[str]) -> None:
    for title, columns, rows in tables:
        print_table(columns, rows, title=title)
        print()
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: devices and ops were not checked")
    for failure in failures:
        print(f"wrong: {failure}")


def main() -> None:
    run_command(lambda: doctor(standalone_mode=False))


if __name__ == "__main__":
    main()
