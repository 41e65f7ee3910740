# SPDX-License-Identifier: Apache-2.0
"""A language model small enough for tests: characters after the two before them, learned from English text and from the prompt.

As a script it evaluates: `python ngram.py TASK DATA OUTPUT STYLE BATCH [SECONDS]`, SECONDS being slept before each batch.
"""

import math
import pydoc_data.topics
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

from modellink.eval import Completion, Likelihood, evaluate

TEXT = " ".join(pydoc_data.topics.topics[name] for name in ("assert", "with", "yield", "numbers"))
ALPHABET = 256  # characters a smoothed count is spread over


def counts(text):
    return (Counter(text), Counter(pairwise(text)), Counter(zip(text, text[1:], text[2:], strict=False)))


class NgramBackend:
    """Log-probabilities are exact and do not depend on other requests of the batch."""

    def __init__(self, name="ngram", pause=0.0):
        self.name, self.pause, self.asked = name, pause, []
        self.english = counts(TEXT)

    def describe(self):
        return {"name": self.name, "fingerprint": f"{self.name}-1"}

    def loglikelihood(self, requests):
        time.sleep(self.pause)
        self.asked += requests
        learned = {request.context: counts(request.context) for request in requests}
        return [self._one(request, learned[request.context]) for request in requests]

    def generate(self, requests):
        """The end of what was asked, a digit of its length and `The answer is N.`: some of it is right by luck."""
        self.asked += requests
        for number, request in reversed(list(enumerate(requests))):  # in an order of its own
            time.sleep(self.pause)
            length = len(request.context)
            yield number, Completion(f" {length % 7} so the answer is {length % 3}. The answer is {length % 5}."
                                  if length % 4 else " no idea")

    def _one(self, request, learned):
        text = request.continuation[-1:] if request.alone else request.continuation
        before, total, greedy = request.context[-2:], 0.0, True
        for character in text:
            chances = {other: self._chance(before, other, learned) for other in {*learned[0], *self.english[0], character}}
            total += math.log(chances[character])
            greedy &= chances[character] == max(chances.values())
            before = (before + character)[-2:]
        return Likelihood(total, greedy)

    def _chance(self, before, character, learned):
        (one, two, three), (own1, own2, own3) = self.english, learned
        first, second = before[-2:-1], before[-1:]
        value = (1 + one[character] + 5 * own1[character]) / (ALPHABET + one.total() + 5 * own1.total())
        value = (value * 4 + two[second, character] + 5 * own2[second, character]) / (4 + one[second] + 5 * own1[second])
        return (value * 4 + three[first, second, character] + 5 * own3[first, second, character]) / (
            4 + two[first, second] + 5 * own2[first, second])


if __name__ == "__main__":
    task, data, output, style, batch, *pause = sys.argv[1:]
    evaluate(task, Path(data), NgramBackend(pause=float(pause[0]) if pause else 0.0), output, prompt_style=style,
             batch_size=int(batch))
