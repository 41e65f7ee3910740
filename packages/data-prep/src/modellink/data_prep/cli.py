"""The command `modellink-preprocess` and its subcommands `inspect` and `merge`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import click

from modellink.data_prep.inspection import InspectOptions, inspect
from modellink.data_prep.merge import MergeOptions, merge_groups
from modellink.data_prep.options import PreprocessOptions, Summary
from modellink.data_prep.preprocess import preprocess
from modellink.kernels.errors import run_command
from modellink.kernels.files import write_json
from modellink.kernels.options import Layer, command, resolve, yaml_layer
from modellink.kernels.original import original_flags, translate

HELP = """Tokenize text files into Megatron datasets (PREFIX_KEY_document.bin and .idx).

To resume a run that was killed, give the same command again.

`modellink-preprocess inspect PREFIX` shows the contents of a dataset, `modellink-preprocess merge` joins several."""


@command(PreprocessOptions, name="modellink-preprocess", help=HELP)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with these options; the command line overrides it.")
def preprocess_command(config: Path | None, given: Layer) -> None:
    layers = ([yaml_layer(config)] if config else []) + [given]
    options = resolve([PreprocessOptions], *layers)[PreprocessOptions]
    summary = preprocess(options)
    if options.summary:
        write_json(options.summary, asdict(summary))
    _print_table("modellink-preprocess", _summary_rows(summary, options))


def _summary_rows(summary: Summary, options: PreprocessOptions) -> Iterator[tuple[str, object]]:
    for name, prefix in summary.outputs.items():
        yield f"{name}: documents", summary.documents[name]
        yield f"{name}: tokens", summary.tokens[name]
        yield f"{name}: written to", f"{prefix}.bin, .idx ({summary.dtype})" if not options.piece else "not yet joined"
    yield "rows", summary.rows
    yield "rows skipped", summary.skipped_rows
    yield from (("", text) for text in summary.bad_rows)
    if summary.learned_tokens:
        yield "learned tokens", summary.learned_tokens
    if options.seq_length and summary.learned_tokens:
        yield "samples cut", summary.cut_samples
        yield "long samples dropped", summary.dropped_samples
    if summary.empty_samples:
        yield "samples with an empty question or answer, skipped", summary.empty_samples
    if summary.packs:
        yield "packs", f"{summary.packs:,} of {options.seq_length:,} tokens, {summary.fill:.1%} filled"
    yield "text", f"{summary.text_bytes:,} bytes"
    yield "tokenized by", f"{summary.backend}: {summary.backend_why}"
    yield "pieces", f"{summary.pieces:,}" + (f", {summary.pieces_found_done:,} found done" if summary.pieces_found_done else "")
    yield "seconds", f"{summary.seconds:,.1f}"
    yield "tokens a second", f"{summary.tokens_per_second:,.0f}"


@command(MergeOptions, name="modellink-preprocess merge")
def merge_command(given: Layer) -> None:
    """Merge the datasets in a folder whose file names contain a key, sorted by name."""
    for data in merge_groups(resolve([MergeOptions], given)[MergeOptions]):
        _print_table(str(data.prefix), [("documents", data.document_count), ("tokens", data.token_count)])


@command(InspectOptions, name="modellink-preprocess inspect")
@click.argument("prefix")
def inspect_command(prefix: str, given: Layer) -> None:
    """Show counts, lengths and samples of the dataset PREFIX."""
    options = resolve([InspectOptions], given)[InspectOptions]
    found = inspect(prefix, options)
    if options.summary:
        write_json(options.summary, asdict(found))
    _print_table(found.prefix, [
        ("documents", found.documents), ("sequences", found.sequences), ("tokens", found.tokens),
        *([("learned tokens", found.learned)] if found.learned is not None else []), ("token type", found.dtype),
        ("largest id", found.largest_id), (".bin", f"{found.bin_bytes:,} bytes"),
        (".idx", f"{found.idx_bytes:,} bytes"), *((f"length, {name}", f"{value:,.1f}") for name, value in found.lengths.items()),
        *((f"document {index}", text) for index, text in found.samples.items())])


def _print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    from rich.console import Console  # worker processes import this module too
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value).replace("[", "\\["))
    Console().print(table)


def main() -> None:
    """Entry point of `modellink-preprocess`."""
    args = sys.argv[1:]
    if args[:1] == ["inspect"]:
        run_command(lambda: inspect_command.main(args[1:], "modellink-preprocess inspect", standalone_mode=False))
    if args[:1] == ["merge"]:
        run_command(lambda: merge_command.main(args[1:], "modellink-preprocess merge", standalone_mode=False))
    if any(arg.partition("=")[0] == "--merge-group-keys" for arg in args):  # how the original asks for merging
        run_command(lambda: merge_command.main(translate(args, original_flags("modellink.data_prep")), standalone_mode=False))
    run_command(lambda: preprocess_command.main(translate(args, original_flags("modellink.data_prep")), standalone_mode=False))
