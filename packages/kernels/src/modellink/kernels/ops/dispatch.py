"""Which form of an op is taken: the fused one of a tensor's device, or the plain one where that is asked for.

Not here: the forms, which stand in each op's own file; what joins a product with a collective (matmul_collective.py),
whose plain form has the same arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

Form = TypeVar("Form")
OPS = frozenset({"adamw", "attention", "attention_block", "grouped_matmul", "linear", "ring_update", "rms_norm", "rotary",
                 "swiglu"})
"""Those with a choice."""
_plain: frozenset[str] = frozenset()


def form_of(op: str, device_type: str, forms: Mapping[str, Form], plain: Form) -> Form:
    """The form of `op` for tensors on a device of this type."""
    return plain if op in _plain else forms.get(device_type, plain)


@contextlib.contextmanager
def plain_forms(*ops: str) -> Iterator[None]:
    """Inside, these ops take their plain form on every device: a numeric trouble can so be traced to one of them.

    It holds for the whole process, whose backward passes run in threads of their own.

    Raises:
        ValueError: there is no such op, or it has no choice.
    """
    global _plain
    if unknown := sorted(set(ops) - OPS):
        raise ValueError(f"{', '.join(unknown)} is not one of {', '.join(sorted(OPS))}")
    before, _plain = _plain, _plain | set(ops)
    try:
        yield
    finally:
        _plain = before
