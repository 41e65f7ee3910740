"""Several datasets into one: a streamed copy, in the order given."""

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
    """What `modellink-preprocess merge` is told."""

    input: Path = option(doc="folder with the .bin and .idx files")
    output_prefix: Path = option(doc="where the merged files go: PREFIX_KEY.bin and PREFIX_KEY.idx")
    merge_group_keys: tuple[str, ...] = option(doc="each key merges the files whose names contain it, e.g. text_document")
    overwrite: bool = option(False, "replace an output that exists")


def merge(prefixes: Sequence[Path], output: Path, *, show: bool = True) -> IndexedDataset:
    """Write all documents of the datasets `prefixes`, in that order, as the dataset `output`.

    Raises:
        ModelLinkError: there are none, one is damaged, or their token types differ.
    """
    if not prefixes:
        raise ModelLinkError("there is nothing to merge", where=output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in (Path(f"{output}.bin"), Path(f"{output}.idx")):
        remove_leftovers(path)
    with Work(f"merging {output.name}", len(prefixes), unit="parts", show=show) as work, \
            IndexedWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.add_dataset(IndexedDataset(prefix))
            work.advance()
    return IndexedDataset(output)


def merge_groups(options: MergeOptions) -> list[IndexedDataset]:
    """For each key, merge the datasets in a folder whose names contain it, sorted by name.

    Raises:
        ModelLinkError: no folder, no dataset for a key, a .bin or .idx without the other, or an output that exists.
    """
    if not options.input.is_dir():
        raise ModelLinkError("there is no such folder", where=options.input, fix="--input is the folder of the files to merge")
    files = {path.stem: path for path in options.input.iterdir() if path.suffix in (".bin", ".idx")}
    groups = {}
    for key in options.merge_group_keys:
        output = Path(f"{options.output_prefix}_{key}")
        own = output.resolve()
        groups[output] = [options.input / stem for stem in sorted(files) if key in stem and files[stem].with_suffix("").resolve()
                          != own]
        if not groups[output]:
            raise ModelLinkError(f"no file name contains {key!r}", where=options.input,
                                 fix=f"there are: {', '.join(sorted(files)[:10]) or 'no .bin and .idx files at all'}")
        for prefix in groups[output]:
            IndexedDataset(prefix)
    if (there := existing(list(groups))) and not options.overwrite:
        raise ModelLinkError("the output exists", where=there[0], fix="choose another prefix, or pass --overwrite")
    return [merge(prefixes, output) for output, prefixes in groups.items()]
