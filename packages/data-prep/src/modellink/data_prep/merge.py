# SPDX-License-Identifier: Apache-2.0
"""Merge several datasets into one by a streamed copy, in the given order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modellink.data_prep.indexed import IndexedDataset, IndexedWriter, existing
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import remove_leftovers
from modellink.kernels.options import option
from modellink.kernels.progress import Work


@dataclass(frozen=True)
class MergeOptions:
    """Options of `modellink-preprocess merge`."""

    input: Path = option(doc="Folder with the .bin and .idx files.")
    output_prefix: Path = option(doc="Prefix of the merged files, PREFIX_KEY.bin and PREFIX_KEY.idx.")
    merge_group_keys: tuple[str, ...] = option(doc="For each key, merge the files whose names contain it, e.g. text_document.")
    overwrite: bool = option(False, "Replace an existing output.")


def merge(prefixes: Sequence[Path], output: Path, *, show: bool = True) -> IndexedDataset:
    """Write all documents of the datasets `prefixes`, in that order, as the dataset `output`.

    Raises:
        ModelLinkError: the list is empty, a dataset is damaged, or the token types differ.
    """
    if not prefixes:
        raise ModelLinkError("no datasets to merge were given", where=output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in (Path(f"{output}.bin"), Path(f"{output}.idx")):
        remove_leftovers(path)
    with Work(f"merging {output.name}", len(prefixes), unit="parts", show=show) as work, \
            IndexedWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.add_dataset(IndexedDataset(prefix))
            work.advance()
    return IndexedDataset(output)


def groups_of(options: MergeOptions) -> dict[Path, list[Path]]:
    """Return for each output prefix the prefixes of the datasets to merge: those whose names contain its key, sorted by name.

    Raises:
        ModelLinkError: the folder or a dataset for a key is missing, a .bin lacks its .idx or the reverse, or an output exists.
    """
    if not options.input.is_dir():
        raise ModelLinkError("the folder does not exist", where=options.input,
                             fix="--input must be the folder of the files to merge")
    files = {path.stem: path for path in options.input.iterdir() if path.suffix in (".bin", ".idx")}
    groups = {}
    for key in options.merge_group_keys:
        output = Path(f"{options.output_prefix}_{key}")
        own = output.resolve()
        groups[output] = [options.input / stem for stem in sorted(files) if key in stem and files[stem].with_suffix("").resolve()
                          != own]
        if not groups[output]:
            raise ModelLinkError(f"no file name contains {key!r}", where=options.input,
                                 fix=f"the folder contains: {', '.join(sorted(files)[:10]) or 'no .bin and .idx files'}")
        for prefix in groups[output]:
            IndexedDataset(prefix)
    if (there := existing(list(groups))) and not options.overwrite:
        raise ModelLinkError("the output already exists", where=there[0], fix="choose another prefix, or pass --overwrite")
    return groups


def merge_groups(options: MergeOptions) -> list[IndexedDataset]:
    """For each key, merge the datasets in a folder whose names contain it; raises as `groups_of`."""
    return [merge(prefixes, output) for output, prefixes in groups_of(options).items()]
