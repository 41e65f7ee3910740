# SPDX-License-Identifier: Apache-2.0
"""High availability by kind of fault: a table of injected faults, lost steps and cost in time.

Not a comparison with a peer: each row is a run of a tiny model on two ranks (four with `--layouts`) with faults of one kind,
compared with the same run without faults. `steps lost` counts the iterations repeated from a checkpoint older than the last
finished step; losses must equal those of the undisturbed run.

    python benchmarks/resilience.py [--layouts plain distributed tensor] [--random N --seed S] [--json FILE]

`--random N` also injects N faults of all kinds into one run, at random steps, ranks and moments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modellink.data_prep.indexed import IndexedWriter

KINDS = {"exception": "saved by the survivors", "kill": "saved by the survivors", "hang": "saved by the survivors",
         "memory": "undone and done again", "nan": "undone and done again", "corrupt": "undone and done again",
         "disk": "continues", "slow": "continues"}
LAYOUTS = {"plain": ["--nproc-per-node", "2"],
           "distributed": ["--nproc-per-node", "4", "--use-distributed-optimizer"],
           "tensor": ["--nproc-per-node", "4", "--tp", "2", "--sequence-parallel"]}
MODEL = ["--num-layers", "2", "--hidden-size", "24", "--num-attention-heads", "4", "--num-query-groups", "2",
         "--ffn-hidden-size", "52", "--vocab-size", "131", "--max-position-embeddings", "64", "--model-type-hf", "llama"]
TRAINING = ["--seq-length", "24", "--lr", "1e-3", "--global-batch-size", "8", "--eval-iters", "0", "--split", "100,0,0",
            "--device", "cpu", "--log-interval", "1"]


def train(work: Path, name: str, iterations: int, *more: str) -> tuple[dict[int, float], str, float]:
    """Return the loss of each iteration, the output, and seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "modellink.core.cli", "pretrain", *MODEL, *TRAINING, "--data-path", str(work / "text_document"),
         "--train-iters", str(iterations), "--save", str(work / name), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stdout[-3000:]}")
    lines = (json.loads(line) for line in (work / name / "metrics.jsonl").open())
    return {line["iteration"]: line["loss"] for line in lines}, done.stdout, time.perf_counter() - start


def lost(said: str) -> int:
    """Return the number of iterations repeated from a checkpoint older than the last logged step."""
    last = again = 0
    for match in re.finditer(r"iteration +(\d+)/|resuming from .* at iteration (\d+)", said):
        if match[1]:
            last = max(last, int(match[1]))
        else:
            again += max(0, last - int(match[2]))
    return again


def write_text(work: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 131, 60_000, dtype=np.uint16)
    with IndexedWriter(work / "text_document", np.dtype("<u2")) as writer:
        for first in range(0, len(ids), 200):
            writer.add_document(ids[first:first + 200])


def random_faults(count: int, ranks: int, seed: int) -> str:
    chance = random.Random(seed)
    return ";".join(
        f"kind={chance.choice(list(KINDS))},step={4 * number + chance.randrange(2, 5)},rank={chance.randrange(ranks)},"
        f"when={chance.choice(['start', 'update', 'end', 'random'])}" for number in range(count))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["plain"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_text(work)
        print(f"{'layout':12} {'fault':10} {'promise':24} {'starts':>6} {'steps lost':>10} {'losses':>16} {'seconds':>8}")
        for layout in given.layouts:
            trials = [(kind, 8, ";".join(f"kind={kind},step={step},rank={rank}" for step, rank in ((3, 1), (6, 0))))
                      for kind in given.kinds]
            if given.random:
                ranks = int(LAYOUTS[layout][1])
                trials.append((f"{given.random} random", 4 * given.random, random_faults(given.random, ranks, given.seed)))
            expected = {}
            for name, iterations, faults in trials:
                if iterations not in expected:
                    expected[iterations] = train(work, f"{layout}-{iterations}", iterations, *LAYOUTS[layout])
                straight, _, alone = expected[iterations]
                found, said, seconds = train(
                    work, f"{layout}-{name}", iterations, *LAYOUTS[layout], "--enable-high-availability",
                    "--enable-optimizer-state-local-copy", "--hang-timeout", "8", "--max-restarts", "1000",
                    "--save-interval", "3", "--inject-fault", faults)
                worst = max(abs(found.get(number, float("inf")) - loss) / loss for number, loss in straight.items())
                starts = 1 + said.count("; restarting")
                rows.append({"layout": layout, "fault": name, "starts": starts, "lost": lost(said), "difference": worst,
                             "seconds": seconds, "undisturbed_seconds": alone})
                text = "equal bits" if worst == 0 else f"within {worst:.0e}"
                print(f"{layout:12} {name:10} {KINDS.get(name, 'as its kind'):24} {starts:6} {rows[-1]['lost']:10} {text:>16} "
                      f"{seconds:8.0f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if any(row["difference"] > 2e-6 or row["lost"] for row in rows):
        raise SystemExit("a promise was not kept")


if __name__ == "__main__":
    main()
