# SPDX-License-Identifier: Apache-2.0
"""Compare results of the quickstart: a resumed run equals the uninterrupted one bit for bit, and transformers computes our logits.

Usage: compare.py training STRAIGHT RESUMED --from-iteration N
       compare.py logits CHECKPOINT HUGGING_FACE_FOLDER --before HUGGING_FACE_FOLDER --text FILE.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

TEXT = "A list in Python is a mutable sequence. Its elements are accessed with an index, and it grows with append().\n\n" * 4
DOCUMENTS = 8


def training(straight: Path, resumed: Path, first: int) -> None:
    """Compare losses, gradient norms and final weights."""
    from modellink.ckpt_convert import open_checkpoint
    from modellink.ckpt_convert.verify import compare

    def steps(folder: Path) -> list[tuple[int, float, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines if line["iteration"] >= first]

    ours, theirs = steps(straight), steps(resumed)
    if not ours or ours != theirs:
        sys.exit(f"the runs differ:\n{ours}\n{theirs}")
    count = compare(open_checkpoint(straight), open_checkpoint(resumed))
    print(f"iterations {first} to {ours[-1][0]}: losses and gradient norms are equal to the bit, and {count} weights after them")


def logits(checkpoint: Path, folder: Path, before: Path, text: Path) -> None:
    """Compare the logits of a text, ours from the training checkpoint and those of transformers from the Hugging Face folder, in fp32;
    and the loss of transformers before and after training on the training documents."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modellink.infer import load

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    ours = load(checkpoint, dtype=torch.float32).network.run_model(ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(ids).logits
    worst, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"{ids.numel()} tokens x {theirs.size(-1)} logits up to {largest:.1f}: largest difference {worst:.1e}")
    if not worst < 1e-5 * largest:
        sys.exit("transformers computes something else")

    with open(text, encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in itertools.islice(file, DOCUMENTS)]
    rows = [torch.tensor([tokenizer(document).input_ids[:256]]) for document in documents]

    def loss(of: Any) -> float:
        with torch.no_grad():
            return sum(of(row, labels=row).loss.item() for row in rows) / len(rows)

    first, last = loss(AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)), loss(model)
    print(f"loss on the first {DOCUMENTS} documents of the data: {first:.4f} before training, {last:.4f} after")
    if not last < first:
        sys.exit("training did not lower the loss")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["training", "logits"])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--from-iteration", type=int, default=1)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "training":
        training(arguments.first, arguments.second, arguments.from_iteration)
    else:
        logits(arguments.first, arguments.second, arguments.before, arguments.text)
