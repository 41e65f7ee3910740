# SPDX-License-Identifier: Apache-2.0
"""The answer is a program, which runs with a test in a sandbox; several samples give pass@k.

pass@k by the unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, section
2.1: of n samples c pass, then 1 - C(n - c, k) / C(n, k).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import comb
from typing import Any

from modellink.eval.backends.backend import Backend, Completion
from modellink.eval.kinds.texts import write
from modellink.eval.prompts import EvalSettings, Question
from modellink.eval.sandbox import Sandbox
from modellink.eval.score import Mark
from modellink.kernels.errors import ModelLinkError

NAME = "generated program, tests passed"
TOGETHER = False
KS = (1, 2, 5, 10, 20, 50, 100)
BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:\n```|\Z)", re.DOTALL)
PASSED = "passed"


def ask(backend: Backend, questions: Sequence[Question], settings: EvalSettings, sandbox: Sandbox | None,
        ) -> Iterator[tuple[int, dict[str, Any]]]:
    if sandbox is None:
        raise ModelLinkError("the answers are programs, and running them is not allowed", where="--allow-code-execution")
    running: list[tuple[int, list[Completion], list[Future[str]]]] = []
    with ThreadPoolExecutor(sandbox.workers) as pool:  # programs run while others are generated
        for number, texts in write(backend, questions, settings, settings.samples):
            question = questions[number]
            programs = [complete(question.program, text.text, chat=settings.chat is not None) for text in texts]
            running.append((number, texts, [
                pool.submit(sandbox.passes, question.program, program, question.target, question.entry) for program in programs]))
            for one in [one for one in running if all(outcome.done() for outcome in one[2])]:
                running.remove(one)
                yield _answer(*one)
        for one in running:
            yield _answer(*one)


def _answer(number: int, texts: Sequence[Completion], outcomes: Sequence[Future[str]]) -> tuple[int, dict[str, Any]]:
    return number, {"texts": [text.text for text in texts], "outcomes": [outcome.result() for outcome in outcomes],
                    "dropped": max(text.dropped for text in texts)}


def mark(question: Question, answer: dict[str, Any]) -> Mark:
    outcomes = answer["outcomes"]
    count, passed = len(outcomes), outcomes.count(PASSED)
    failed = next((number for number, outcome in enumerate(outcomes) if outcome != PASSED), 0)
    return Mark(passed / count, f"{outcomes[failed]}\n{answer['texts'][failed]}", PASSED,
                also={f"pass@{k}": pass_at_k(count, passed, k) for k in sorted({*KS, count}) if k <= count})


def pass_at_k(count: int, passed: int, k: int) -> float:
    """Return the probability that one of k samples passes, given that `passed` of `count` did."""
    return 1.0 - comb(count - passed, k) / comb(count, k)


def complete(prompt: str, text: str, *, chat: bool) -> str:
    """Return the program: the prompt and its continuation, or the code block of a chat answer.

    In plain text a fence ends the code, since a document may continue after it; only a text that begins with a fence is a block.
    """
    block = BLOCK.search(text) if chat or text.lstrip().startswith("```") else None
    if block is None or not block[1].strip():
        return prompt + text.partition("\n```")[0]
    return f"{prompt}\n    pass\n\n{block[1]}\n" if re.search(r"^def ", block[1], re.MULTILINE) else prompt + block[1]
