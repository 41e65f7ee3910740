"""Training data for ModelLink: text, parquet and chats in, Megatron-compatible .bin/.idx out."""

from modellink.data_prep.detokenize import StreamDecoder
from modellink.data_prep.indexed import IndexedDataset, IndexedWriter
from modellink.data_prep.merge import merge
from modellink.data_prep.preprocess import PreprocessOptions, Summary, preprocess
from modellink.data_prep.templates.chat import encode_chat, render_chat
from modellink.data_prep.tokenizer import Tokenizer

__all__ = ["IndexedDataset", "IndexedWriter", "PreprocessOptions", "StreamDecoder", "Summary", "Tokenizer", "encode_chat",
           "merge", "preprocess", "render_chat"]

__version__ = "0.1.0"
