"""The kinds of answers: the most likely choice, a text that holds an answer, a program. Each asks a backend and gives marks."""

from modellink.eval.kinds.kind import Kind, kind_of

__all__ = ["Kind", "kind_of"]
