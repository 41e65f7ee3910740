"""Benchmark scores for language models, local or behind an endpoint."""

__version__ = "0.1.0"
