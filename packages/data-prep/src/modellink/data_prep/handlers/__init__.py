# SPDX-License-Identifier: Apache-2.0
"""Handlers: each reads its columns of a row and encodes them to token ids for each of its outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from modellink.data_prep.handlers.fields import field_map, known_handlers
from modellink.data_prep.handlers.pretrain import GeneralPretrainHandler, TextHandler
from modellink.data_prep.handlers.reading import Batch, PlainTokenizer, Reading
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError, near

__all__ = ["Batch", "Handler", "Reading", "Rows", "choose_maps", "make_handler", "trains_on_chats"]

PLAIN = ("columns", "text")  # styles that are not conversations


class Rows(Protocol):
    """How the rows of one file are read. `columns` are required, `optional` are not; the user asked for those in `named`."""

    columns: list[str]
    optional: list[str]
    named: list[str]

    def parse(self, row: Mapping[str, Any]) -> Any:
        """Return the sample in a row; raise ValueError with the reason if the row has none."""


class Handler(Protocol):
    """One way to read rows.

    Attributes:
        outputs: names of the output files, `{prefix}_{name}_document`.
        small_ids: whether tokens fit two bytes (labels of -100 do not).
        ranking: whether samples are pairs of answers.
        wording: the text put around samples.
    """

    outputs: list[str]
    wording: str
    small_ids: bool
    ranking: bool

    def rows_of(self, path: Path) -> Rows: ...

    def encode(self, samples: Sequence[Any]) -> Batch:
        """Return the token ids of each sample for each output, in the order of the samples."""


def trains_on_chats(name: str) -> bool:
    """Return whether the handler makes instruction sets; an unknown name raises an error that lists the handlers."""
    return _about(name)["style"] not in PLAIN


def choose_maps(name: str, map_keys: str | None, inputs: Sequence[str],
                folder: Path | None) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return the input files and how each is read (see `Reading.maps`).

    Args:
        map_keys: JSON of `--map-keys`.
        folder: the folder of dataset_info.json.

    Raises:
        ModelLinkError: the handler is unknown, or the map does not fit it.
    """
    about = _about(name)
    given = _object(map_keys)
    if about["style"] in (*PLAIN, "dataset_info") and given is not None:
        raise ModelLinkError(f"{name} has no columns to map", where="--map-keys", fix="remove --map-keys")
    if about["style"] in PLAIN:
        return tuple(inputs), ()
    if about["style"] == "dataset_info":
        from modellink.data_prep.handlers.dataset_info import find_datasets

        found = find_datasets(inputs, folder)
        return tuple(path for path, _ in found), tuple((path, names.to_json()) for path, names in found)
    extra = {key: value for key, value in about.items() if key in ("prompt_ends_at", "user_mark", "assistant_mark")}
    names = field_map(about["style"], given, ranking=about.get("ranking", False), own=about.get("columns"), extra=extra)
    return tuple(inputs), (("", names.to_json()),)


def make_handler(tokenizer: Tokenizer, reading: Reading) -> Handler:
    """Make the handler that `reading` names.

    Raises:
        ModelLinkError: the handler is unknown, or the tokenizer lacks a token it needs.
    """
    about = _about(reading.handler)
    if about["style"] not in PLAIN:
        from modellink.data_prep.handlers.instruction import InstructionHandler  # templates, which plain text does not need

        return InstructionHandler(tokenizer, reading, about.get("prompt_type"))
    if reading.prompt_type or reading.template or reading.hf_chat_template:
        raise ModelLinkError(f"{reading.handler} reads plain text and uses no template", where="--prompt-type",
                             fix="choose an instruction handler, e.g. AlpacaStyleInstructionHandler, or remove the option")
    return make_plain_handler(tokenizer, reading)


def make_plain_handler(tokenizer: PlainTokenizer, reading: Reading) -> Handler:
    """Make the plain-text handler that `reading` names."""
    about = _about(reading.handler)
    return GeneralPretrainHandler(tokenizer, reading) if about["style"] == "columns" else TextHandler(tokenizer, reading, about)


def _about(name: str) -> dict[str, Any]:
    known = known_handlers()
    if name not in known:
        raise ModelLinkError(f"unknown handler {name!r}", where="--handler-name",
                             fix=f"{near(name, list(known))} known: {', '.join(known)}".strip())
    return known[name]


def _object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelLinkError(f"not JSON: {error}", where="--map-keys",
                             fix="quote it, e.g. '{\"prompt\": \"question\"}'") from None
    if not isinstance(value, dict):
        raise ModelLinkError(f"a {type(value).__name__} where a JSON object is expected", where="--map-keys")
    return value
