"""A conversation as ids, turn by turn: what is asked and what is learned. From here come labels and the rule for long ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from modellink.kernels.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Turn:
    """Ids of what is asked (with everything a template puts around it) and of the answer.

    Attributes:
        closing: the label of the first source token, where a template ends the answer before with it; else None.
    """

    source: list[int]
    target: list[int]
    closing: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Turns and, at the end, ids that close the sample. They are learned unless `breaks_off`: the last answer was cut."""

    turns: list[Turn]
    ending: list[int] = field(default_factory=list)
    breaks_off: bool = False

    @property
    def ids(self) -> list[int]:
        return [index for turn in self.turns for index in (*turn.source, *turn.target)] + self.ending

    def labels(self, *, train_on_prompt: bool = False) -> list[int]:
        """As long as `ids` and not shifted: an id where it is learned, -100 elsewhere."""
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
        """As long as `ids`: what the assistant says."""
        return [label != IGNORE_INDEX for label in self.labels()]

    def __len__(self) -> int:
        return sum(len(turn.source) + len(turn.target) for turn in self.turns) + len(self.ending)

    def fit(self, limit: int) -> Encoded:
        """At most `limit` ids, cut so that labels survive: each turn by the rule of `share`, turns without room are left out.

        After an answer that was cut no end is learned: it would teach to stop in the middle of a sentence.
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
    """How many ids of a source and of a target are kept in `room`.

    A short target (under half the room) is kept whole, else a short source is, else both in proportion.
    """
    if 2 * target < room:
        most = room
    elif 2 * source < room:
        most = room - source
    else:
        most = int(room * target / (source + target))
    kept = min(most, target)
    return min(max(room - kept, 0), source), kept
