# SPDX-License-Identifier: Apache-2.0
"""modellink-eval against the Hugging Face backend of lm-evaluation-harness: questions per second on MMLU (5 examples) and BoolQ.

The same prompts (style lm-eval), the same checkpoint and dtype, in one run; the harness' model class is called from
Python on our requests, because its tasks would download their data. Its best of several batch sizes counts; the
contenders take turns and the best round of each counts. Both compute the four letters of a question in one pass; ours
also computes the common beginning of a subject's questions only once (here of one subject; the full set has 246 questions
per subject), and logits only where needed. Also compared: the log-likelihoods of `--compare` questions of MMLU, C-Eval
and BoolQ in fp32, and the texts of a fifth as many of BBH (chain of thought) and GSM8K; the run fails if they differ
(log-likelihoods by more than 1e-3).

    python benchmarks/eval.py [--model FOLDER] [--data FOLDER] [--dtypes float32 bfloat16] [--questions 96] [--compare 100]
                              [--rounds 2] [--json FILE]

`--model` (or MODELLINK_TEST_MODEL) is a Hugging Face folder; `--data` (or MODELLINK_TEST_DATA) holds the sets in their original
layouts. Needs lm-eval with what its Hugging Face models need.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PEER_BATCHES = (1, 4, 16)
SAME, TEXTS = ("mmlu", "ceval", "boolq"), ("bbh", "gsm8k")
TIMED_SUBJECTS = 1
LONGEST = 96  # tokens of a compared text


def questions(task: str, data: Path, count: int, subjects: int | None = None) -> list[Any]:
    """The first questions of each subject (or of the first `subjects`), `count` together, as a run would ask them."""
    from modellink.eval import EvalSettings
    from modellink.eval.job import prepare
    (job,) = prepare(task, data, EvalSettings("lm-eval"))
    chosen = job.subjects[:subjects]
    each = -(-count // len(chosen))
    return [question for subject in chosen for question in
            [question for question in job.questions if question.subject == subject.name][:each]][:count]


class Ours:
    def __init__(self, folder: Path, dtype: str) -> None:
        from modellink.eval.backends.local import LocalBackend
        self.backend = LocalBackend(folder, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        self.backend.load()

    def likelihoods(self, pairs: Sequence[tuple[str, str]], batch: int) -> list[float]:
        from modellink.eval import LikelihoodRequest
        assert self.backend._engine is not None
        self.backend._engine.forget()  # or the pages of an earlier round would be found again
        found = []
        for start in range(0, len(pairs), batch):
            requests = [LikelihoodRequest(*pair) for pair in pairs[start:start + batch]]
            found += [one.logprob for one in self.backend.loglikelihood(requests)]
        return found

    def texts(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
        from modellink.eval import GenerationRequest
        found = dict(self.backend.generate([GenerationRequest(context, until, LONGEST) for context, until in asked]))
        return [found[number].text for number in range(len(asked))]


class Harness:
    def __init__(self, folder: Path, dtype: str) -> None:
        from lm_eval.models.huggingface import HFLM
        self.model = HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=1)

    def likelihoods(self, pairs: Sequence[tuple[str, str]], batch: int) -> list[float]:
        from lm_eval.api.instance import Instance
        self.model.batch_size_per_gpu = batch
        asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return [value for value, _ in self.model.loglikelihood(asked, disable_tqdm=True)]

    def texts(self, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[str]:
        from lm_eval.api.instance import Instance
        self.model.batch_size_per_gpu = 1
        return self.model.generate_until([Instance("generate_until", {}, (context, {
            "until": list(until), "max_gen_toks": LONGEST, "do_sample": False}), number)
            for number, (context, until) in enumerate(asked)], disable_tqdm=True)


CONTENDERS = {"ours": Ours, "lm-eval": Harness}


def contender(name: str, folder: Path, data: Path, dtype: str) -> None:
    """A process of its own: loads, says so, then answers each line of standard input."""
    import torch
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out = os.fdopen(os.dup(1), "w")  # the libraries print
    os.dup2(2, 1)
    made = CONTENDERS[name](folder, dtype)
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        task, count, batch, subjects = json.loads(line)
        asked = questions(task, data, count, subjects)
        start = time.perf_counter()
        if task in TEXTS:
            found: list[Any] = made.texts([(one.context, one.generate.until) for one in asked])
        else:
            found = made.likelihoods([(one.context, choice) for one in asked for choice in one.choices], batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([time.perf_counter() - start, found, peak]), file=out, flush=True)


class Child:
    def __init__(self, name: str, options: argparse.Namespace, dtype: str) -> None:
        words = ["--contender", name, "--model", options.model, "--data", options.data, "--dtypes", dtype]
        self.process = subprocess.Popen([sys.executable, __file__, *map(str, words)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a contender has ended; its messages are above")
        return json.loads(line)

    def ask(self, task: str, count: int, batch: int, subjects: int | None = None) -> tuple[float, list[Any], int]:
        assert self.process.stdin is not None
        print(json.dumps([task, count, batch, subjects]), file=self.process.stdin, flush=True)
        seconds, found, peak = self.read()
        return seconds, found, peak

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def same(children: dict[str, Child], count: int) -> list[str]:
    """What differs between the two, in words; empty where nothing does."""
    problems = []
    for task in (*SAME, *TEXTS):
        ours, theirs = (
            children[name].ask(task, count if task in SAME else max(1, count // 5), 16)[1] for name in CONTENDERS)
        if task in SAME:
            worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
            print(f"{task}: {len(ours)} log-likelihoods, largest difference {worst:.2e}", flush=True)
            problems += [f"{task}: log-likelihoods differ by {worst:.2e}"] if worst > 1e-3 else []
        else:
            equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
            print(f"{task}: {equal} of {len(ours)} texts equal", flush=True)
            problems += [f"{task}: {len(ours) - equal} texts differ"] if equal < len(ours) else []
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("MODELLINK_TEST_MODEL"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MODELLINK_TEST_DATA"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--tasks", nargs="*", default=["mmlu", "boolq"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compare", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None or options.data is None:
        raise SystemExit("--model and --data are needed (or MODELLINK_TEST_MODEL and MODELLINK_TEST_DATA)")
    if options.contender:
        contender(options.contender, options.model, options.data, options.dtypes[0])
        return
    rows, problems = [], []
    for dtype in options.dtypes:
        children = {name: Child(name, options, dtype) for name in CONTENDERS}
        if dtype == "float32" and options.compare:
            problems += same(children, options.compare)
        for task in options.tasks:
            best: dict[str, tuple[float, int]] = {}
            peaks: dict[str, int] = {}
            for turn in range(options.rounds):
                for name, batches in (("ours", (128,)), ("lm-eval", PEER_BATCHES if turn == 0 else (best["lm-eval"][1],))):
                    for batch in batches if turn == 0 or name == "ours" else (batches[0],):
                        seconds, _, peak = children[name].ask(task, options.questions, batch, TIMED_SUBJECTS)
                        speed = options.questions / seconds
                        peaks[name] = peak
                        print(f"{dtype} {task} {name} batch {batch}: {speed:.2f} questions/s, {peak / 1e6:,.0f} MB", flush=True)
                        if name not in best or speed > best[name][0]:
                            best[name] = speed, batch
            rows.append({"claim": f"{task} {dtype}", "ours": best["ours"][0], "peer": best["lm-eval"][0], "unit": "questions/s",
                         "peer_name": f"lm-eval HF, batch {best['lm-eval'][1]}", "peak_memory": peaks["ours"],
                         "limit": None})
            print(f"{dtype} {task}: {best['ours'][0] / best['lm-eval'][0]:.2f} times", flush=True)
        for child in children.values():
            child.close()
    if options.json:
        options.json.write_text(json.dumps(rows))
    if problems:
        raise SystemExit("; ".join(problems))


if __name__ == "__main__":
    main()
