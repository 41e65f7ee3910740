"""From text files to Megatron datasets, in pieces: each is tokenised, noted when done, and at the end all are joined in order.

Everything that can be known to be wrong is found before anything is written. `PREFIX.parts/` holds what is finished: a run that
was killed continues from there and ends with the same bytes, and so does any number of workers. The parts of a run with other
input or options are not used. Needs the disk space of the result twice; memory does not grow with the input.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from modellink.data_prep import inputs
from modellink.data_prep.handlers import make_handler
from modellink.data_prep.indexed import existing, token_dtype
from modellink.data_prep.merge import merge
from modellink.data_prep.readers import Source
from modellink.data_prep.tokenise import Done, Job, part_prefix, tokenise
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.files import Journal, kill_point
from modellink.kernels.options import option
from modellink.kernels.progress import Work

LAYOUT = 1  # of the parts; a change of what is in them makes older ones unusable
MIB = 1 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` is told; the command's options are made from this."""

    input: tuple[str, ...] = option(doc="files, folders or quoted patterns: .jsonl, .json, .txt (also .gz), .csv, .parquet")
    output_prefix: Path = option(doc="where results go: PREFIX_KEY_document.bin and .idx; the folder is made")
    tokenizer_name_or_path: Path = option(doc="folder with tokenizer.json")
    tokenizer_type: Literal["PretrainedFromHF"] = option("PretrainedFromHF", "kind of tokenizer")
    handler_name: str = option("GeneralPretrainHandler", "how rows are read")
    json_keys: tuple[str, ...] = option(("text",), "columns to tokenise, each into a dataset of its own", alias="--json-key")
    append_eod: bool = option(False, "end each document with the end-of-document token (eos)")
    workers: int = option(1, "processes; one alone tokenises on all cores too, but reads and writes on one", minimum=1)
    output_dtype: Literal["auto", "int32"] = option("auto", "token type: auto is uint16 below 65,500 ids and else int32; int32 "
                                                    "is what the original always wrote")
    vocab_size: int | None = option(None, "the model's vocabulary; an id beyond it is an error", unit="ids", minimum=1)
    on_bad_row: Literal["fail", "skip"] = option("fail", "what to do with a row that is broken or no text")
    piece_size: float = option(8.0, "input of one piece of work; changes no result", unit="MiB", minimum=0.001)
    overwrite: bool = option(False, "replace an output that exists")
    summary: Path | None = option(None, "write the summary to this file as JSON too")


