# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of training and decoding with a fixed model: facts, nothing is required of them.

On a CPU a tiny model is measured on one thread, only so that the rows run.
"""

from __future__ import annotations

import time
from typing import Any

from models import SMALL, TINY, parameters, write_documents, write_llama
from registry import Machine, row

OPTIONS: dict[str, Any] = {
    "bf16": True, "lr": 1e-4, "split": "100,0,0", "eval_iters": 0, "log_interval": 100, "seed": 7}
LARGE_RUN = {"seq_length": 2048, "micro_batch_size": 8, "global_batch_size": 8, "train_iters": 14}
TINY_RUN = {"seq_length": 64, "micro_batch_size": 4, "global_batch_size": 4, "train_iters": 6}
WARM_UP = 4  # iterations that are not counted, at most half of them
PROMPT, LARGE_NEW, TINY_NEW = 32, 96, 16  # tokens
LARGE_BATCHES, TINY_BATCHES = (1, 8, 64), (1, 8)


def inputs(machine: Machine) -> dict[str, Any]:
    """Return the options that name the model and the data, both written at the first call."""
    sizes = TINY if machine.kind == "cpu" else SMALL

    def write() -> dict[str, Any]:
        model, data = machine.folder / "speed", machine.folder / "speed_document"
        machine.on_device(write_llama, folder=str(model), sizes=sizes, dtype="bfloat16")
        machine.on_device(write_documents, prefix=str(data), vocabulary=sizes["vocab_size"], documents=200,
                          length=2000)
        return {"load": str(model), "data_path": (str(data),)}

    found: dict[str, Any] = machine.once("inputs of speed", write)
    return found


def train(options: dict[str, Any]) -> tuple[list[float], int]:
    """On a rank: seconds of each iteration, and peak memory in bytes."""
    import torch

    from modellink.core import fit
    from modellink.kernels.device import find

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = [step.seconds for step in fit("pretrain", options)]
    return seconds, find(options["device"]).memory()[1]


def decode(path: str, device: str, batches: tuple[int, ...], new: int) -> dict[int, float]:
    """On a rank: tokens per second by batch size; the graphs are captured before."""
    from modellink.infer import load

    engine = load(path, device=device, batch_size=max(batches))  # type: ignore[arg-type]
    found = {}
    for count in batches:
        given = [[5 + (number * 7 + at) % 200 for at in range(PROMPT)] for number in range(count)]
        for _ in range(2):  # the first round warms up
            start = time.perf_counter()
            engine.generate(given, max_new_tokens=new, ignore_eos=True)
            seconds = time.perf_counter() - start
        found[count] = count * new / seconds
    return found


@row("speed: training")
def training(machine: Machine) -> str:
    run = TINY_RUN if machine.kind == "cpu" else LARGE_RUN
    options = OPTIONS | run | inputs(machine) | {"device": machine.kind}
    seconds, peak = machine.on_device(train, options=options)
    counted = sorted(seconds[min(WARM_UP, len(seconds) // 2):])
    median = counted[len(counted) // 2]
    tokens = run["global_batch_size"] * run["seq_length"]
    sizes = TINY if machine.kind == "cpu" else SMALL
    return (f"{tokens / median:,.0f} tokens/s, {1e3 * median:.1f} ms per iteration of {tokens:,} tokens, "
            f"{parameters(sizes) / 1e6:.1f} million parameters, bf16, peak {peak / 2**30:.1f} GiB")


@row("speed: decoding")
def decoding(machine: Machine) -> str:
    tiny = machine.kind == "cpu"
    batches, new = (TINY_BATCHES, TINY_NEW) if tiny else (LARGE_BATCHES, LARGE_NEW)
    found = machine.on_device(decode, path=inputs(machine)["load"], device=machine.kind, batches=batches,
                              new=new)
    rates = ", ".join(f"{rate:,.0f} tokens/s at batch {count}" for count, rate in found.items())
    return f"{rates}; bf16, prompts of {PROMPT} tokens, {new} new ones"
