"""What a row means: a handler takes the columns it needs and makes token ids for each of its output files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from modellink.data_prep.handlers.pretrain import GeneralPretrainHandler
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError, near


class Handler(Protocol):
    """One way to read rows.

    Attributes:
        columns: what every row must have.
        outputs: names of the output files, `{prefix}_{name}_document`.
        small_ids: whether two bytes a token may be used (labels of -100 would not fit them).
    """

    columns: list[str]
    outputs: list[str]
    small_ids: bool

    def parse(self, row: Mapping[str, Any]) -> Any:
        """The sample in a row; ValueError says why there is none."""

    def encode(self, samples: Sequence[Any]) -> list[dict[str, list[int]]]:
        """Token ids of each sample for each output, in the order of the samples."""


HANDLERS = {"GeneralPretrainHandler": GeneralPretrainHandler}


def make_handler(name: str, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> Handler:
    """The handler of that name.

    Raises:
        ModelLinkError: there is none, or the tokenizer lacks what it needs.
    """
    if name not in HANDLERS:
        raise ModelLinkError(f"there is no handler {name!r}", where="--handler-name",
                             fix=near(name, list(HANDLERS)) or f"there are: {', '.join(HANDLERS)}")
    return HANDLERS[name](tokenizer, keys, append_eod)
