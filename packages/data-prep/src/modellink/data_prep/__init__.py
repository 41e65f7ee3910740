# SPDX-License-Identifier: Apache-2.0
"""Training data for ModelLink: text, parquet and chats in, Megatron-compatible .bin/.idx out."""

from modellink.data_prep.detokenize import StreamDecoder
from modellink.data_prep.indexed import IndexedDataset, IndexedWriter
from modellink.data_prep.merge import merge
from modellink.data_prep.preprocess import PreprocessOptions, Summary, preprocess
from modellink.data_prep.templates.chat import encode_chat, render_chat
from modellink.data_prep.templates.conversation import Conversation, from_messages
from modellink.data_prep.templates.encoded import Encoded
from modellink.data_prep.templates.formats import ChatFormat, chat_format
from modellink.data_prep.templates.template import template_names
from modellink.data_prep.tokenizer import Tokenizer

__all__ = ["ChatFormat", "Conversation", "Encoded", "IndexedDataset", "IndexedWriter", "PreprocessOptions", "StreamDecoder",
           "Summary", "Tokenizer", "chat_format", "encode_chat", "from_messages", "merge", "preprocess", "render_chat",
           "template_names"]

__version__ = "0.1.0"
