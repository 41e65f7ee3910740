# SPDX-License-Identifier: Apache-2.0
"""A conversation as ids, turn by turn, split into source and learned target; labels and the rule for long samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from modellink.kernels.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Turn:
    """Ids of the question (with all text of the template around it) and of the answer.

    Attributes:
        closing: label of the first source token if a template ends the previous answer with it, else None.
    """

    source: list[int]
    target: list[int]
    closing: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Turns, and ids that close the sample; these are learned unless `breaks_off` (the last answer was cut)."""

    turns: list[Turn]
    ending: list[int] = field(default_factory=list)
    breaks_off: bool = False

    @property
    def ids(self) -> list[int]:
        return [index for turn in self.turns for index in (*turn.source, *turn.target)] + self.ending

    def labels(self, *, train_on_prompt: bool = False) -> list[int]:
        """Return the labels, aligned with `ids` and not shifted: the id where it is learned, -100 elsewhere."""
        ending = [IGNORE_INDEX] * len(self.ending) if self.breaks_off else self.ending
        if train_on_prompt:
            return [index for turn in self.turns for index in (*turn.source, *turn.target)] + ending
        found: list[int] = []
        for turn in self.turns:
            source = [IGNORE_INDEX] * len(turn.source)
            if turn.closing is not None and source:
                source[0] = turn.closing
            found += source + turn.target
        return found + ending

    @property
    def learned(self) -> list[bool]:
        """Return a mask aligned with `ids`, true for the tokens of the assistant."""
        return [label != IGNORE_INDEX for label in self.labels()]

    def __len__(self) -> int:
        return sum(len(turn.source) + len(turn.target) for turn in self.turns) + len(self.ending)

    def fit(self, limit: int) -> Encoded:
        """Cut to at most `limit` ids such that labels remain: each turn by the rule of `share`; others are dropped.

        After an answer that was cut, no end token is learned: it would teach the model to stop in mid-sentence.
        """
        if len(self) <= limit:
            return self
        room, turns, breaks_off = limit - len(self.ending), list[Turn](), False
        for turn in self.turns:
            if room <= 0:
                break
            source, target = share(len(turn.source), len(turn.target), room)
            closing = None if breaks_off else turn.closing
            turns.append(Turn(turn.source[:source], turn.target[:target], closing))
            if turn.target:
                breaks_off = target < len(turn.target)
            room -= source + target
        return replace(self, turns=turns, breaks_off=breaks_off)


def share(source: int, target: int, room: int) -> tuple[int, int]:
    """Return how many ids of a source and of a target are kept within `room` ids.

    A target shorter than half the room is kept in full, otherwise a short source is, otherwise both are cut in proportion.
    """
    if 2 * target < room:
        most = room
    elif 2 * source < room:
        most = room - source
    else:
        most = int(room * target / (source + target))
    kept = min(most, target)
    return min(max(room - kept, 0), source), kept
