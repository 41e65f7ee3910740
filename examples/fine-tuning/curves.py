# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning against transformers and peft: the same samples in the same order, in fp32, in one chart.

    python examples/fine-tuning/curves.py --model ./SmolLM2-135M-Instruct --data alpaca_en_demo.json --work ./curves

It prepares the data and trains all weights, then adapters, with `modellink-train sft` and with a plain loop over
transformers (and peft), writes WORK/curves.svg and fails when two losses of a step differ by more than 1e-3. Our adapter
of query, key and value is one, with one A, and so is that of gate and up: in peft's model these modules share theirs,
which is the same model. Not shown here: speed (benchmarks/sft.py) and layouts (the tests of modellink-core).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SEED, R, ALPHA = 5, 8, 16
LORA = ["--lora-target-modules", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "--lora-r", str(R),
        "--lora-alpha", str(ALPHA)]
MODULES = {"self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
           "self_attention.linear_proj": ["self_attn.o_proj"], "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
           "mlp.linear_fc2": ["mlp.down_proj"]}
RATES = {"full": 1e-5, "lora": 2e-4}


def run(module: str, *words: str) -> None:
    print("$", module, *words, flush=True)
    subprocess.run([sys.executable, "-c", f"from {module} import main; main()", *words], check=True)


def prepare(given: argparse.Namespace) -> Path:
    """Preprocess the instruction set and return its prefix."""
    prefix = given.work / "data" / "alpaca"
    run("modellink.data_prep.cli", "--input", str(given.data), "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type",
        "chatml", "--tokenizer-name-or-path", str(given.model), "--output-prefix", str(prefix), "--seq-length",
        str(given.seq_length))
    return prefix


def ours(given: argparse.Namespace, prefix: Path, kind: str) -> list[float]:
    save = given.work / kind
    run("modellink.core.cli", "sft", "--load", str(given.model), "--data-path", str(prefix), "--no-shuffle",
        "--variable-seq-lengths", "--seq-length", str(given.seq_length), "--micro-batch-size", "1", "--global-batch-size",
        str(given.batch), "--train-iters", str(given.steps), "--lr", str(RATES[kind]), "--lr-decay-style", "constant", "--split",
        "1", "--eval-iters", "0", "--seed", str(SEED), "--log-interval", "10", "--save", str(save), "--device", "cpu",
        *(LORA if kind == "lora" else []))
    lines = (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def theirs(given: argparse.Namespace, prefix: Path, kind: str) -> list[float]:
    """Train with a plain loop and return the mean loss over learned tokens of each step."""
    import torch
    import transformers

    from modellink.data_prep.indexed import IndexedDataset

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model = with_adapters(model, given.model) if kind == "lora" else model
    fields = [IndexedDataset(Path(f"{prefix}_packed_{field}_document")) for field in ("input_ids", "labels")]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in learned if parameter.dim() > 1]
    norms = [parameter for parameter in learned if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}],
                                  lr=RATES[kind])
    losses = []
    for step in range(given.steps):
        rows = [[torch.tensor(field[number].astype("int64")) for field in fields]
                for number in range(step * given.batch, (step + 1) * given.batch)]
        count = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
        total = 0.0
        for ids, labels in rows:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def with_adapters(model: Any, folder: Path) -> Any:
    """Return the peft model with adapters initialized like ours."""
    import peft
    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core.adapters.saved import initial, targets
    from modellink.core.config import LoraConfig

    names = [part.rpartition(".")[2] for parts in MODULES.values() for part in parts]
    made: Any = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names))
    config = LoraConfig(lora_target_modules=tuple(name.rpartition(".")[2] for name in MODULES), lora_r=R)
    for name, weight in targets(open_checkpoint(folder).spec, config).items():
        _, _, layer, inside = name.removesuffix(".weight").split(".", 3)
        first = torch.nn.Parameter(initial(name, (R, weight.shape[1]), SEED))
        for part in MODULES[inside]:
            made.get_submodule(f"base_model.model.model.layers.{layer}.{part}").lora_A.default.weight = first
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a Llama.")
    parser.add_argument("--data", type=Path, required=True, help="JSON file of Alpaca rows.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=list(RATES), default=list(RATES))
    given = parser.parse_args()

    from modellink.core.train.curve import draw_lines

    given.work.mkdir(parents=True, exist_ok=True)
    prefix, lines, worst = prepare(given), {}, 0.0
    for kind in given.kinds:
        mine, reference = ours(given, prefix, kind), theirs(given, prefix, kind)
        difference = max(abs(a - b) for a, b in zip(mine, reference, strict=True))
        worst = max(worst, difference)
        print(f"{kind}: loss {mine[0]:.4f} to {mine[-1]:.4f}; largest difference in {given.steps} steps {difference:.1e}",
              flush=True)
        lines |= {f"{kind}, ModelLink": list(enumerate(mine, 1)),
                  f"{kind}, transformers{' + peft' if kind == 'lora' else ''}": list(enumerate(reference, 1))}
        (given.work / "curves.svg").write_text(draw_lines(lines, title="loss of fine-tuning, nats a token", x="step"), "utf-8")
    if worst > 1e-3:
        sys.exit(f"the losses differ by {worst:.1e}")


if __name__ == "__main__":
    main()
