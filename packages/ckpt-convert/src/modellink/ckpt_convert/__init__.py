"""Checkpoint conversion between Hugging Face and Megatron layouts, and the one description of a model (ModelSpec)."""

__version__ = "0.1.0"
