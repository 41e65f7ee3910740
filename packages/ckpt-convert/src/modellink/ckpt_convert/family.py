# SPDX-License-Identifier: Apache-2.0
"""`Family`: tables from ModelSpec's fields to config keys, and from canonical modules to Hugging Face tensor
names.

The tables give the ModelSpec of a config.json, a config.json for a ModelSpec, and the rules of the weights. A
family file (families/) is a subclass with its own tables, based on the most similar family; if a table cannot
express a config, it overrides `read` and `write`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from modellink.ckpt_convert.hf_config import Config, read_rope, write_rope
from modellink.ckpt_convert.rules import Maker, Rules, grouped, rules_of, same, stack
from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import fields_of

NEEDED: Any = object()


@dataclass(frozen=True)
class Key:
    """A key of config.json that holds a field of ModelSpec.

    `default` is used if the key is missing (None: ModelSpec's default). `values` maps the allowed values of
    the key to those of the field; or `read` and `write` compute one from the other.
    """

    name: str
    default: Any = NEEDED
    values: Mapping[Any, Any] | None = None
    read: Callable[[Any], Any] | None = None
    write: Callable[[Any], Any] | None = None


def inverted(name: str, default: bool) -> Key:
    """Return a boolean key that means the opposite of the field."""
    return Key(name, default, values={True: False, False: True})


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
LLAMA_KEYS = {
    "num_layers": Key("num_hidden_layers"), "hidden_size": Key("hidden_size"),
    "num_attention_heads": Key("num_attention_heads"), "num_query_groups": Key("num_key_value_heads", None),
    "kv_channels": Key("head_dim", None), "ffn_hidden_size": Key("intermediate_size"),
    "vocab_size": Key("vocab_size"), "max_position_embeddings": Key("max_position_embeddings"),
    "norm_epsilon": Key("rms_norm_eps"), "activation_func": Key("hidden_act", "silu", values=ACTIVATIONS),
    "untie_embeddings_and_output_weights": inverted("tie_word_embeddings", False)}
LLAMA_NAMES = {
    "embedding.word_embeddings": same("model.embed_tokens"),
    "input_layernorm": same("input_layernorm"),
    "self_attention.linear_qkv": grouped("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": same("self_attn.o_proj"),
    "pre_mlp_layernorm": same("post_attention_layernorm"),
    "mlp.linear_fc1": stack("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": same("mlp.down_proj"),
    "decoder.final_layernorm": same("model.norm"),
    "output_layer": same("lm_head")}


T = TypeVar("T")


def without(table: Mapping[str, T], *names: str) -> dict[str, T]:
    """Return a table without some of its entries."""
    return {name: value for name, value in table.items() if name not in names}


class Family:
    """A decoder with Llama's config keys and tensor names; families override what differs."""

    model_type: ClassVar[str]
    """`model_type` of its config.json."""
    architecture: ClassVar[str]
    """The class named in its `architectures`."""
    others: ClassVar[tuple[str, ...]] = ()
    """Other model types and class names of the family, and the original's --model-type-hf."""
    keys: ClassVar[Mapping[str, Key]] = LLAMA_KEYS
    """ModelSpec field -> key."""
    features: ClassVar[Mapping[str, Any]] = {}
    """ModelSpec fields that are the same in every model of the family and have no key."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Keys that are written with this value; another value is refused."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What missing keys mean, where it is not Key.default; null is not missing."""
    stated: ClassVar[tuple[str, ...]] = ()
    """Keys that must be present, if only as null: programs that read them differ in their defaults."""
    inert: ClassVar[tuple[str, ...]] = ()
    """Keys of public configurations that do not change the logits; other keys that are not read are noted."""
    prefix: ClassVar[str] = ""
    """Prefix of tensor names that some public files lack."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Endings of names in public files that are buffers, not weights."""
    layer: ClassVar[str] = "model.layers.{layer}."
    names: ClassVar[Mapping[str, Maker]] = LLAMA_NAMES
    """Canonical module -> tensors (see rules.rules_of)."""

    def read(self, config: Config) -> dict[str, Any]:
        """Return the fields of ModelSpec.

        Raises:
            ModelLinkError: a key is missing, or a feature is not supported.
        """
        for stated in self.stated:
            if stated not in config.values:
                config.need(stated)
        config = config.changed(dict(self.defaults) | config.values)
        for fixed, only in self.fixed.items():
            config.refuse(fixed, only)
        fields = {field.name: field for field in fields_of(ModelSpec)}
        values: dict[str, Any] = dict(self.features)
        for name, key in self.keys.items():
            value = config.need(key.name) if key.default is NEEDED else config.get(key.name, key.default)
            if value is None:
                continue
            if key.values is not None:
                config.refuse(key.name, *key.values)
                value = key.values[value]
            try:
                values[name] = fields[name].convert(key.read(value) if key.read else value, str(config.path))
            except ModelLinkError as error:
                raise ModelLinkError(error.what.replace(fields[name].flag, repr(key.name)),
                                     where=config.path) from None
        return values | self.read_positions(config)

    def read_positions(self, config: Config) -> dict[str, Any]:
        """Return the fields of the position embedding."""
        return read_rope(config)

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """Return a config.json for a model that has none.

        Raises:
            ModelLinkError: the family has no such model.
        """
        values = {"architectures": [self.architecture], "model_type": self.model_type, **self.fixed}
        ours = spec.explicit()
        for name, key in self.keys.items():
            value = ours[name]
            if key.values is not None:
                value = next((theirs for theirs, meaning in key.values.items() if meaning == value), None)
            elif key.write and value is not None:
                value = key.write(value)
            if value is not None or key.default is NEEDED or key.name in (*self.defaults, *self.stated):
                values[key.name] = value
        return values | self.write_positions(spec)

    def write_positions(self, spec: ModelSpec) -> dict[str, Any]:
        """Return the keys of the position embedding."""
        return write_rope(spec)

    def rules(self, spec: ModelSpec) -> Rules:
        """Return the Hugging Face rows that each canonical weight is made of."""
        return rules_of(spec, self.names, self.layer, self.model_type)


def config_of(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """Return a config.json that describes exactly `spec`.

    Raises:
        ModelLinkError: the family has no such model; the fields it cannot express are named.
    """
    values = family.write(spec)
    path = Path(f"a config.json of the family {family.model_type}")
    back = spec_from(family.read(Config(values, path)), str(path))
    if wrong := spec.differences(back):
        reasons = ", ".join(f"{name} {mine} (the family has {theirs})"
                            for name, (mine, theirs) in wrong.items())
        raise ModelLinkError(f"the family {family.model_type} has no such model: {reasons}",
                             where="--model-type-hf", fix="name the family that the model belongs to")
    return values
