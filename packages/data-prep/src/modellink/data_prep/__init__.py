"""Training data for ModelLink: text, parquet and chats in, Megatron-compatible .bin/.idx out."""

__version__ = "0.1.0"