@dataclass
class Summary:
    """What came out.

    Attributes:
        outputs: name of the column to the prefix of its dataset.
        documents, tokens: counts by column.
        rows, skipped_rows: rows used and rows left out; `bad_rows` names the first of these.
        text_bytes: UTF-8 bytes of the texts used.
        dtype: of the tokens on disk.
        backend: library and version that tokenised.
        seconds: of this run; `tokens_per_second` counts what this run tokenised, not what it found done.
        pieces, pieces_found_done: of the work, all and those an earlier run had finished.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    skipped_rows: int = 0
    bad_rows: list[str] = field(default_factory=list)
    text_bytes: int = 0
    dtype: str = ""
    backend: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    pieces: int = 0
    pieces_found_done: int = 0


@dataclass
class Plan:
    """The work, checked, before anything is written."""

    job: Job
    pieces: list[inputs.Piece]
    outputs: dict[str, Path]
    made_from: dict[str, Any]
    backend: str


def preprocess(options: PreprocessOptions, *, show: bool = True) -> Summary:
    """Tokenise the inputs into `{output_prefix}_{key}_document.bin` and `.idx`.

    Args:
        show: progress on stderr.

    Raises:
        ModelLinkError: a wrong input, option or row. Nothing is left behind, unless pieces were finished: they stay for the
            next run, in `{output_prefix}.parts/`.
    """
    start = time.monotonic()
    plan = _plan(options)
    folder = options.output_prefix.parent
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(plan.job.parts):
        try:
            found, done = _run(plan, options, show=show)
        except ModelLinkError:
            if not any(path.stat().st_size for path in plan.job.parts.glob("*.bin")):
                shutil.rmtree(plan.job.parts)
                with suppress(OSError):  # it may hold other things by now
                    (folder if is_new else plan.job.parts).rmdir()
            raise
        shutil.rmtree(plan.job.parts)
    return _summarise(plan, found, done, time.monotonic() - start)


def _run(plan: Plan, options: PreprocessOptions, *, show: bool) -> tuple[dict[int, Done], dict[int, Done]]:
    """Do what is left to do. Returns the pieces that were found finished, and all."""
    with _open_journal(plan, show=show) as journal:
        states = [entry["state"] for entry in journal.entries if "state" in entry]
        found = _finished(plan, journal)
        outputs = existing(list(plan.outputs.values()))
        if "merged" in states and len(outputs) == 2 * len(plan.outputs):  # killed while it tidied up
            return found, found
        if outputs and not options.overwrite and "merging" not in states:
            raise _exists(outputs[0])
        done = _work(plan, found, journal, options.workers, show=show)
        journal.append({"state": "merging"})  # from here on the outputs are this run's own
        _merge(plan, done, show=show)
        journal.append({"state": "merged"})
        kill_point("merged")
        for path in plan.job.parts.glob("*_*"):
            path.unlink()
    return found, done


def _plan(options: PreprocessOptions) -> Plan:
    paths = inputs.find_inputs(options.input)
    tokenizer = Tokenizer.from_folder(options.tokenizer_name_or_path)
    keys = tuple(dict.fromkeys(options.json_keys))
    handler = make_handler(options.handler_name, tokenizer, keys, options.append_eod)
    sources = [inputs.open_source(path) for path in paths]
    for source in sources:
        _check_columns(source, handler.columns)
    small = handler.small_ids and options.output_dtype == "auto"
    dtype = token_dtype(tokenizer.vocab_size if small else None).name
    parts = Path(f"{options.output_prefix}.parts")
    job = Job(tokenizer.folder.resolve(), options.handler_name, keys, options.append_eod, dtype, options.on_bad_row == "skip",
              options.vocab_size, parts)
    plan = Plan(job, inputs.cut(sources, int(options.piece_size * MIB)),
                {name: Path(f"{options.output_prefix}_{name}_document") for name in handler.outputs},
                {"layout": LAYOUT, "input": inputs.fingerprint(paths), "piece size": options.piece_size,
                 "tokenizer": tokenizer.fingerprint, "library": tokenizer.backend, "handler": options.handler_name,
                 "columns": list(keys), "end of document": tokenizer.eod_token_id if options.append_eod else None,
                 "token type": dtype, "vocabulary": options.vocab_size}, tokenizer.backend)
    if not (options.overwrite or parts.exists()):
        for path in existing(list(plan.outputs.values())):
            raise _exists(path)
    return plan


def _exists(path: Path) -> ModelLinkError:
    return ModelLinkError("the output exists", where=path, fix="choose another --output-prefix, remove it, or pass --overwrite")


def _check_columns(source: Source, wanted: list[str]) -> None:
    names = source.columns()
    for column in wanted if names is not None else []:
        if column not in (names or []):
            raise ModelLinkError(f"there is no column {column!r}", where=source.path, fix=near(column, names or []) or
                                 f"--json-keys is one or more of: {', '.join(names or [])}")


@contextmanager
def _alone(parts: Path) -> Iterator[None]:
    """One run at a time on the parts; the lock is the process's and vanishes with it."""
    parts.mkdir(exist_ok=True)
    with (parts / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelLinkError("another run is writing this output", where=parts, fix="wait for it to end") from None
        yield


def _open_journal(plan: Plan, *, show: bool) -> Journal:
    """The journal of what is finished; an empty one, without any parts, when they were made from something else."""
    parts = plan.job.parts
    journal = Journal(parts / "journal.jsonl")
    before = journal.entries[0].get("made_from", {}) if journal.entries else None
    if before != plan.made_from:
        journal.close()
        for path in parts.iterdir():
            if path.name != "lock":
                path.unlink()
        journal = Journal(parts / "journal.jsonl")
        journal.append({"made_from": plan.made_from})
        if before is not None and show:
            changed = [name for name, value in plan.made_from.items() if before.get(name) != value]
            print(f"starting anew: the unfinished run here had another {', another '.join(changed)}", file=sys.stderr)
    for path in parts.glob(".*.tmp"):
        path.unlink()
    return journal


def _finished(plan: Plan, journal: Journal) -> dict[int, Done]:
    """Pieces whose files are there with the sizes that were noted; all, once they are merged.

    A piece with bad rows does not count when those must fail.
    """
    found = {}
    merged = {"state": "merged"} in journal.entries
    for entry in journal.entries:
        if "piece" in entry:
            done = Done(**entry)
            files = {plan.job.parts / name: size for name, size in done.sizes.items()}
            whole = merged or all(path.is_file() and path.stat().st_size == size for path, size in files.items())
            if whole and (plan.job.skip_bad_rows or not done.skipped):
                found[done.piece] = done
    return found


def _work(plan: Plan, found: dict[int, Done], journal: Journal, workers: int, *, show: bool) -> dict[int, Done]:
    done = dict(found)
    todo = [piece for piece in plan.pieces if piece.index not in found]
    what = "tokenising" + (f", {len(found)} of {len(plan.pieces)} pieces were done" if found else "")
    with Work(what, sum(piece.bytes for piece in todo), unit="bytes", show=show) as work:
        for item in tokenise(plan.job, todo, min(workers, len(todo))):
            journal.append(asdict(item))
            done[item.piece] = item
            kill_point("piece-noted")
            work.advance(plan.pieces[item.piece].bytes)
    return done


def _merge(plan: Plan, done: dict[int, Done], *, show: bool) -> None:
    kill_point("before-merge")
    for name in plan.outputs:
        if not sum(item.documents[name] for item in done.values()):
            raise ModelLinkError(f"no tokens came out for {name!r}", where=", ".join(sorted({
                str(path) for piece in plan.pieces for path, _ in piece.spans})[:5]) or "--input", fix="the input is empty")
    for name, prefix in plan.outputs.items():
        merge([part_prefix(plan.job.parts, index, name) for index in sorted(done)], prefix, show=show)
        kill_point("output-written")


def _summarise(plan: Plan, found: dict[int, Done], done: dict[int, Done], seconds: float) -> Summary:
    items = [done[index] for index in sorted(done)]
    new = sum(sum(item.tokens.values()) for item in items if item.piece not in found)
    return Summary(
        outputs={name: str(prefix) for name, prefix in plan.outputs.items()},
        documents={name: sum(item.documents[name] for item in items) for name in plan.outputs},
        tokens={name: sum(item.tokens[name] for item in items) for name in plan.outputs},
        rows=sum(item.rows for item in items), skipped_rows=sum(item.skipped for item in items),
        bad_rows=[text for item in items for text in item.bad][:20], text_bytes=sum(item.text_bytes for item in items),
        dtype=plan.job.dtype, backend=plan.backend, seconds=round(seconds, 3),
        tokens_per_second=round(new / max(seconds, 1e-9), 1), pieces=len(plan.pieces), pieces_found_done=len(found))
