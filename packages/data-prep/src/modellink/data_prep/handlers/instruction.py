# SPDX-License-Identifier: Apache-2.0
"""Encode conversations as training samples: `packed_input_ids`, `packed_attention_mask` and `packed_labels`, or pairwise fields.

The assistant's text is learned in every turn; of a ranking row, the two last answers. Packing is in packing.py; the output names
are those the original's loader expects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from modellink.data_prep.engines import flatten
from modellink.data_prep.handlers.fields import FieldMap
from modellink.data_prep.handlers.reading import Batch, Reading
from modellink.data_prep.handlers.rows import STYLES, Sample
from modellink.data_prep.templates.encoded import Encoded, Turn, share
from modellink.data_prep.templates.formats import ChatFormat, chat_format
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.constants import IGNORE_INDEX
from modellink.kernels.errors import ModelLinkError

INSTRUCTION = ("packed_input_ids", "packed_attention_mask", "packed_labels")
PAIRWISE = ("packed_chosen_input_ids", "packed_chosen_labels", "packed_rejected_input_ids", "packed_rejected_labels")


class Record(NamedTuple):
    """A sample: ids by output, without ids if it was skipped. `learned` counts the tokens with a label."""

    fields: dict[str, list[int]]
    note: str = ""
    learned: int = 0


class InstructionHandler:
    """Rows of any style, by file; see `Handler`.

    Args:
        default_prompt_type: the prompt type if none is given.
    """

    small_ids = False

    def __init__(self, tokenizer: Tokenizer, reading: Reading, default_prompt_type: str | None = None) -> None:
        named = reading.prompt_type or reading.template or reading.hf_chat_template
        self._form = chat_format(tokenizer, reading.prompt_type or (None if named else default_prompt_type), reading.template,
                                 reading.hf_chat_template, date.fromisoformat(reading.date) if reading.date else None)
        self._reading, self.wording = reading, self._form.wording
        maps = {path: FieldMap.from_json(text) for path, text in reading.maps}
        self.ranking = any(names.ranking for names in maps.values())
        if len({names.ranking for names in maps.values()}) > 1:
            raise ModelLinkError("some inputs have ranked answers and some do not", where="--input",
                                 fix="preprocess them as two sets")
        self._readers = {path: _Rows(self._form, names, reading) for path, names in maps.items()}
        self.outputs = list(PAIRWISE if self.ranking else INSTRUCTION)

    def rows_of(self, path: Path) -> _Rows:
        return self._readers.get(str(path)) or self._readers[""]

    def encode(self, samples: Sequence[Record]) -> Batch:
        return Batch({name: flatten([sample.fields.get(name, []) for sample in samples]) for name in self.outputs},
                     **{note: sum(sample.note == note for sample in samples) for note in ("cut", "dropped", "empty")},
                     learned=sum(sample.learned for sample in samples))


class _Rows:
    """Reads the rows of the files that share a map."""

    def __init__(self, form: ChatFormat, names: FieldMap, reading: Reading) -> None:
        self._form, self._names, self._reading, self._parse = form, names, reading, STYLES[names.style]
        self.columns, self.optional = names.column_names(needed=True), names.column_names(needed=False)
        self.named = names.named_columns()
        self._eod = [form.eos_token_id] if reading.append_eod else []

    def parse(self, row: Mapping[str, Any]) -> Record:
        try:
            sample = self._parse(row, self._names)
            if sample.has_gap:  # as the original does: an empty answer would teach the model to answer nothing
                return Record({}, "empty")
            return self._ranked(sample) if self._names.ranking else self._learned(sample)
        except ModelLinkError as error:  # an error of the template or of a tool concerns only this row
            raise ValueError(error.what) from None

    def _learned(self, sample: Sample) -> Record:
        encoded = self._form.encode(sample.conversation)
        encoded = replace(encoded, ending=encoded.ending + self._eod)
        fitted = self._fit(encoded)
        if fitted is None:
            return Record({}, "dropped")
        labels = fitted.labels(train_on_prompt=self._reading.train_on_prompt)
        return Record(dict(zip(INSTRUCTION, (fitted.ids, [1] * len(labels), labels), strict=True)),
                      "" if fitted is encoded else "cut", sum(label != IGNORE_INDEX for label in labels))

    def _fit(self, encoded: Encoded) -> Encoded | None:
        limit = self._reading.seq_length
        if limit is None or len(encoded) <= limit:
            return encoded
        fitted = encoded.fit(limit) if self._reading.long_samples == "cut" else None
        return fitted if fitted and any(turn.target for turn in fitted.turns) else None

    def _ranked(self, sample: Sample) -> Record:
        prompts, answers = [], []
        for answer in (sample.chosen, sample.rejected):
            assert answer is not None
            spoken = replace(sample.conversation, turns=[*sample.conversation.turns, answer])
            source, target = _last_answer(self._form.encode(spoken))
            prompts.append(source)
            answers.append(target + self._eod)
        limit, note = self._reading.seq_length, ""
        sizes = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        if limit is not None and max(sizes) > limit:
            if self._reading.long_samples == "drop":
                return Record({}, "dropped")
            kept, most = share(len(prompts[0]), max(map(len, answers)), limit)
            prompts, answers, note = [prompt[:kept] for prompt in prompts], [answer[:most] for answer in answers], "cut"
            if not most:
                return Record({}, "dropped")
        fields = [(prompt + answer, [*(prompt if self._reading.train_on_prompt else [IGNORE_INDEX] * len(prompt)), *answer])
                  for prompt, answer in zip(prompts, answers, strict=True)]
        return Record(dict(zip(PAIRWISE, (ids for pair in fields for ids in pair), strict=True)), note,
                      sum(map(len, answers)))


def _last_answer(encoded: Encoded) -> tuple[list[int], list[int]]:
    """Split a conversation into everything before the last answer, and the answer with its end tokens."""
    last = max(index for index, turn in enumerate(encoded.turns) if turn.target)
    before = Encoded([*encoded.turns[:last], Turn(encoded.turns[last].source, [])])
    return before.ids, encoded.turns[last].target + encoded.ending
