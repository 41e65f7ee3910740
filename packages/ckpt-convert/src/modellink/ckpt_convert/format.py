# SPDX-License-Identifier: Apache-2.0
"""`Format`: how a checkpoint format is recognized, opened, planned and completed.

A format is one file in formats/ with a subclass marked `@register`, or the same in another distribution (see
formats/__init__.py). Opening, converting and the command line loop over the registered formats and know none
of them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modellink.ckpt_convert import manifest
from modellink.ckpt_convert.families import NO_FORM, ORIGINALS_BASE, read_spec
from modellink.ckpt_convert.hf_config import Config
from modellink.ckpt_convert.iterations import TRACKER, iteration_folder
from modellink.ckpt_convert.megatron.dialects import Dialect
from modellink.ckpt_convert.plan import ConversionPlan
from modellink.ckpt_convert.source import Checkpoint
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.errors import InternalError, ModelLinkError
from modellink.kernels.files import atomic_write, mark_complete, write_json
from modellink.kernels.parallel import ParallelLayout

if TYPE_CHECKING:
    import torch

SHARD_BYTES: int = 5 * 10 ** 9


@dataclass(frozen=True)
class OpenRequest:
    """What to open, and what the files may not tell.

    Attributes:
        path: the folder that the user named.
        root: the folder of the checkpoint, with its manifest and iterations.
        folder: the folder with the weights: an iteration, or `root`.
        family, hf, iteration, lora_r, lora_alpha, adapter: see `open_checkpoint`.
    """

    path: Path
    root: Path
    folder: Path
    family: str | None = None
    hf: Path | None = None
    iteration: int | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    adapter: bool = False

    def refuse_iteration(self) -> None:
        """Raise a ModelLinkError if an iteration was requested: the format has none."""
        if self.iteration is not None:
            raise ModelLinkError(f"iteration {self.iteration} was requested, but the folder has no iterations", where=self.path,
                                 fix="remove --iteration", option="iteration")


@dataclass(frozen=True)
class WriteRequest:
    """How a checkpoint is to be written; a format ignores what it does not have.

    Attributes:
        layout: of the output, for formats that are `sharded`.
        dtype: of the output. Default: each tensor keeps its dtype.
        dialect, moe_grouped_gemm, make_vocab_size_divisible_by: of Megatron checkpoints; see `convert`.
        shard_bytes: largest file, for formats whose files are not those of ranks.
    """

    layout: ParallelLayout = ParallelLayout()
    dtype: torch.dtype | None = None
    dialect: Dialect = "megatron-core"
    moe_grouped_gemm: bool = False
    make_vocab_size_divisible_by: int = 1
    shard_bytes: int = SHARD_BYTES


class Format:
    """A checkpoint format. A subclass overrides `recognize` and `open` to be read, `plan` to be written."""

    name: ClassVar[str]
    """The value of `--to`."""
    title: ClassVar[str]
    """The name for people."""
    evidence: ClassVar[str] = ""
    """The files by which it is recognized, for the error about an unknown folder."""
    iterations: ClassVar[bool] = False
    """The weights are in folders iter_*, next to a manifest."""
    sharded: ClassVar[bool] = False
    """It is written for a parallel layout."""
    weights: ClassVar[bool] = True
    """It can hold the weights of a model."""
    adapters: ClassVar[bool] = False
    """It can hold a LoRA adapter without its model."""
    names_its_model: ClassVar[bool] = True
    """Its files tell which model it is."""

    def recognize(self, folder: Path) -> bool:
        """Return whether a folder (with `iterations`: of one iteration) holds a checkpoint of this format."""
        return False

    def open(self, request: OpenRequest) -> Checkpoint:
        """Open a folder that `recognize` accepted; no data is read.

        Raises:
            ModelLinkError: something is missing, damaged or not supported.
        """
        raise InternalError(f"the format {self.name} cannot be opened")

    def plan(self, source: Checkpoint, request: WriteRequest) -> ConversionPlan:
        """Return the files to write.

        Raises:
            ModelLinkError: the format cannot hold the model, or the layout does not divide it.
        """
        raise ModelLinkError(f"the format {self.name} cannot be written", where="--to",
                             fix="choose another format")

    def write_companions(self, plan: ConversionPlan, folder: Path, described: manifest.Manifest,
                         config: Mapping[str, Any]) -> None:
        """Write everything but the weights into the new folder `folder`.

        Args:
            described: the manifest of the output.
            config: the config.json of the model.
        """
        if not self.iterations:
            raise InternalError(f"the format {self.name} does not write its companions")
        manifest.write_companions(folder, described, plan.source.companions)
        write_json(folder / manifest.FOLDER / "config.json", config)
        mark_complete(folder / iteration_folder(plan.iteration))
        with atomic_write(folder / TRACKER, "w") as file:
            file.write(str(plan.iteration))


@dataclass(frozen=True)
class ModelDescription:
    """The model of a checkpoint with iterations."""

    spec: ModelSpec
    family: str
    companions: Path
    prompt_type: str | None


def model_description(request: OpenRequest) -> ModelDescription:
    """Return the model of a checkpoint, from its manifest or from the Hugging Face folder that the user
    names.

    Raises:
        ModelLinkError: neither describes the model, or they contradict each other.
    """
    root, hf, family = request.root, request.hf, request.family
    found = manifest.read_manifest(root)
    companions = hf or root / manifest.FOLDER
    if hf is not None and not (hf / "config.json").is_file():
        raise ModelLinkError("the folder has no config.json", where=f"{hf}, --tokenizer-name-or-path",
                             fix="give a Hugging Face folder with config.json and tokenizer")
    if found is None:
        if not (companions / "config.json").is_file():
            raise ModelLinkError(f"the checkpoint does not tell which model it is ({manifest.FILE} and "
                                 f"{manifest.FOLDER}/config.json are missing)", where=root,
                                 fix=f"give {manifest.HELP}")
        spec, family = read_spec(Config.load(companions), family)
        return ModelDescription(spec, family, companions, None)
    if family not in (None, ORIGINALS_BASE, found.family):
        raise ModelLinkError(f"the checkpoint is of the family {found.family}, not {family}",
                             where=f"{root / manifest.FILE}, --model-type-hf", option="model_type_hf")
    if found.family != NO_FORM and (companions / "config.json").is_file():
        config = Config.load(companions)
        theirs, _ = read_spec(config, found.family)
        found.spec.refuse_contradiction(theirs, str(root / manifest.FILE), str(config.path))
    return ModelDescription(found.spec, found.family, companions, found.prompt_type)
