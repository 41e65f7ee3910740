# SPDX-License-Identifier: Apache-2.0
"""The quickstart: real text and real weights through every package, with the commands a user would type.

    python -m nox -s quickstart [-- --layout tp3|tp1pp2|dp2|tp3pp2]

Every command is printed before it runs; a table of seconds and peak memory follows at the end; the results stay in
`./quickstart/LAYOUT/`. A step that fails ends the script with its status.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from steps import Steps

HERE = Path(__file__).resolve().parent
LAYOUTS = {  # options of training, options of the Megatron checkpoint it starts from
    "tp3": (["--tp", "3", "--sequence-parallel"], ["--tp", "3", "--pp", "1"]),
    "tp1pp2": (["--pp", "2"], ["--pp", "2"]),
    "dp2": (["--nproc-per-node", "2", "--use-distributed-optimizer"], []),
    "tp3pp2": (["--tp", "3", "--pp", "2", "--sequence-parallel"], ["--tp", "3", "--pp", "2"])}
TURN = "What is the capital of France? Answer in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="tp3")
    parser.add_argument("--folder", type=Path, default=Path("quickstart"))
    parser.add_argument("--weights", type=Path, help="a Hugging Face folder to use instead of SmolLM2")
    parser.add_argument("--iterations", type=int, default=20, help="training iterations, an even number")
    parser.add_argument("--seq-length", type=int, default=384)
    parser.add_argument("--lr", default="1e-5")
    arguments = parser.parse_args()
    folder, half = arguments.folder / arguments.layout, arguments.iterations // 2
    weights = arguments.weights or arguments.folder / "SmolLM2-135M-Instruct"
    data = arguments.folder / "data" / "python"
    training, checkpoint = LAYOUTS[arguments.layout]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = Steps()

    steps.title("1. Real weights: SmolLM2-135M-Instruct as a Hugging Face folder")
    if weights.exists():
        print(f"{weights} already exists")
    else:
        steps.run("weights", sys.executable, HERE / "weights.py", weights)

    steps.title("2. Real text to tokens")
    text = arguments.folder / "text.jsonl"
    steps.run("text", sys.executable, HERE / "text.py", text)
    steps.run("preprocess", "modellink-preprocess", "--input", text, "--output-prefix", data, "--append-eod", "--workers", "2",
              "--tokenizer-name-or-path", weights, "--overwrite")

    steps.title("3. Hugging Face to Megatron-Core, every tensor compared")
    if arguments.layout == "tp3":  # 9 heads in 3 groups: two ranks cannot share them
        steps.run("convert (refused)", "modellink-convert", weights, folder / "tp2", "--to", "megatron-core", "--tp", "2",
                  expect=2)
    steps.run("convert", "modellink-convert", weights, folder / "megatron", "--to", "megatron-core", *checkpoint, "--verify")

    steps.title(f"4. Pretraining: {arguments.iterations} iterations; and again, stopped after {half} and resumed")
    pretrain = ["modellink-train", "pretrain", *training, "--data-path", f"{data}_text_document", "--split", "95,5,0",
                "--seq-length", arguments.seq_length, "--micro-batch-size", "1", "--global-batch-size", "2",
                "--train-iters", arguments.iterations, "--lr", arguments.lr, "--lr-decay-style", "constant",
                "--lr-warmup-iters", "2", "--log-interval", "1", "--eval-iters", "2"]
    steps.run("train", *pretrain, "--load", folder / "megatron", "--save", folder / "straight",
              "--tensorboard-dir", folder / "events")
    steps.run("train, stopped", *pretrain, "--load", folder / "megatron", "--save", folder / "resumed", "--exit-interval", half)
    steps.run("train, resumed", *pretrain, "--load", folder / "resumed", "--save", folder / "resumed")
    steps.run("compare", sys.executable, HERE / "compare.py", "training", folder / "straight", folder / "resumed",
              "--from-iteration", half + 1)

    steps.title("5. Back to Hugging Face; transformers computes the logits that we compute")
    steps.run("convert back", "modellink-convert", folder / "resumed", folder / "hf", "--to", "hf", "--verify")
    steps.run("compare logits", sys.executable, HERE / "compare.py", "logits", folder / "resumed", folder / "hf",
              "--before", weights, "--text", text)

    steps.title("6. Text, token by token: a plain prompt, then a chat turn in the model's own template")
    generate = ["modellink-infer", "generate", "--load", folder / "resumed", "--stream"]
    steps.run("generate", *generate, "--prompt", "A list in Python is", "--max-new-tokens", "40")
    steps.run("generate, chat", *generate, "--chat", "--prompt", TURN, "--max-new-tokens", "40")

    steps.title("7. Scores")
    for task in ("boolq", "mmlu"):
        steps.run(f"eval {task}", "modellink-eval", "run", "--task", task, "--task-data-path", HERE / "eval-data" / task,
                  "--load", folder / "resumed", "--output", folder / f"eval-{task}")

    steps.table(folder / "steps.json")
    losses(folder, arguments.folder)


def losses(folder: Path, top: Path) -> None:
    """Print the loss of this layout and compare it with those of earlier layouts."""
    curves = {path.parent.parent.name: [json.loads(line)["loss"] for line in path.read_text().splitlines()]
              for path in sorted(top.glob("*/straight/metrics.jsonl"))}
    mine = curves.pop(folder.name)
    print(f"loss at {folder.name}: {mine[0]:.6f} in the first iteration, {mine[-1]:.6f} in the last; "
          f"curve in {folder / 'straight' / 'loss.svg'}")
    for name, other in curves.items():
        if len(other) == len(mine):
            worst = max(abs(a - b) / b for a, b in zip(mine, other, strict=True))
            print(f"largest relative difference from {name}: {worst:.1e}")
            if worst > 2e-5:
                sys.exit("the layouts do not agree")


if __name__ == "__main__":
    main()
