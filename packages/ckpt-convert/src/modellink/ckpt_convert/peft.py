"""LoRA adapters as folders of peft, written and read: what core's training saves and loads.

Where Megatron has one matrix for several Hugging Face modules (query, key and value; gate and up), they share one A when written,
and B is cut as the rows of the weight are. When read, different As are put one below the other, and B has each module's part in
its own columns and zeros elsewhere: the same product, with a larger rank. Written again, columns of zeros are left out, and so is
a module that has learned nothing in any layer: what was read comes back as it was.

Experts are written one by one, as in public files; peft puts them together itself where transformers does. Not here: the files
(formats/peft.py) and merging (lora.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modellink.ckpt_convert.adapter import AdapterConfig
from modellink.ckpt_convert.blocks import cast
from modellink.ckpt_convert.families import family_of
from modellink.ckpt_convert.formats import peft, safetensors, writing
from modellink.ckpt_convert.formats.writing import Planned
from modellink.ckpt_convert.lora import A, B, Matrix, adapter_weights, merge_lora, rows_of, whole
from modellink.ckpt_convert.rules import Rows
from modellink.ckpt_convert.spec import ModelSpec
from modellink.kernels.files import atomic_folder, atomic_write, write_json

__all__ = ["AdapterConfig", "merge_lora", "read_peft", "write_peft"]


def write_peft(folder: Path | str, spec: ModelSpec, family: str, tensors: Mapping[str, Matrix], config: AdapterConfig, *,
               base: str | None = None, overwrite: bool = False) -> None:
    """Write an adapter as the new folder `folder`, for `peft.PeftModel.from_pretrained`.

    Args:
        spec, family: of the model it belongs to; the family gives the names.
        tensors: canonical name (`decoder.layers.0.self_attention.linear_qkv.lora_A.weight`) -> [rank, in], `lora_B` [out, rank];
            whole, as without tensor parallelism.
        base: name or folder of the base model, for `base_model_name_or_path`.

    Raises:
        ModelLinkError: the tensors do not fit the model, or the folder exists.
    """
    layout, values = planned(spec, family, tensors, config, base=base)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        with atomic_write(temporary / peft.WEIGHTS) as file, ThreadPoolExecutor(1) as pool:
            writing.write(file.fileno(), layout, pool, lambda count: None, temporary / peft.WEIGHTS)
        write_json(temporary / peft.CONFIG, values)


def planned(spec: ModelSpec, family: str, tensors: Mapping[str, Matrix], config: AdapterConfig, *, base: str | None,
            dtype: torch.dtype | None = None) -> tuple[writing.FileLayout, dict[str, Any]]:
    """(the file of tensors, the content of adapter_config.json); see `write_peft`."""
    adapter_weights(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the adapter")
    modules = _modules(spec, family, tensors, config.r)
    layout = safetensors.layout({f"{peft.PREFIX}{name}": made for module in modules for name, made in module.tensors(dtype)})
    ranks = {module.name: module.rank for module in modules}
    return layout, peft.config_of(config, ranks, peft.linear_modules(spec, family), base)


def read_peft(folder: Path | str, spec: ModelSpec, family: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """(configuration, canonical name -> tensor) of an adapter folder.

    A matrix made of several modules with As of their own has more rows in its A than `config.r`; `config.scale` is that of all.

    Raises:
        ModelLinkError: a file is missing or damaged, the adapter is of another kind, or it does not fit the model.
    """
    config, tensors = peft.read(Path(folder), spec, family)
    return config, {name: whole(tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Module:
    """A Hugging Face module's adapter: rows of a canonical B, some of its columns, and the same rows of A."""

    name: str
    first: Matrix
    second: Matrix
    rows: tuple[range, ...]
    columns: tuple[range, ...]

    @property
    def rank(self) -> int:
        return sum(map(len, self.columns))

    def tensors(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Planned]]:
        """Name and content of A and of B; made when they are written."""
        yield self.name + A, _planned(self.first, dtype, (self.rank, self.first.shape[1]),
                                      lambda: torch.cat([whole(self.first)[span.start:span.stop] for span in self.columns]))
        yield self.name + B, _planned(self.second, dtype, (sum(map(len, self.rows)), self.rank), lambda: torch.cat(
            [rows_of(self.second, self.rows)[:, span.start:span.stop] for span in self.columns], 1))


def _planned(matrix: Matrix, dtype: torch.dtype | None, shape: tuple[int, int], make: Callable[[], torch.Tensor]) -> Planned:
    kind = dtype or matrix.dtype
    return Planned(kind, shape, lambda: iter([cast(make(), kind, "the adapter").contiguous()]))


def _modules(spec: ModelSpec, family: str, tensors: Mapping[str, Matrix], r: int) -> list[_Module]:
    """The adapters of all Hugging Face modules, without those whose kind learned nothing in any layer."""
    found: list[_Module] = []
    learned: set[str] = set()
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
                learned.add(_kind(name))
        apart = all(one == other or not {*one} & {*other} for one in used.values() for other in used.values())
        for number, (name, rows) in enumerate(modules.items()):
            columns = used[name] or [spans[min(number, len(spans) - 1)]]
            found.append(_Module(name, first, second, rows, tuple(columns if apart else spans)))
    return [module for module in found if not learned or _kind(module.name) in learned]


def _rows_by_module(pieces: Rows) -> dict[str, tuple[range, ...]]:
    """Hugging Face module -> the canonical rows it is made of, in the order of its own."""
    found: dict[str, list[tuple[int, range]]] = {}
    row = 0
    for name, rows, _ in pieces:
        found.setdefault(name.removesuffix(".weight"), []).append((rows.start, range(row, row + len(rows))))
        row += len(rows)
    return {name: tuple(rows for _, rows in sorted(own, key=lambda entry: entry[0])) for name, own in found.items()}


def _kind(module: str) -> str:
    return module.rpartition(".")[2]
