# SPDX-License-Identifier: Apache-2.0
"""Choosing the form of an op: the fused one of the tensor's device, or the plain one if that is requested.

Not here: the forms, which are in each op's own file, and products joined with a collective
(matmul_collective.py), whose plain form has the same arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

Form = TypeVar("Form")
OPS = frozenset({"adamw", "attention", "attention_block", "grouped_matmul", "linear", "ring_update",
                 "rms_norm", "rotary", "swiglu"})
"""The ops that have several forms."""
_plain: frozenset[str] = frozenset()


def form_of(op: str, device_type: str, forms: Mapping[str, Form], plain: Form) -> Form:
    """Return the form of `op` for tensors on a device of this type."""
    return plain if op in _plain else forms.get(device_type, plain)


@contextlib.contextmanager
def plain_forms(*ops: str) -> Iterator[None]:
    """Use the plain form of these ops on every device inside the block, to trace a numerical problem to one
    of them.

    This holds for the whole process, because backward passes run in other threads.

    Raises:
        ValueError: there is no such op, or it has only one form.
    """
    global _plain
    if unknown := sorted(set(ops) - OPS):
        raise ValueError(f"{', '.join(unknown)} is not one of {', '.join(sorted(OPS))}")
    before, _plain = _plain, _plain | set(ops)
    try:
        yield
    finally:
        _plain = before
