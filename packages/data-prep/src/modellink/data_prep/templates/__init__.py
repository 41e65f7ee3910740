# SPDX-License-Identifier: Apache-2.0
"""Prompts: how a conversation becomes the one text a model reads."""
