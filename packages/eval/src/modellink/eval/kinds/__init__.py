# SPDX-License-Identifier: Apache-2.0
"""The kinds of answers: the most likely choice, a text that contains an answer, a program. Each queries a backend and marks."""

from modellink.eval.kinds.kind import Kind, kind_of

__all__ = ["Kind", "kind_of"]
