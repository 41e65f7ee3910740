"""Model families: how a Hugging Face config and its tensor names map to ModelSpec and canonical weights.

A family is one module with one class marked `@register`. The modules of this folder are found by being here; those of other
distributions by an entry point of the group `modellink.families` whose value is the module. Adding a family touches no
other file.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from modellink.ckpt_convert.family import Family
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.spec import ModelSpec, spec_from
from modellink.kernels.errors import ModelLinkError, near

GROUP = "modellink.families"
ORIGINALS_BASE = "llama2"  # the original's family for everything with Llama's tensor names: Llama, Qwen2, Mistral ...


_families: dict[str, Family] = {}


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make a family known under its `model_type`."""
    _families[cls.model_type] = cls()
    return cls


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__, prefix=__name__ + "."):
        importlib.import_module(module.name)
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # someone else's package; it must not take the others down
            raise ModelLinkError(f"the family {entry.name} cannot be loaded: {type(error).__name__}: {error}",
                                 where=entry.value, fix="mend or uninstall the distribution that brings it") from error


def family_names() -> list[str]:
    _discover()
    return sorted(_families)


def family_of(model_type: str, where: object = None) -> Family:
    """The family of a `model_type`.

    Raises:
        ModelLinkError: nobody registered it; near names are listed.
    """
    names = family_names()
    if model_type not in names:
        hint = near(model_type, names)
        raise ModelLinkError(f"the model type {model_type!r} is not known", where=where,
                             fix=f"{hint + ' ' if hint else ''}known: {', '.join(names)}")
    return _families[model_type]


def read_spec(config: Config, family: str | None = None) -> tuple[ModelSpec, str]:
    """(ModelSpec, family) of a config.json; `family` replaces a model type nobody knows.

    Raises:
        ModelLinkError: unknown model type, missing key, unsupported feature, or `family` contradicts the config.
    """
    stated = config.get("model_type")
    if family == ORIGINALS_BASE:
        family = None if stated in family_names() else "llama"
    if family and stated in family_names() and stated != family:
        raise ModelLinkError(f"the configuration is of the family {stated}, not {family}",
                             where=f"{config.path}, --model-type-hf")
    name = family or config.model_type
    values = family_of(name, "--model-type-hf" if family else config.path).read(config)
    return spec_from(values, str(config.path)), name
