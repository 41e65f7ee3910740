# SPDX-License-Identifier: Apache-2.0
"""Reads the prompts of `generate`: from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from modellink.infer.options import PromptOptions
from modellink.kernels.errors import ModelLinkError


def read_prompts(options: PromptOptions) -> list[Any]:
    """Return the prompts: texts, or with --chat lists of messages.

    Raises:
        ModelLinkError: there is no prompt, or a file cannot be read.
    """
    if options.prompt_file is not None:
        prompts, where = read_prompt_file(options.prompt_file), str(options.prompt_file)
    elif options.prompt:
        prompts, where = list(options.prompt), "--prompt"
    else:
        prompts, where = [sys.stdin.read().removesuffix("\n")], "stdin"
    if not prompts or not all(prompts):
        raise ModelLinkError("there is no prompt", where=where,
                             fix="set --prompt or --prompt-file, or write it to stdin")
    if not options.chat:
        if options.system is not None:
            raise ModelLinkError("a system message needs a chat", where="--system", fix="add --chat")
        return prompts
    system = [{"role": "system", "content": options.system}] if options.system is not None else []
    return [[*system, {"role": "user", "content": prompt}] if isinstance(prompt, str) else [*system, *prompt]
            for prompt in prompts]


def read_prompt_file(path: Path) -> list[Any]:
    """Return the prompts of a file: the lines of a .jsonl file, else the whole text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"the prompts cannot be read: {error}", where=f"--prompt-file {path}") from None
    if path.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    # not splitlines: it also splits at U+2028, which a JSON string may contain
    lines = enumerate(text.split("\n"), 1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ModelLinkError(f"not JSON: {error}", where=where) from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str) or (isinstance(value, list) and value
                                  and all(isinstance(item, dict) for item in value)):
        return value
    raise ModelLinkError('a line must be a string, or an object with "prompt" (a string) or "messages" (a '
                         'list of objects)',
                         where=where)
