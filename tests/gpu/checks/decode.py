# SPDX-License-Identifier: Apache-2.0
"""Decoding a tiny Llama: against a forward pass without a cache, with and without graphs, against the CPU."""

from __future__ import annotations

import statistics
from typing import Any

from checks.training import inputs
from models import TINY
from registry import Machine, Skipped, require, row

LENGTHS = (1, 17, 40, 90, 120)  # of the prompts, in tokens; the last exceeds the 128 keys of the first graph
NEW = 24
TIGHT = 1e-3  # largest difference of log-probabilities in fp32, in nats
LOOSE = 5e-2  # largest mean difference in bf16


def prompts() -> list[list[int]]:
    """Return prompts that are the same on every machine."""
    import random

    chance = random.Random(5)
    return [[chance.randrange(3, TINY["vocab_size"]) for _ in range(length)] for length in LENGTHS]


def decode(path: str, device: str, dtype: str, graphs: bool) -> dict[str, Any]:
    """On a rank: greedy tokens with log-probabilities, those of a forward pass over them, and the graphs."""
    import torch

    from modellink.infer import load
    from modellink.infer.graphs import DecodeGraphs

    engine = load(path, device=device, dtype=dtype, graphs=graphs)  # type: ignore[arg-type]
    given = prompts()
    found = engine.generate(given, max_new_tokens=NEW, ignore_eos=True, logprobs=True)
    captured = [graph for graph in engine.network.fast_paths if isinstance(graph, DecodeGraphs)]
    forward, best = [], []
    with torch.inference_mode():
        for prompt, completion in zip(given, found, strict=True):
            ids = torch.tensor([[*prompt, *completion.token_ids[:-1]]])
            logits = engine.network.run_model(ids)[0, len(prompt) - 1:].log_softmax(-1)
            forward.append(logits[range(NEW), completion.token_ids].tolist())
            best.append(logits.argmax(-1).tolist())
    return {"tokens": [one.token_ids for one in found], "logprobs": [one.logprobs for one in found],
            "forward": forward, "best": best, "graphs": sum(len(graph._captured) for graph in captured),
            "failed": any(graph.failed for graph in captured)}


def decoded(machine: Machine, dtype: str = "float32", graphs: bool = False,
            kind: str | None = None) -> dict[str, Any]:
    """Return what `decode` found, decoded at the first call."""
    kind = kind or machine.kind
    call = machine.on_cpu if kind == "cpu" else machine.on_device
    found: dict[str, Any] = machine.once((decode, kind, dtype, graphs), lambda: call(
        decode, path=inputs(machine)["load"], device=kind, dtype=dtype, graphs=graphs))
    return found


def differences(found: list[list[float]], expected: list[list[float]]) -> list[float]:
    """Return the differences of the log-probabilities of all tokens."""
    pairs = zip(found, expected, strict=True)
    return [abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True)]


def compare(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Require the same tokens with log-probabilities that differ by at most TIGHT."""
    pairs = list(zip(found["tokens"], expected["tokens"], strict=True))
    wrong = [number for number, (one, two) in enumerate(pairs) if one != two]
    require(not wrong, f"other tokens for prompts of {[LENGTHS[number] for number in wrong]} tokens")
    apart = max(differences(found["logprobs"], expected["logprobs"]))
    require(apart <= TIGHT, f"log-probabilities differ by {apart:.1e}, allowed {TIGHT:.0e}")
    return f"{len(pairs)} x {NEW} tokens are equal, log-probabilities within {apart:.0e}"


@row("decode: tokens equal those of a forward pass")
def forward(machine: Machine) -> str:
    found = decoded(machine)
    return compare(found, {"tokens": found["best"], "logprobs": found["forward"]})


@row("decode: graphs give the same tokens")
def graphs(machine: Machine) -> str:
    found = decoded(machine, graphs=True)
    require(not found["failed"], "a graph could not be captured; the model ran without")
    require(found["graphs"] > 1, f"{found['graphs']} graphs were captured, expected several sizes")
    return f"{compare(found, decoded(machine))}; {found['graphs']} graphs"


@row("decode: tokens equal the CPU's")
def cpu(machine: Machine) -> str:
    if machine.kind == "cpu":
        raise Skipped("the device is the CPU")
    return compare(decoded(machine), decoded(machine, kind="cpu"))


@row("decode: bf16 with graphs follows a forward pass")
def bf16(machine: Machine) -> str:
    found = decoded(machine, "bfloat16", True)
    require(not found["failed"], "a graph could not be captured; the model ran without")
    apart = statistics.fmean(differences(found["logprobs"], found["forward"]))
    require(apart <= LOOSE, f"log-probabilities differ by {apart:.1e} on average, allowed {LOOSE:.0e}")
    return f"log-probabilities within {apart:.0e} on average"
