# SPDX-License-Identifier: Apache-2.0
"""Seconds until a command answers `--help` and until it reports a wrong argument, next to a command of the field.

    python benchmarks/start.py [--repeat N] [--json FILE]

The limit is the bare interpreter (`python -c pass`). Each time is the fastest of N runs, in turns, with a warm file cache. A peer
that is not installed is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {  # command: arguments with a mistake, and the peer
    "modellink-doctor": (["--no-such-option"], "hf"),
    "modellink-convert": (["a", "b", "--to", "nonsense"], "hf"),
    "modellink-preprocess": (["--long-samples", "nonsense"], "hf"),
    "modellink-train": (["pretrain", "--save-format", "nonsense"], "torchrun"),
    "modellink-infer": (["generate", "--load", "x", "--device", "nonsense"], "transformers"),
    "modellink-eval": (["run", "--device", "nonsense"], "lm_eval"),
}


def seconds(command: list[str], status: int) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode != status:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}, not {status}:\n{done.stderr[-2000:]}")
    return elapsed


def find(name: str) -> Path | None:
    """Return the program of that name next to this interpreter, else on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return Path(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name, (mistake, peer) in COMMANDS.items():
        program, other = find(name), find(peer)
        if program is None:
            raise SystemExit(f"{name} is not installed next to {sys.executable}")
        measured: dict[str, list[float]] = {"help": [], "mistake": [], "bare": [], "peer": []}
        for _ in range(given.repeat):
            measured["help"].append(seconds([str(program), "--help"], 0))
            measured["mistake"].append(seconds([str(program), *mistake], 2))
            measured["bare"].append(seconds([sys.executable, "-c", "pass"], 0))
            if other is not None:
                measured["peer"].append(seconds([str(other), "--help"], 0))
        fastest = {what: min(times, default=0.0) for what, times in measured.items()}
        print(f"{name:22} --help {fastest['help']:6.2f} s   wrong argument {fastest['mistake']:6.2f} s   "
              f"bare interpreter {fastest['bare']:5.2f} s   {peer} --help {fastest['peer']:6.2f} s", flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        rows += [{"claim": f"{name}: {label}", "ours": fastest[what], "peer": fastest["peer"], "unit": "s",
                  "peer_name": f"{peer} --help", "peak_memory": peak, "limit": fastest["bare"]}
                 for what, label in (("help", "--help"), ("mistake", "a wrong argument"))]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
