"""How much a program may use. This file is read inside the sandbox too, so it imports the standard library alone."""

from dataclasses import asdict, dataclass

MEGABYTE = 1 << 20
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """Of one program and all it starts.

    Attributes:
        seconds: of the wall clock.
        cpu_seconds: of processor time, of each process.
        memory: bytes that all processes together may hold.
        address_space: bytes of addresses each process may have.
        file_size: bytes of a file; folder: bytes of all files.
        processes: at once, threads included.
        open_files: of each process.
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
