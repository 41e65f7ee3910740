# SPDX-License-Identifier: Apache-2.0
"""Model families: how a Hugging Face config and its tensor names map to ModelSpec and canonical weights.

A family is a module with a class marked `@register`. Modules in this folder are discovered; modules of other
distributions are named by entry points of the group `modellink.families`. Adding a family changes no other
file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

from modellink.ckpt_convert.family import Family
from modellink.ckpt_convert.hf_config import Config, MissingKey
from modellink.ckpt_convert.rules import inverse
from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.messages import note
from modellink.kernels.plugins import import_modules

GROUP = "modellink.families"
NO_FORM = "none"  # the family of a model without a Hugging Face form
# the original's family of all models with Llama's tensor names: Llama, Qwen2, Mistral ...
ORIGINALS_BASE = "llama2"


_families: dict[str, Family] = {}


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known under its `model_type`."""
    _families[cls.model_type] = cls()
    return cls


@cache
def _discover() -> None:
    import_modules(__name__, __path__, GROUP)


def family_names() -> list[str]:
    _discover()
    return sorted(_families)


def family_of(model_type: str, where: object = None) -> Family:
    """Return the family of a `model_type`, or of a class name from `architectures`.

    Raises:
        ModelLinkError: it is not registered; similar names are suggested.
    """
    names = family_names()
    if model_type == NO_FORM:
        raise ModelLinkError("the model has no Hugging Face form", where=where,
                             fix="give --model-type-hf, if it belongs to a family")
    for family in _families.values():
        if model_type in (family.model_type, family.architecture, *family.others):
            return family
    hint = near(model_type, names)
    raise ModelLinkError(f"unknown model type {model_type!r}", where=where, option="model_type_hf",
                         fix=f"{hint} known: {', '.join(names)}".strip())


def read_spec(config: Config, family: str | None = None) -> tuple[ModelSpec, str]:
    """Return (ModelSpec, family) of a config.json; `family` replaces an unknown model type.

    Raises:
        ModelLinkError: unknown model type, missing key, unsupported feature, or `family` contradicts the
            config.
    """
    stated = _stated(config)
    if family == ORIGINALS_BASE:
        family = stated or "llama"
    if family and stated and family_of(family, "--model-type-hf").model_type != stated:
        raise ModelLinkError(f"the configuration is of the family {stated}, not {family}",
                             where=f"{config.path}, --model-type-hf", option="model_type_hf")
    if family:
        found = family_of(family, "--model-type-hf")
    else:
        found = family_of(stated or config.model_type, config.path)
    try:
        spec = spec_from(found.read(config), str(config.path))
    except MissingKey as error:
        others = fitting(config)
        hint = f"; families that have all their keys in it: {', '.join(others)}" if others else ""
        raise ModelLinkError(f"{error.what} (family {found.model_type})", where=error.where,
                             fix=f"{error.fix}{hint}") from None
    if unread := config.unread(found.inert):
        _note_unread(config.path, found.model_type, ", ".join(unread))
    return spec, found.model_type


@cache
def _note_unread(path: Path, family: str, keys: str) -> None:
    """Print a note, once for each file."""
    note(f"the family {family} does not know these keys of {path}, which have no effect here: {keys}")


def fitting(config: Config, names: Collection[str] | None = None) -> list[str]:
    """Return the families that accept this configuration and, if `names` are given, have exactly these
    tensors."""
    found = []
    for name in family_names():
        family = _families[name]
        try:
            spec = spec_from(family.read(config), str(config.path))
            if names is not None and spec.num_layers * (spec.num_experts or 1) > len(names):
                continue
            if names is None or inverse(spec, family.rules(spec)).keys() == set(names):
                found.append(name)
        except ModelLinkError:
            continue
    return found


def _stated(config: Config) -> str | None:
    """Return the family that a config.json names; early public ones have only a class name."""
    stated = config.get("model_type")
    for name in (stated,) if stated else config.get("architectures", ()):
        with contextlib.suppress(ModelLinkError):
            return family_of(name).model_type
    return None
