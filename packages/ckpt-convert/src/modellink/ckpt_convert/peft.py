# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as peft folders, written and read: the form in which core's training saves and loads them.

If Megatron has one matrix for several Hugging Face modules (query, key and value; gate and up), they share
one A when written, and B is split as the rows of the weight. When read, different As are stacked, and B has
each module's part in its own columns and zeros elsewhere: the same product with a larger rank. When that is
written again, columns of zeros are dropped, and so are modules whose kind is zero in every layer: what was
read is written unchanged.

Experts are written separately, as in public files; peft merges them itself if transformers does. Not here:
the files (peft_files.py) and merging (lora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modellink.ckpt_convert import peft_files
from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.blocks import cast
from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.lora import A, B, adapter_weights, full, merge_lora, rows_of
from modellink.ckpt_convert.rules import Rows
from modellink.ckpt_convert.spec import ModelSpec
from modellink.ckpt_convert.storage import safetensors, writing
from modellink.ckpt_convert.storage.writing import Planned
from modellink.kernels.files import atomic_folder, atomic_write, write_json

if TYPE_CHECKING:
    import torch

    from modellink.ckpt_convert.lora import Matrix

__all__ = ["AdapterConfig", "merge_lora", "read_peft", "write_peft"]


def write_peft(folder: Path | str, spec: ModelSpec, family: str, tensors: Mapping[str, Matrix],
               config: AdapterConfig, *, base: str | None = None, overwrite: bool = False) -> None:
    """Write an adapter to the new folder `folder`, for `peft.PeftModel.from_pretrained`.

    Args:
        spec, family: of the model it belongs to; the family gives the names.
        tensors: canonical name (`decoder.layers.0.self_attention.linear_qkv.lora_A.weight`) -> [rank, in],
            `lora_B` [out, rank]; unsharded.
        base: name or folder of the base model, for `base_model_name_or_path`.

    Raises:
        ModelLinkError: the tensors do not fit the model, or the folder exists.
    """
    layout, values = planned(spec, family, tensors, config, base=base)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        with atomic_write(temporary / peft_files.WEIGHTS) as file, ThreadPoolExecutor(1) as pool:
            writing.write(file.fileno(), layout, pool, lambda count: None, temporary / peft_files.WEIGHTS)
        write_json(temporary / peft_files.CONFIG, values)


def planned(spec: ModelSpec, family: str, tensors: Mapping[str, Matrix], config: AdapterConfig, *,
            base: str | None, dtype: torch.dtype | None = None) -> tuple[writing.FileLayout, dict[str, Any]]:
    """Return (layout of the weight file, content of adapter_config.json); see `write_peft`."""
    adapter_weights(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the adapter")
    modules = _modules(spec, family, tensors, config.r)
    planned_tensors = {f"{peft_files.PREFIX}{name}": made for module in modules
                       for name, made in module.tensors(dtype)}
    layout = safetensors.layout(planned_tensors)
    ranks = {module.name: module.rank for module in modules}
    return layout, peft_files.config_of(config, ranks, peft_files.linear_modules(spec, family), base)


def read_peft(folder: Path | str, spec: ModelSpec,
              family: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Return (configuration, canonical name -> tensor) of an adapter folder.

    The A of a matrix made of several modules with different As has more rows than `config.r`; `config.scale`
    holds for all.

    Raises:
        ModelLinkError: a file is missing or damaged, the adapter is of another kind, or it does not fit the
            model.
    """
    config, tensors = peft_files.read(Path(folder), spec, family)
    return config, {name: full(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Module:
    """The adapter of a Hugging Face module: rows of a canonical B, some of its columns, and the same rows of
    A."""

    name: str
    first: Matrix
    second: Matrix
    rows: tuple[range, ...]
    columns: tuple[range, ...]

    @property
    def rank(self) -> int:
        return sum(map(len, self.columns))

    def tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Planned]]:
        """Yield (name, content) of A and of B; the content is computed when it is written."""
        import torch

        yield self.name + A, _planned(self.first, dtype, (self.rank, self.first.shape[1]),
                                      lambda: torch.cat([full(self.first)[span.start:span.stop]
                                                         for span in self.columns]))
        yield self.name + B, _planned(self.second, dtype, (sum(map(len, self.rows)), self.rank),
                                      lambda: torch.cat(
            [rows_of(self.second, self.rows)[:, span.start:span.stop] for span in self.columns], 1))


def _planned(matrix: Matrix, dtype: torch.dtype | None, shape: tuple[int, int],
             make: Callable[[], torch.Tensor]) -> Planned:
    kind = dtype or matrix.dtype
    return Planned(kind, shape, lambda: iter([cast(make(), kind, "the adapter").contiguous()]))


def _modules(spec: ModelSpec, family: str, tensors: Mapping[str, Matrix], r: int) -> list[_Module]:
    """Return the adapters of all Hugging Face modules, without those whose kind is zero in every layer."""
    found: list[_Module] = []
    nonzero: set[str] = set()
    for canonical, pieces in family_of(family).rules(spec).items():
        module = canonical.removesuffix(".weight")
        if module + A not in tensors:
            continue
        first, second = tensors[module + A], tensors[module + B]
        rank = first.shape[0]
        spans = [range(start, start + r) for start in range(0, rank, r)] if rank % r == 0 else [range(rank)]
        modules, used = _rows_by_module(pieces), {}
        for name, rows in modules.items():
            values = rows_of(second, rows)
            used[name] = [span for span in spans if values[:, span.start:span.stop].count_nonzero()]
            if used[name]:
                nonzero.add(_kind(name))
        apart = all(one == other or not {*one} & {*other} for one in used.values() for other in used.values())
        for number, (name, rows) in enumerate(modules.items()):
            columns = used[name] or [spans[min(number, len(spans) - 1)]]
            found.append(_Module(name, first, second, rows, tuple(columns if apart else spans)))
    return [module for module in found if not nonzero or _kind(module.name) in nonzero]


def _rows_by_module(pieces: Rows) -> dict[str, tuple[range, ...]]:
    """Return Hugging Face module -> the canonical rows it is made of, in the order of its own rows."""
    found: dict[str, list[tuple[int, range]]] = {}
    row = 0
    for name, rows, _ in pieces:
        found.setdefault(name.removesuffix(".weight"), []).append((rows.start, range(row, row + len(rows))))
        row += len(rows)
    return {name: tuple(rows for _, rows in sorted(own, key=lambda entry: entry[0]))
            for name, own in found.items()}


def _kind(module: str) -> str:
    return module.rpartition(".")[2]
