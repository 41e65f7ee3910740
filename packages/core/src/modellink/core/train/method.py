# SPDX-License-Identifier: Apache-2.0
"""What a training method is: its data, forward step, loss, metrics and reference model. Imports neither torch nor megatron.

`modellink-train NAME` runs the method that is registered as NAME in the entry-point group `modellink.methods`. The methods
of this package (methods/) are registered in the same way as those of any other package:

    [project.entry-points."modellink.methods"]
    focal = "my_package.focal:Focal"

The module of a method is imported before megatron-core is put on its device: import megatron inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from modellink.core.config import DataConfig, InstructionConfig
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.options import fields_of

if TYPE_CHECKING:
    from torch import Tensor

    from modellink.ckpt_convert.spec import ModelSpec
    from modellink.core.run import Run
    from modellink.core.train.training import Training

GROUP = "modellink.methods"
"""Entry-point group of training methods."""


class Feed(Protocol):
    """A source of micro batches."""

    def __call__(self, *, consumed: int) -> Iterator[Any]:
        """This rank's micro batches, starting with global sample number `consumed`."""
        ...


@dataclass(frozen=True)
class Feeds:
    """Where training, validation and test batches come from; None: no evaluation on that set."""

    train: Feed
    valid: Feed | None = None
    test: Feed | None = None


class Loss(Protocol):
    """Turns the output of the last pipeline stage into a scalar loss and metrics."""

    def __call__(self, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ...


class Method:
    """Base class of training methods. One instance serves one run on one rank.

    A subclass sets `name` and `summary`, and implements `feeds` and `loss`; everything else has a default.
    """

    name: ClassVar[str]
    """The command, `run.method` and the entry in saved progress."""
    summary: ClassVar[str]
    """One sentence for `modellink-train --help`."""
    options: ClassVar[type | None] = None
    """Dataclass of options of this method alone (see `modellink.kernels.options`); its values are in `run.options`."""
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    """Names of the scalars that `loss` reports; the first is the one that is minimized, logged as "lm loss"."""
    needs_reference: ClassVar[bool] = False
    """Build a frozen reference model from --ref-load; its chunks are in `training.reference`."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def for_data(cls, data: DataConfig) -> type[Method]:
        """The method that trains on this kind of data; another one if the options of `cls` select it."""
        if data.is_instruction_dataset:
            raise ModelLinkError(f"{cls.name} does not train on instruction data", where="--is-instruction-dataset",
                                 fix="remove it, or use modellink-train sft")
        return cls

    @classmethod
    def data_files(cls, data: DataConfig) -> list[Path]:
        """The files that must exist before the run starts. Default: .idx and .bin of every prefix of --data-path."""
        return data.indexed_files()

    @classmethod
    def complete_data(cls, data: DataConfig, spec: ModelSpec, companions: Path | None) -> DataConfig:
        """`data` with the settings that depend on the model filled in.

        Args:
            companions: folder with the config and tokenizer files of the model.
        """
        return data

    def check(self) -> None:
        """Raise ModelLinkError if settings of the run do not go together; called before any process starts."""
        for field in fields_of(InstructionConfig):
            if getattr(self.run.instruction, field.name) != field.default and field.name != "prompt_type":
                raise ModelLinkError(f"{field.flag} applies to instruction data, and {self.name} does not train on it",
                                     where=field.flag, fix="use modellink-train sft, or remove the option")

    def open_data(self) -> None:
        """Open data sets that need no model; called before the models are built, so that mistakes show early."""

    def feeds(self, training: Training) -> Feeds:
        """The data of the run; called on every rank after models and progress are loaded.

        The tensors of a batch are on `run.device`. The default `forward_step` needs `modellink.core.data.batch.Batch`.
        """
        raise NotImplementedError

    def forward_step(self, batches: Iterator[Any], model: Any) -> tuple[Tensor, Loss]:
        """Run one micro batch through one model chunk; megatron-core's schedules call this.

        Returns:
            The output of the chunk, and the function that the last stage applies to it.
        """
        from modellink.core.train.step import forward
        batch = next(batches)
        return forward(model, batch), partial(self.loss, batch)

    def loss(self, batch: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro batch.

        Args:
            output: logits [batch, seq / cp, vocabulary / tp] of the tokens and vocabulary entries of this rank.

        Returns:
            A scalar to differentiate, and a detached scalar for every name in `metrics`. All of them are averaged over micro
            batches and data-parallel ranks, so divide by a global count for a global mean.
        """
        raise NotImplementedError


@cache
def registered() -> dict[str, EntryPoint]:
    """The entry points of all installed methods by name, in alphabetical order."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find_method(name: str) -> type[Method]:
    """The method registered under `name`.

    Raises:
        ModelLinkError: no such method is installed, or its package cannot be imported.
    """
    known = registered()
    if name not in known:
        raise ModelLinkError(f"there is no training method {name!r}", where=f"entry points of {GROUP}",
                             fix=near(name, list(known)) or f"use one of {', '.join(known)}")
    try:
        found = known[name].load()
    except (ImportError, AttributeError) as error:
        raise ModelLinkError(f"the training method {name!r} cannot be imported: {error}", where=known[name].value,
                             fix="reinstall the package that provides it") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ModelLinkError(f"the training method {name!r} is not a subclass of modellink.core.Method",
                             where=known[name].value)
    if found.name != name:
        raise ModelLinkError(f"the training method registered as {name!r} has the name {found.name!r}", where=known[name].value,
                             fix="use one name for both")
    return found
