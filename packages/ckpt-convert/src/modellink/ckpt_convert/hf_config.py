"""Reading a Hugging Face `config.json` in the spellings of transformers 4 and 5.

Version 4 writes `torch_dtype`, `rope_theta` and `rope_scaling`; version 5 writes `dtype` and `rope_parameters`. Written is the
version 4 spelling, which both read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import read_json


class Config:
    """A config.json whose missing and unsupported keys are named in errors."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = dict(values), path

    @classmethod
    def load(cls, folder: Path) -> Config:
        """The config.json of a folder.

        Raises:
            ModelLinkError: it is missing or is not a JSON object.
        """
        path = folder / "config.json"
        values = read_json(path)
        if not isinstance(values, dict):
            raise ModelLinkError("the configuration is not a JSON object", where=path)
        return cls(values, path)

    def need(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ModelLinkError(f"{key!r} is missing from the model's configuration", where=self.path,
                                 fix=near(key, list(self.values)) or f"add {key!r} to it")
        return self.values[key]

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLinkError(f"{key!r} is {value!r}, it must be a whole number above 0", where=self.path)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, *allowed: object) -> None:
        """Raise where `key` is there and is none of the values that are converted."""
        if (value := self.values.get(key)) is not None and value not in allowed:
            raise ModelLinkError(f"{key} = {value!r} is not supported", where=self.path,
                                 fix=f"supported: {', '.join(map(repr, allowed))}")

    @property
    def model_type(self) -> str:
        return str(self.need("model_type"))

    def rope(self) -> dict[str, Any]:
        """The rotary part of ModelSpec.

        Raises:
            ModelLinkError: a kind of scaling that is not supported.
        """
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelLinkError(f"the rotary parameters are {rope!r}, not an object", where=self.path)
        theta = rope.get("rope_theta") or self.get("rope_theta", 10000.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ModelLinkError(f"rotary scaling of type {kind!r} is not supported", where=self.path,
                                 fix="supported: 'default', 'llama3'")
        partial = rope.get("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise ModelLinkError(f"rotary positions on {partial} of a head are not supported", where=self.path)
        values: dict[str, Any] = {"rotary_base": float(theta)}
        if kind == "llama3":
            scaling = Config(rope, self.path)
            values |= {"rope_scaling_type": "llama3", "rope_scaling_factor": float(scaling.need("factor")),
                       "low_freq_factor": float(scaling.need("low_freq_factor")),
                       "high_freq_factor": float(scaling.need("high_freq_factor")),
                       "original_max_position_embeddings": int(scaling.need("original_max_position_embeddings"))}
        return values


def rope_entries(spec: ModelSpec) -> dict[str, Any]:
    """The rotary part of a config.json."""
    scaling = None if spec.rope_scaling_type is None else {
        "rope_type": spec.rope_scaling_type, "factor": spec.rope_scaling_factor, "low_freq_factor": spec.low_freq_factor,
        "high_freq_factor": spec.high_freq_factor,
        "original_max_position_embeddings": spec.original_max_position_embeddings}
    return {"rope_theta": spec.rotary_base, "rope_scaling": scaling}
