# SPDX-License-Identifier: Apache-2.0
"""A tokenizer folder, read without transformers: ids, text, special tokens and chat templates.

`engines/` chooses the library. The special tokens are read from the JSON files in the folder, in the form of transformers 4
(tokens as objects, `special_tokens_map.json`) or 5 (tokens as strings).

Not here: code from the folder, and `clean_up_tokenization_spaces`, which changes text ("a ." becomes "a.") and so breaks
decode(encode(text)) == text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modellink.data_prep.engines import Choice, Engine, Flat, Span, has_vocabulary, open_engine
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import read_json

# The names that transformers passes to a chat template.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encode text to token ids and decode ids. Create one with `Tokenizer.from_folder`.

    Attributes:
        folder: the folder it was read from.
        vocab_size: number of ids, added tokens included; every id is below it.
        special_tokens: name (`bos_token`, ...) to text, for those the folder defines.
        bos_token_id, eos_token_id, pad_token_id: ids, or None. A missing pad token is the eos token.
        eos_token_ids: all tokens that end a generation: `eos_token_id` first, then those of `generation_config.json`.
        chat_templates: name to Jinja text; a folder with one template calls it `default`.
        fingerprint: SHA-256 of the vocabulary's files.
        backend: tokenizer library and version.
        control_tokens: texts of control tokens, with their ids.
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self.fingerprint, self.backend, self.vocab_size = engine.fingerprint, engine.name, engine.vocab_size
        self.control_tokens = engine.control
        config = _optional_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(config, _optional_json(folder / "special_tokens_map.json"))
        self.chat_templates = _chat_templates(folder, config)
        model = _optional_json(folder / "config.json") | _optional_json(folder / "generation_config.json")
        self.bos_token_id = self._special_id("bos_token", model)
        self.eos_token_id = self._special_id("eos_token", model)
        self.pad_token_id = self._special_id("pad_token", model)
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id
        ends = [self.eos_token_id, *_ids(model.get("eos_token_id"))]
        self.eos_token_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        self._skipped = frozenset(engine.control.values())

    @classmethod
    def from_folder(cls, path: Path | str, backend: Choice = "auto") -> Tokenizer:
        """Read a Hugging Face folder, or a Megatron checkpoint of ModelLink, which contains one as `hf/`.

        Raises:
            ModelLinkError: the folder or its vocabulary is missing or cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ModelLinkError("the tokenizer folder does not exist", where=folder,
                                 fix="give a folder with tokenizer.json; models are not downloaded from a hub")
        if not has_vocabulary(folder) and has_vocabulary(folder / "hf"):
            folder = folder / "hf"
        return cls(folder, open_engine(folder, backend))

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eod_token_id(self) -> int | None:
        """Return the id of the token that ends a document, the eos token."""
        return self.eos_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text; `add_special_tokens` adds the tokens that tokenizer.json puts around a text (often bos)."""
        return self.engine.encode_batch([text], wrap=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Encode each text, on all cores unless `TOKENIZERS_PARALLELISM=false`."""
        return self.engine.encode_batch(texts, wrap=add_special_tokens)

    def encode_flat(self, texts: Sequence[str], add_special_tokens: bool = True) -> Flat:
        """Encode texts to one array of all ids and one array of lengths; this is the fastest form."""
        return self.engine.encode_flat(texts, wrap=add_special_tokens)

    def encode_literal(self, text: str, *, at_start: bool = True) -> list[int]:
        """Return the ids of a text in which control tokens are plain text."""
        return self.engine.encode_literal(text, at_start=at_start)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]] | None:
        """Return ids and the character span of each, or None if the library has no spans."""
        return self.engine.encode_spans(text)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.engine.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.engine.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        return self.engine.id_to_token(index)

    def is_special(self, index: int) -> bool:
        """Return whether `decode` omits this id when it skips special tokens."""
        return index in self._skipped

    def is_raw_byte(self, index: int) -> bool:
        """Return whether the id is one of the 256 byte tokens (`<0xE4>`) of a sentencepiece vocabulary."""
        return index in self.engine.raw_bytes

    def chat_template(self, name: str | None = None, *, tools: bool = False) -> str:
        """Return the Jinja text of a template: the named one, `tool_use` if there are tools and it exists, else `default`.

        Raises:
            ModelLinkError: the folder has no such template.
        """
        known = self.chat_templates
        wanted = name or ("tool_use" if tools and "tool_use" in known else "default")
        if wanted in known:
            return known[wanted]
        if not known:
            raise ModelLinkError("the tokenizer has no chat template", where=self.folder,
                                 fix="use the chat version of the model, or add a chat_template.jinja to the folder")
        raise ModelLinkError(f"the tokenizer has no chat template {wanted!r}", where=self.folder,
                             fix=f"choose one of {', '.join(sorted(known))}")

    def _special_id(self, name: str, model: Mapping[str, Any]) -> int | None:
        """Return the id of a special token from the tokenizer's files, else from the model's config."""
        if name in self.special_tokens and (index := self.token_to_id(self.special_tokens[name])) is not None:
            return index
        return next((index for index in _ids(model.get(f"{name}_id")) if self.id_to_token(index) is not None), None)


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelLinkError(f"holds a {type(value).__name__} where an object is expected", where=path)
    return value


def _ids(value: object) -> list[int]:
    """Return `eos_token_id` of a model config, which may be absent, a number or a list, as a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Return special tokens by name; earlier sources win. A token is a string, or an object with a `content` string."""
    found: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        for source in sources:
            token = source.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return chat templates by name. Files override tokenizer_config.json (a string or a list of `{"name", "template"}`)."""
    found: dict[str, str] = {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ModelLinkError(f"not UTF-8 text: {error}", where=path) from None
    if found:
        return found
    written = config.get("chat_template")
    if isinstance(written, str):
        return {"default": written}
    if isinstance(written, list):
        for item in written:
            if not (isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)):
                raise ModelLinkError("chat_template is a list, but not of objects with a name and a template",
                                     where=folder / "tokenizer_config.json")
            found[item["name"]] = item["template"]
    return found
