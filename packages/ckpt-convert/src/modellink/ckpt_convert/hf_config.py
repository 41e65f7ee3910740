# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face `config.json` in the spellings of transformers 4 and 5.

Version 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; version 5 writes `dtype` and
`rope_parameters`. We write the spelling of version 4, which both read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import read_json

INERT = frozenset([
    "_attn_implementation_autoset", "_commit_hash", "_from_model_config", "_name_or_path", "architectures", "auto_map",
    "chunk_size_feed_forward", "dtype", "model_type", "torch_dtype", "tokenizer_class", "transformers_version",
    "use_bfloat16", "torchscript", "return_dict", "problem_type", "id2label", "label2id", "num_labels",
    "finetuning_task", "task_specific_params", "prefix", "name_or_path", "output_attentions", "output_hidden_states",
    "output_scores", "output_router_logits", "output_past", "return_dict_in_generate", "use_cache",
    "cache_implementation", "is_encoder_decoder", "is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens", "bad_words_ids",
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "num_return_sequences", "diversity_penalty", "encoder_no_repeat_ngram_size", "no_repeat_ngram_size",
    "exponential_decay_length_penalty", "length_penalty", "remove_invalid_values", "repetition_penalty", "temperature",
    "top_k", "top_p", "typical_p", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "gradient_checkpointing", "pretraining_tp",
    "tf_legacy_loss"])
"""Keys of any config.json that do not change the logits of a trained model: special tokens, generation, labels, dropout,
initialization, auxiliary losses."""


class MissingKey(ModelLinkError):
    """A key that the family requires is missing from config.json."""


class Config:
    """A config.json; errors name its missing and unsupported keys."""

    def __init__(self, values: Mapping[str, Any], path: Path, seen: set[str] | None = None) -> None:
        self.values, self.path = dict(values), path
        self.seen: set[str] = set() if seen is None else seen

    def changed(self, values: Mapping[str, Any]) -> Config:
        """Return the same configuration with some other values; keys read from either count for both."""
        return Config(self.values | dict(values), self.path, self.seen)

    def unread(self, inert: Collection[str] = ()) -> list[str]:
        """Return the keys that nobody has read, without empty ones and those that do not change the logits."""
        known = self.seen | INERT | set(inert)
        return sorted(key for key, value in self.values.items() if key not in known and value not in (None, [], {}))

    @classmethod
    def load(cls, folder: Path) -> Config:
        """Read the config.json of a folder.

        Raises:
            ModelLinkError: it is missing or is not a JSON object.
        """
        path = folder / "config.json"
        values = read_json(path)
        if not isinstance(values, dict):
            raise ModelLinkError("the configuration is not a JSON object", where=path)
        return cls(values, path)

    def need(self, key: str) -> Any:
        """Return the value of a required key."""
        self.seen.add(key)
        if self.values.get(key) is None:
            raise MissingKey(f"{key!r} is missing from the model's configuration", where=self.path,
                             fix=near(key, list(self.values)) or f"add {key!r} to it")
        return self.values[key]

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLinkError(f"{key!r} is {value!r}, it must be a whole number above 0", where=self.path)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if it is missing or null."""
        self.seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, *allowed: object) -> None:
        """Raise a ModelLinkError if `key` is present and its value is not one of those that are supported."""
        self.seen.add(key)
        if (value := self.values.get(key)) is not None and value not in allowed:
            raise ModelLinkError(f"{key} = {value!r} is not supported", where=self.path,
                                 fix=f"supported: {', '.join(map(repr, allowed))}")

    def per_layer(self, key: str, *allowed: str) -> list[str] | None:
        """Return a list with one of `allowed` for each layer; None if the key is missing."""
        found = self.get(key)
        if found is None:
            return None
        layers = self.count("num_hidden_layers")
        if not isinstance(found, list) or len(found) != layers:
            raise ModelLinkError(f"{key!r} is not a list with an entry for each of the {layers} layers", where=self.path)
        for kind in found:
            if kind not in allowed:
                raise ModelLinkError(f"{key} has {kind!r}, which is not supported", where=self.path,
                                     fix=f"supported: {', '.join(map(repr, allowed))}")
        return found

    @property
    def model_type(self) -> str:
        return str(self.need("model_type"))


def _yarn(rope: Config) -> dict[str, Any]:
    """`attention_factor` overrides the scale of the two mscale values; only its default is supported."""
    rope.refuse("attention_factor", None)
    rope.refuse("truncate", True)
    return {"rope_scaling_beta_fast": float(rope.get("beta_fast", 32)),
            "rope_scaling_beta_slow": float(rope.get("beta_slow", 1)),
            "rope_scaling_mscale": float(rope.get("mscale", 1.0)),
            "rope_scaling_mscale_all_dim": float(rope.get("mscale_all_dim", 0.0))}


def read_rope(config: Config) -> dict[str, Any]:
    """Return the rotary fields of ModelSpec.

    Raises:
        ModelLinkError: the kind of scaling is not supported, or one of its keys is missing.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelLinkError(f"the rotary parameters are {rope!r}, not an object", where=config.path)
    inner = Config(rope, config.path)
    values: dict[str, Any] = {"rotary_base": float(inner.get("rope_theta",
                                                             config.get("rope_theta", 10000.0))),
                              "rotary_percent": float(inner.get("partial_rotary_factor",
                                                                config.get("partial_rotary_factor", 1.0)))}
    kind = inner.get("rope_type", inner.get("type", "default"))
    inner = Config(rope | {"rope_type": kind}, config.path)
    inner.refuse("rope_type", "default", "linear", "dynamic", "llama3", "yarn")
    if kind == "default":
        return values
    values |= {"rope_scaling_type": kind, "rope_scaling_factor": float(inner.need("factor"))}
    if kind == "linear":
        return values
    longest = config.get("max_position_embeddings")
    original = inner.get("original_max_position_embeddings", longest if kind == "dynamic" else None)
    if original is None:
        original = inner.need("original_max_position_embeddings")
    values["original_max_position_embeddings"] = int(original)
    if kind == "llama3":
        values |= {"low_freq_factor": float(inner.need("low_freq_factor")),
                   "high_freq_factor": float(inner.need("high_freq_factor"))}
    return values | (_yarn(inner) if kind == "yarn" else {})


def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """Return the rotary keys of a config.json."""
    partial = {} if spec.rotary_percent == 1 else {"partial_rotary_factor": spec.rotary_percent}
    scaling: dict[str, Any] | None = None
    if spec.rope_scaling_type is not None:
        scaling = {"rope_type": spec.rope_scaling_type, "factor": spec.rope_scaling_factor}
    if scaling and spec.rope_scaling_type != "linear":
        scaling["original_max_position_embeddings"] = spec.original_max_position_embeddings
    if scaling and spec.rope_scaling_type == "llama3":
        scaling |= {"low_freq_factor": spec.low_freq_factor, "high_freq_factor": spec.high_freq_factor}
    if scaling and spec.rope_scaling_type == "yarn":
        scaling |= {"beta_fast": spec.rope_scaling_beta_fast, "beta_slow": spec.rope_scaling_beta_slow}
        if (spec.rope_scaling_mscale, spec.rope_scaling_mscale_all_dim) != (1.0, 0.0):
            scaling |= {"mscale": spec.rope_scaling_mscale,
                        "mscale_all_dim": spec.rope_scaling_mscale_all_dim}
    if scaling and spec.rope_scaling_type != "llama3":
        scaling["type"] = spec.rope_scaling_type  # the older name of rope_type
    return {"rope_theta": spec.rotary_base, "rope_scaling": scaling, **partial}
