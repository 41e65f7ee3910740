# SPDX-License-Identifier: Apache-2.0
"""Constants that several packages must agree on."""

from __future__ import annotations

HF_CHAT_TEMPLATE = "hf-chat-template"
"""The prompt type that stands for the chat template of the model's own tokenizer."""
IGNORE_INDEX = -100
"""The label of a token that does not count in the loss."""
