# SPDX-License-Identifier: Apache-2.0
"""modellink-train sft against transformers (and peft): samples per second with dynamic padding, fixed padding and packing.

The same samples (random ids, with lengths as skewed as those of instructions: half are below a quarter of the longest)
and the same weights in fp32 on one process. All weights are trained, then adapters. The peer pads as we do, with an
attention mask, and has no packing: packed rows are compared with its dynamic padding. Each contender is a separate
process, so that its memory can be measured; rounds take turns and the best counts. The first step is a warm-up and not
counted; reading the data is counted.

    python benchmarks/sft.py [--model FOLDER] [--samples 64] [--rounds 2] [--json FILE]

`--model` (or MODELLINK_TEST_MODEL) is a Hugging Face folder of a Llama; without one, a random model of 16 million weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LONGEST, BATCH, R = 512, 8, 8
LORA = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PEER_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [(kind, padding) for kind in ("full", "lora") for padding in ("dynamic", "fixed", "packed")]


def random_model(folder: Path) -> Path:
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
                                      num_key_value_heads=2, vocab_size=8192, max_position_embeddings=1024)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def lengths(samples: int) -> list[int]:
    """One batch to warm up, then the samples."""
    drawn = np.random.default_rng(1).lognormal(np.log(110), 0.7, samples + BATCH)
    return [int(length) for length in drawn.clip(16, LONGEST)]


def rows(samples: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels; the first half of a sample is a prompt."""
    made, generator = [], np.random.default_rng(2)
    for length in lengths(samples):
        ids = generator.integers(3, 8000, length, dtype=np.int32)
        made.append((ids, np.where(np.arange(length) < length // 2, -100, ids).astype(np.int32)))
    return made


def write_sets(folder: Path, samples: int) -> None:
    from modellink.data_prep.indexed import IndexedWriter
    from modellink.data_prep.packing import INPUTS, LABELS, MASK, pack
    plain = {field: folder / f"plain_{field}_document" for field in (INPUTS, LABELS, MASK)}
    for field, prefix in plain.items():
        with IndexedWriter(prefix, np.dtype("<i4")) as writer:
            for ids, labels in rows(samples):
                writer.add_document({INPUTS: ids, LABELS: labels, MASK: np.ones_like(ids)}[field])
    pack({field: [prefix] for field, prefix in plain.items()}, {field: folder / f"packs_{field}_document" for field in plain},
         LONGEST, show=False)


def ours(folder: Path, work: Path, kind: str, padding: str, samples: int) -> float:
    """Samples a second."""
    from modellink.core import processes
    from modellink.core.prepare.prepare import prepare
    from modellink.data_prep.indexed import IndexedDataset
    from modellink.kernels.options import Layer

    packed, batch, steps = padding == "packed", BATCH, samples // BATCH + 1
    counts = [BATCH] * steps
    if packed:  # as many tokens a step as fixed padding has in a quarter of its rows
        masks = IndexedDataset(work / "packs_packed_attention_mask_document")
        batch, steps = 2, len(masks) // 2
        counts = [sum(int(masks[row].max()) for row in range(step * batch, (step + 1) * batch)) for step in range(steps)]
    run = prepare("pretrain", [Layer("benchmark", {
        "load": str(folder), "data_path": (str(work / ("packs" if packed else "plain")),), "is_instruction_dataset": True,
        "seq_length": LONGEST, "variable_seq_lengths": padding == "dynamic", "reset_position_ids": packed, "shuffle": False,
        "micro_batch_size": batch, "train_iters": steps, "lr": 1e-5, "split": "1", "eval_iters": 0, "device": "cpu",
        "lora_target_modules": LORA if kind == "lora" else (), "lora_r": R})], 1)
    processes.join(run.device, run.layout, run.optimizer.seed)

    from modellink.core.api import train
    seconds = [step.seconds for step in train(run)]
    return sum(counts[1:]) / sum(seconds[1:])


def theirs(folder: Path, kind: str, padding: str, samples: int) -> float:
    import torch
    import transformers
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "lora":
        import peft
        model = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=PEER_MODULES))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, data, start = torch.optim.AdamW(learned, lr=1e-5, fused=True), rows(samples), 0.0
    for first in range(0, len(data), BATCH):
        if first == BATCH:
            start = time.perf_counter()
        chosen = data[first:first + BATCH]
        longest = LONGEST if padding == "fixed" else -(-max(len(ids) for ids, _ in chosen) // 8) * 8
        ids, labels, mask = (torch.full((len(chosen), longest), fill) for fill in (0, -100, 0))
        for row, (own, learned) in enumerate(chosen):
            ids[row, :len(own)], labels[row, :len(own)] = torch.from_numpy(own), torch.from_numpy(learned)
            mask[row, :len(own)] = 1
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (len(data) - BATCH) / (time.perf_counter() - start)


def measure(words: Sequence[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", *words], text=True, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("MODELLINK_TEST_MODEL"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=6)
    given = parser.parse_args()
    if given.one:
        who, folder, work, kind, padding, samples = given.one
        rate = (ours(Path(folder), Path(work), kind, padding, int(samples)) if who == "ours"
                else theirs(Path(folder), kind, padding, int(samples)))
        print(json.dumps({"rate": rate, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = Path(given.model) if given.model else random_model(work / "model")
        write_sets(work, given.samples)
        best: dict[tuple[str, ...], dict[str, float]] = {}
        for _ in range(given.rounds):
            for case in [("ours", *case) for case in CASES] + [("peer", *case) for case in CASES if case[1] != "packed"]:
                found = measure([case[0], str(folder), str(work), *case[1:], str(given.samples)])
                if case not in best or found["rate"] > best[case]["rate"]:
                    best[case] = found
    made = []
    for kind, padding in CASES:
        mine, peer = best["ours", kind, padding], best["peer", kind, "dynamic" if padding == "packed" else padding]
        name = ("transformers" if kind == "full" else "transformers + peft") + (", dynamic" if padding == "packed" else "")
        made.append({"claim": f"{kind}, {padding}", "ours": mine["rate"], "peer": peer["rate"], "unit": "samples/s",
                     "peer_name": name, "peak_memory": mine["peak"], "peer_peak_memory": peer["peak"], "limit": None})
        print(f"{kind}, {padding}: {mine['rate']:.2f} samples/s, {name} {peer['rate']:.2f}, "
              f"ratio {mine['rate'] / peer['rate']:.2f}; peak {mine['peak'] / 1e6:.0f} MB, theirs {peer['peak'] / 1e6:.0f} MB",
              flush=True)
    if given.json:
        given.json.write_text(json.dumps(made, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
