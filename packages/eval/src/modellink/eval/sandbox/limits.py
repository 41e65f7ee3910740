# SPDX-License-Identifier: Apache-2.0
"""Resource limits of a program. This file is also read inside the sandbox, so it imports only the standard library."""

from dataclasses import asdict, dataclass

MEGABYTE = 1 << 20
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """Limits of one program and all processes it starts.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: processor time of each process.
        memory: bytes of all processes together.
        address_space: bytes of address space of each process.
        file_size: bytes of a file; folder: bytes of all files.
        processes: concurrent processes and threads.
        open_files: open files of each process.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512 * MEGABYTE
    address_space: int = 2048 * MEGABYTE
    file_size: int = 16 * MEGABYTE
    folder: int = 32 * MEGABYTE
    processes: int = 32
    open_files: int = 64

    def asdict(self) -> dict[str, float]:
        return asdict(self)
