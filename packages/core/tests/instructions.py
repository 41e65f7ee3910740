# SPDX-License-Identifier: Apache-2.0
"""Instruction sets for tests, in the three files of modellink-preprocess (the format's description: Megatron's IndexedDataset,
version 1), and what a plain loop makes of them."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

FIELDS = ("input_ids", "labels", "attention_mask")


def write_pair(prefix: Path, rows: list[list[int]]) -> None:
    """One .bin/.idx pair of int32."""
    lengths = [len(row) for row in rows]
    starts = [4 * sum(lengths[:number]) for number in range(len(lengths))]
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(struct.pack(f"<{len(row)}i", *row) for row in rows))
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(lengths) + 1)
        + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
        + struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1)))


def write_set(prefix: Path, samples: list[dict[str, list[int]]]) -> None:
    for field in FIELDS:
        write_pair(prefix.with_name(f"{prefix.name}_packed_{field}_document"), [sample[field] for sample in samples])


def make_samples(count: int, vocabulary: int, seed: int = 0, longest: int = 22) -> list[dict[str, list[int]]]:
    """Conversations of very different lengths: of a few tokens one is learned, of others nearly all."""
    choose, made = random.Random(seed), []
    for _ in range(count):
        length = choose.randint(4, longest)
        first = choose.randrange(vocabulary)
        ids = [(first + 3 * place * place) % vocabulary for place in range(length)]
        learned = choose.randint(1, length - 1)
        made.append({"input_ids": ids, "labels": [-100] * (length - learned) + ids[-learned:], "attention_mask": [1] * length})
    return made


def pack(samples: list[dict[str, list[int]]], length: int) -> dict[str, list[int]]:
    """Samples in one row, numbered from 1, padded."""
    row: dict[str, list[int]] = {field: [] for field in FIELDS}
    for number, sample in enumerate(samples, 1):
        for field in FIELDS:
            row[field] += [number] * len(sample[field]) if field == "attention_mask" else sample[field]
    padding: dict[str, int] = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {field: row[field] + [padding[field]] * (length - len(row[field])) for field in FIELDS}


def plain_losses(folder: Path, samples: list[dict[str, list[int]]], *, steps: int, batch: int, lr: float,
                 prepare: Any = None) -> list[tuple[float, float]]:
    """Losses and gradient norms of transformers' model and torch's AdamW on the samples in their order, one by one.

    `prepare(model)` may freeze and add what it likes.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if prepare is not None:
        prepare(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [item for item in learned if item.dim() > 1], "weight_decay": 0.01},
              {"params": [item for item in learned if item.dim() == 1], "weight_decay": 0.0}]
    optimizer, seen = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr), []
    for step in range(steps):
        chosen = [samples[number % len(samples)] for number in range(step * batch, (step + 1) * batch)]
        count = sum(label != -100 for sample in chosen for label in sample["labels"][1:])
        total = 0.0
        for sample in chosen:
            logits = model(torch.tensor([sample["input_ids"]])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(sample["labels"][1:]), reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((total, norm))
    return seen
