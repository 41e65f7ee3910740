# SPDX-License-Identifier: Apache-2.0
"""Configuration by dataclasses: one field is the command-line option, the YAML key and a row of the
documentation.

Values are merged from layers in rising precedence (default < preset < YAML file < command line), and every
value keeps its source, so that an error about two options can name both. An unknown key is an error.

Not here: rules between options (a config class has a `check` method for them), the options that several
packages share (model_options.py), and console commands with their help (command.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from modellink.kernels.errors import ModelLinkError, near

T = TypeVar("T")
_REQUIRED: Any = dataclasses.MISSING
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
SYNONYMS = {
    "mcore": ("megatron-core",), "core": ("megatron-core",), "megatron": ("megatron-core",),
    "mg": ("megatron-core",), "legacy": ("megatron-legacy",), "huggingface": ("hf",), "hugging-face": ("hf",),
    "transformers": ("hf",), "safetensors": ("hf",), "lora": ("peft",), "dcp": ("torch-dist",),
    "dist": ("torch-dist",), "distcp": ("torch-dist",), "bf16": ("bfloat16",), "bfloat16": ("bf16",),
    "fp16": ("float16",), "float16": ("fp16",), "half": ("fp16", "float16"), "fp32": ("float32",),
    "float32": ("fp32",), "float": ("fp32", "float32"), "gpu": ("cuda",), "ascend": ("npu",)}
"""What people write for a choice, too different from it for edit distance -> the choices they mean."""


@dataclass(frozen=True)
class About:
    """The metadata that `option` stores with a field."""

    doc: str
    unit: str | None = None
    alias: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    choices: Callable[[], Sequence[str]] | None = None
    short: str | None = None
    heading: str | None = None
    listed: bool = True
    above: float | None = None
    below: float | None = None


def option(default: Any = _REQUIRED, doc: str = "", *, unit: str | None = None,
           alias: str | Sequence[str] = (), minimum: float | None = None, maximum: float | None = None,
           choices: Callable[[], Sequence[str]] | None = None, short: str | None = None,
           heading: str | None = None, listed: bool = True, above: float | None = None,
           below: float | None = None) -> Any:
    """Declare a dataclass field that is also an option.

    Args:
        default: the default value. An option without one is required.
        doc: one sentence.
        unit: unit of a number, e.g. `tokens`.
        alias: other spellings, which the help text does not list.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        choices: returns the allowed values, if they are registered and not listed in the field's type.
        short: a short spelling, which the help text lists, e.g. `--tp`.
        heading: starts a group of the help text with this heading: this option and those after it.
        listed: whether the help text shows the option.
        above: exclusive lower bound.
        below: exclusive upper bound.
    """
    aliases = (alias,) if isinstance(alias, str) else tuple(alias)
    about = About(doc, unit, aliases, minimum, maximum, choices, short, heading, listed,
                  above, below)
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Field:
    """One option of a config class, with its type split into parts."""

    name: str
    kind: Any  # int, float, str, bool, Path, or a tuple of choices
    many: bool
    optional: bool
    default: Any
    about: About
    heading: str
    required: str  # note of an option without default; otherwise empty

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def aliases(self) -> tuple[str, ...]:
        """All spellings except the flag itself."""
        return (*([self.about.short] if self.about.short else []), *self.about.alias)

    def convert(self, value: Any, source: str) -> Any:
        """Convert a YAML value or a command-line string to the field's type.

        Raises:
            ModelLinkError: wrong type, not one of the choices, or out of range.
        """
        if value is None:
            if self.optional:
                return None
            raise self._wrong(value, source)
        if self.many:
            parts = value if isinstance(value, (list, tuple)) else [value]
            if self.kind in (int, float):  # the original separates lists of numbers by commas
                parts = [number for part in parts
                         for number in (part.split(",") if isinstance(part, str) else [part])]
            return tuple(self._one(part, source) for part in parts)
        return self._one(value, source)

    def _one(self, value: Any, source: str) -> Any:
        kind = self.kind
        if isinstance(kind, tuple):
            return choose(value, kind, flag=self.flag, where=source, option=self.name)
        if kind is bool:
            if not isinstance(value, bool):
                raise self._wrong(value, source)
            return value
        if isinstance(value, (bool, Mapping, list)) or (kind is int and isinstance(value, float)
                                                        and value != int(value)):
            raise self._wrong(value, source)
        try:
            result = kind(value)
        except (TypeError, ValueError):
            raise self._wrong(value, source) from None
        if kind in (int, float) and (limits := self._exceeded(result)):
            raise ModelLinkError(f"{self.flag} is {result}, it must be {limits}", where=source,
                                 option=self.name)
        return result

    def _exceeded(self, number: float) -> str:
        """Return all bounds, in words, if a number is outside of one; NaN is."""
        bounds = ((operator.ge, self.about.minimum, "at least"), (operator.gt, self.about.above, "above"),
                  (operator.le, self.about.maximum, "at most"), (operator.lt, self.about.below, "below"))
        given = [(holds, bound, word) for holds, bound, word in bounds if bound is not None]
        if all(holds(number, bound) for holds, bound, _ in given):
            return ""
        return " and ".join(f"{word} {bound:g}" for _, bound, word in given)

    def _wrong(self, value: Any, source: str) -> ModelLinkError:
        wanted = KINDS.get(self.kind, str(self.kind))
        return ModelLinkError(f"{self.flag} is {value!r}, it must be {wanted}", where=source,
                              option=self.name)


def choose(value: Any, choices: Sequence[Any], *, flag: str, where: object, option: str | None = None) -> Any:
    """Return the choice that `value` spells; `-` and `_` are interchangeable (`torch_dist` is `torch-dist`).

    Raises:
        ModelLinkError: it is none of them; the message about `flag` lists them and suggests the nearest.
    """
    if value in choices:
        return value
    spelled = str(value).lower().replace("_", "-")
    for choice in choices:
        if str(choice).replace("_", "-") == str(value).replace("_", "-"):
            return choice
    names = list(map(str, choices))
    meant = [choice for choice in SYNONYMS.get(spelled, ()) if choice in names]
    fix = f"did you mean {' or '.join(meant)}?" if meant else near(spelled, names)
    raise ModelLinkError(f"{flag} is {value!r}, it must be one of {', '.join(names)}", where=where,
                         fix=fix or None, option=option)


def fields_of(cls: type) -> list[Field]:
    """Return the options of a config class: those it declares, then those it inherits.

    Fields made without `option` are not options. The heading of an option in the help text is the latest that
    an option before it started, or the `heading` of the class that declares it.
    """
    hints = typing.get_type_hints(cls)
    own = inspect.get_annotations(cls)
    headings = _headings(cls)
    found = []
    for item in sorted(dataclasses.fields(cls), key=lambda item: item.name not in own):
        about: About | None = item.metadata.get("about")
        if about is None:
            continue
        kind, optional, many = hints[item.name], False, False
        if typing.get_origin(kind) in (Union, types.UnionType):
            optional = True
            (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
        if typing.get_origin(kind) is tuple:
            many, kind = True, typing.get_args(kind)[0]
        if typing.get_origin(kind) is Literal:
            kind = typing.get_args(kind)
        if about.choices is not None:
            kind = tuple(about.choices())
        required = getattr(cls, "required_note", "required") if item.default is _REQUIRED else ""
        found.append(Field(item.name, kind, many, optional, item.default, about, headings[item.name], required))
    return found


def _headings(cls: type) -> dict[str, str]:
    """Return the heading of each field of a config class."""
    headings: dict[str, str] = {}
    found = {item.name: item for item in dataclasses.fields(cls)}
    for declaring in cls.__mro__:
        heading = declaring.__dict__.get("heading", "Options")
        for name in inspect.get_annotations(declaring):
            item = found.get(name)
            if item is not None and "about" in item.metadata and name not in headings:
                heading = item.metadata["about"].heading or heading
                headings[name] = heading
    return headings


@dataclass(frozen=True)
class Layer:
    """Values from one source, e.g. `command line` or `run.yaml`; a later layer overrides an earlier one."""

    source: str
    values: Mapping[str, Any]


@dataclass
class Resolved:
    """The config objects, and the source of each value (`default` for one that no layer has)."""

    configs: dict[type, Any]
    sources: dict[str, str]

    def __getitem__(self, cls: type[T]) -> T:
        return typing.cast(T, self.configs[cls])


def resolve(classes: Iterable[type], *layers: Layer) -> Resolved:
    """Merge the layers into one object of each class, and call its `check()` if it has one.

    Raises:
        ModelLinkError: an unknown key, a value of the wrong type or out of range, or a required option that
            is missing.
    """
    classes = list(classes)
    known = {item.name: item for cls in classes for item in fields_of(cls)}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.values.items():
            if name not in known:
                raise ModelLinkError(f"unknown key {name!r}", where=layer.source, option=name,
                                     fix=near(name, known) or "see --help for the options")
            values[name] = known[name].convert(value, layer.source)
            sources[name] = layer.source
    missing = [item for item in known.values() if item.required and item.name not in values]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModelLinkError(f"{', '.join(item.flag for item in missing)} {verb} required",
                             where="command line", fix=f"{missing[0].flag}: {missing[0].about.doc}",
                             option=missing[0].name)
    configs = {}
    for cls in classes:
        configs[cls] = cls(**{item.name: values[item.name] for item in fields_of(cls) if item.name in values})
        if check := getattr(configs[cls], "check", None):
            check()
    return Resolved(configs, {name: sources.get(name, "default") for name in known})


def yaml_layer(path: Path) -> Layer:
    """Read a YAML file of options, flat or grouped under arbitrary headings.

    Raises:
        ModelLinkError: the file is missing, not YAML or not a mapping, or has an option twice.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLinkError("the configuration file is missing", where=path) from None
    except yaml.YAMLError as error:
        raise ModelLinkError(f"not YAML: {error}", where=path) from None
    if not isinstance(loaded or {}, dict):
        raise ModelLinkError("the file is not a mapping of `name: value` lines", where=path)
    values: dict[str, Any] = {}
    for key, value in (loaded or {}).items():
        inner = value.items() if isinstance(value, dict) else [(key, value)]
        for name, item in inner:
            name = str(name).replace("-", "_")
            if name in values:
                raise ModelLinkError(f"{name} is given twice", where=path, option=name)
            values[name] = item
    return Layer(str(path), values)


def describe(cls: type) -> str:
    """Return the options of a config class as a Markdown table."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for item in fields_of(cls):
        shown = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        default = "required" if item.required else "" if shown in (None, "") else f"`{shown}`"
        names = ", ".join(f"`{name}`" for name in (item.flag, *item.aliases))
        unit = f" ({item.about.unit})" if item.about.unit else ""
        rows.append(f"| {names} | {default} | {item.about.doc}{unit} |")
    return "\n".join(rows)
