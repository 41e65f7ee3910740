"""Prompts: how a conversation becomes the one text a model reads."""
