# SPDX-License-Identifier: Apache-2.0
"""The command `modellink-preprocess` and its subcommands `inspect` and `merge`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

import click

from modellink.data_prep.inspection import InspectOptions, inspect
from modellink.data_prep.merge import MergeOptions, groups_of, merge_groups
from modellink.data_prep.options import PreprocessOptions, Summary
from modellink.data_prep.plan import PreprocessPlan, make_plan
from modellink.data_prep.preprocess import preprocess
from modellink.kernels.command import command
from modellink.kernels.errors import run_command
from modellink.kernels.files import write_json
from modellink.kernels.general_options import NOTHING_DONE, ConfigFileOptions, DryRun, print_plan, with_file
from modellink.kernels.options import Layer, resolve
from modellink.kernels.original import original_flags, translate
from modellink.kernels.tables import print_table

EXAMPLE = """modellink-preprocess --input ./text.jsonl --output-prefix ./data/text \\
    --tokenizer-name-or-path ./Qwen2.5-7B --append-eod"""
MERGE = """modellink-preprocess merge --input ./shards --output-prefix ./data/text \\
    --merge-group-keys text_document"""


@command(MergeOptions, name="merge", example=MERGE, starts=True)
def merge_command(given: Layer, dry_run: DryRun | None) -> None:
    """Merge the datasets in a folder whose file names contain a key, sorted by name."""
    options = resolve([MergeOptions], given)[MergeOptions]
    if dry_run:
        print_plan((f"{output}.bin, .idx", ", ".join(map(str, prefixes))) for output, prefixes in groups_of(options).items())
        return
    for data in merge_groups(options):
        _print_table(str(data.prefix), [("documents", data.document_count), ("tokens", data.token_count)])


@command(InspectOptions, name="inspect", example="modellink-preprocess inspect ./data/text_text_document",
         starts=True)
@click.argument("prefix")
def inspect_command(prefix: str, given: Layer, dry_run: DryRun | None) -> None:
    """Show counts, lengths and samples of the dataset PREFIX."""
    options = resolve([InspectOptions], given)[InspectOptions]
    if dry_run:
        options = replace(options, histogram=None, summary=None)
    found = inspect(prefix, options)
    if options.summary:
        write_json(options.summary, asdict(found))
    _print_table(found.prefix, [
        ("documents", found.documents), ("sequences", found.sequences), ("tokens", found.tokens),
        *([("learned tokens", found.learned)] if found.learned is not None else []), ("token type", found.dtype),
        ("largest id", found.largest_id), (".bin", f"{found.bin_bytes:,} bytes"),
        (".idx", f"{found.idx_bytes:,} bytes"), *((f"length, {name}", f"{value:,.1f}") for name, value in found.lengths.items()),
        *((f"document {index}", text) for index, text in found.samples.items())])
    if dry_run:
        print(NOTHING_DONE)


@command(PreprocessOptions, ConfigFileOptions, name="modellink-preprocess", example=EXAMPLE, starts=True,
         subcommands={"inspect": inspect_command, "merge": merge_command})
def preprocess_command(given: Layer, dry_run: DryRun | None) -> None:
    """Tokenize text files into Megatron datasets (PREFIX_KEY_document.bin and .idx).

    To resume a run that was killed, give the same command again.
    """
    options = resolve([PreprocessOptions], *with_file(given))[PreprocessOptions]
    if dry_run:
        print_plan(_plan_rows(make_plan(options), options))
        return
    summary = preprocess(options)
    if options.summary:
        write_json(options.summary, asdict(summary))
    _print_table("modellink-preprocess", _summary_rows(summary, options))


def _plan_rows(plan: PreprocessPlan, options: PreprocessOptions) -> Iterator[tuple[str, object]]:
    """Yield what a run would do, for --dry-run."""
    yield "input", f"{sum(piece.bytes for piece in plan.pieces):,} bytes in {len(plan.pieces):,} pieces"
    yield "rows", f"read by {options.handler_name}"
    yield "tokenizer", f"{options.tokenizer_name_or_path}, by {plan.backend}: {plan.why}"
    yield "token type", plan.job.dtype
    yield from (("output", f"{prefix}.bin, .idx") for prefix in plan.outputs.values())
    yield "workers", f"{options.workers} ({options.executor})"
    yield "share", options.piece
    yield "summary", options.summary


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


def _print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    print_table(("", ""), [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in rows], title=title)


def main() -> None:
    """Entry point of `modellink-preprocess`."""
    run_command(_run)


def _run() -> None:
    words = sys.argv[1:]
    if words[:1] not in [[name] for name in preprocess_command.subcommands]:
        if any(word.partition("=")[0] == "--merge-group-keys" for word in words):  # how the original asks for merging
            words.insert(0, "merge")
        words = translate(words, original_flags("modellink.data_prep"))
    preprocess_command.main(words, standalone_mode=False)
