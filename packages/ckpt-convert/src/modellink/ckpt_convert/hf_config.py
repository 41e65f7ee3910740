# SPDX-License-Identifier: Apache-2.0
"""Reading a Hugging Face `config.json` in the spellings of transformers 4 and 5.

Version 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; version 5 writes `dtype` and
`rope_parameters`. We write the spelling of version 4, which both read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import read_json


class MissingKey(ModelLinkError):
    """A key that the family requires is missing from config.json."""


class Config:
    """A config.json; errors name its missing and unsupported keys."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = dict(values), path

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
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, *allowed: object) -> None:
        """Raise a ModelLinkError if `key` is present and its value is not one of those that are supported."""
        if (value := self.values.get(key)) is not None and value not in allowed:
            raise ModelLinkError(f"{key} = {value!r} is not supported", where=self.path,
                                 fix=f"supported: {', '.join(map(repr, allowed))}")

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
