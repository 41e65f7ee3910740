# SPDX-License-Identifier: Apache-2.0
"""Validate options and inputs and plan the work; mistakes are reported here, before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from modellink.data_prep import inputs
from modellink.data_prep.engines import Choice, Engine
from modellink.data_prep.engines.gigatoken import GigaToken
from modellink.data_prep.engines.huggingface import HuggingFace
from modellink.data_prep.handlers import Handler, Reading, Rows, choose_maps, make_handler, trains_on_chats
from modellink.data_prep.indexed import existing, token_dtype
from modellink.data_prep.options import PreprocessOptions
from modellink.data_prep.parts import date_before
from modellink.data_prep.pieces import Around, Job
from modellink.data_prep.rows import BadRow, Source, Span
from modellink.data_prep.tokenizer import Tokenizer
from modellink.kernels.errors import ModelLinkError, near
from modellink.kernels.messages import note

LAYOUT = 4  # format version of the parts; increase it when their content changes
MIB = 1 << 20
SAMPLE_PLACES, SAMPLE_ROWS, SAMPLE_CHARACTERS = 20, 500, 1 << 18  # of the corpus sample on which gigatoken must agree


@dataclass
class PreprocessPlan:
    """The validated work.

    Attributes:
        handler: the handler of this process; other processes make their own.
        made_from: everything the parts depend on; parts made from something else are not used.
        why: the reason for the tokenizer library.
    """

    job: Job
    handler: Handler
    pieces: list[inputs.Piece]
    outputs: dict[str, Path]
    made_from: dict[str, Any]
    backend: str
    why: str


def make_plan(options: PreprocessOptions, *, begin: Callable[[int], None] = lambda pieces: None,
              show: bool = True) -> PreprocessPlan:
    """Validate options and inputs and split the work into pieces.

    Args:
        begin: called with the number of pieces as soon as it is known, before the slow checks.

    Raises:
        ModelLinkError: an input or option is wrong.
    """
    names, maps = choose_maps(options.handler_name, options.map_keys, options.input, options.dataset_dir)
    paths = inputs.find_inputs(names)
    reading = _reading(options, maps, show=show)
    tokenizer = Tokenizer.from_folder(options.tokenizer_name_or_path, _before_check(options.tokenizer_backend))
    handler = make_handler(tokenizer, reading)
    sources = [inputs.open_source(path) for path in paths]
    for source in sources:
        _check_columns(source, handler.rows_of(source.path), options.handler_name, show=show)
    if options.packs and handler.ranking:
        raise ModelLinkError("pairs of answers cannot be packed", where="--pack", fix="remove --pack")
    pieces = inputs.cut(sources, int(options.piece_size * MIB))
    begin(len(pieces))
    engine, why = _engine(options, tokenizer, handler, sources)
    if engine is not tokenizer.engine:
        tokenizer = Tokenizer(tokenizer.folder, engine)
        handler = make_handler(tokenizer, reading)
    backend: Choice = "gigatoken" if isinstance(engine, GigaToken) else _before_check(options.tokenizer_backend)
    small = handler.small_ids and options.output_dtype == "auto"
    dtype = token_dtype(tokenizer.vocab_size if small else None).name
    parts = Path(f"{options.output_prefix}.parts")
    made_from = _made_from(options, paths, tokenizer, handler, reading, dtype)
    if reading.hf_chat_template and "strftime_now" in handler.wording:  # one date for all pieces, however long the work takes
        reading = replace(reading, date=date_before(parts, made_from) or date.today().isoformat())
        handler, made_from["date"] = make_handler(tokenizer, reading), reading.date
    verify = options.verify_tokenizer and isinstance(engine, GigaToken)  # otherwise tokenizers itself does the work
    job = Job(tokenizer.folder.resolve(), backend, verify, reading, dtype, options.on_bad_row == "skip",
              options.vocab_size, parts, _around(engine, tokenizer) if not verify else None)
    plan = PreprocessPlan(job, handler, pieces,
                {name: Path(f"{options.output_prefix}_{name}_document") for name in handler.outputs},
                made_from, tokenizer.backend, why)
    if not (options.overwrite or parts.exists()):
        for path in existing(list(plan.outputs.values())):
            raise output_exists(path)
    return plan


def _around(engine: Engine, tokenizer: Tokenizer) -> Around | None:
    if not isinstance(engine, GigaToken):
        return None
    return Around(tuple(engine.head), tuple(engine.tail), tokenizer.eod_token_id)


def output_exists(path: Path) -> ModelLinkError:
    return ModelLinkError("the output already exists", where=path,
                          fix="choose another --output-prefix, remove it, or pass --overwrite")


def _reading(options: PreprocessOptions, maps: tuple[tuple[str, str], ...], *, show: bool) -> Reading:
    chats = trains_on_chats(options.handler_name)
    if options.packs and not chats:
        raise ModelLinkError("plain text is not packed: training cuts its sequences from all documents", where="--pack",
                             fix="remove --pack, or choose an instruction handler")
    if options.packs and options.seq_length is None:
        raise ModelLinkError("--pack needs --seq-length", where="--pack", fix="set --seq-length to the length of a pack")
    if options.seq_length is not None and not chats and show:
        note("--seq-length is ignored: plain text keeps full documents, training cuts its own sequences")
    return Reading(options.handler_name, tuple(dict.fromkeys(options.json_keys)), options.append_eod, maps, options.prompt_type,
                   str(options.template) if options.template else None, options.hf_chat_template, None, options.train_on_prompt,
                   options.seq_length if chats else None, options.long_samples)


def _made_from(options: PreprocessOptions, paths: list[Path], tokenizer: Tokenizer, handler: Handler, reading: Reading,
               dtype: str) -> dict[str, Any]:
    return {"layout": LAYOUT, "version of modellink-data-prep": version("modellink-data-prep"),
            "input": inputs.fingerprint(paths), "piece size": options.piece_size,
            "tokenizer": tokenizer.fingerprint, "library": tokenizer.backend,
            "special tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id], "token type": dtype,
            "vocabulary": options.vocab_size, "wording": hashlib.sha256(handler.wording.encode()).hexdigest(),
            "pack": options.packs, **{name.replace("_", " "): list(map(list, value)) if name == "maps" else
                                      list(value) if isinstance(value, tuple) else value
                                      for name, value in asdict(reading).items()}}


def _check_columns(source: Source, rows: Rows, handler: str, *, show: bool) -> None:
    names = source.columns()
    if names is None:
        return
    option = "--map-keys" if trains_on_chats(handler) else "--json-keys"
    for column in [column for column in (*rows.columns, *rows.named) if column not in names]:
        if column in rows.columns or source.has_header:
            raise ModelLinkError(f"there is no column {column!r}", where=source.path, fix=near(column, names) or
                                 f"{option} names the columns; available: {', '.join(names)}")
        if show:
            note(f"{source.path} has no column {column!r} in its first rows; it is optional for {handler}")


def _before_check(choice: Choice) -> Choice:
    return "tokenizers" if choice == "gigatoken" else choice


def _engine(options: PreprocessOptions, tokenizer: Tokenizer, handler: Handler, sources: list[Source]) -> tuple[Engine, str]:
    """Choose the tokenizer library; return it with the reason."""
    asked = options.tokenizer_backend
    if asked not in ("auto", "gigatoken"):
        return tokenizer.engine, "--tokenizer-backend asks for it"
    if not isinstance(tokenizer.engine, HuggingFace):
        return tokenizer.engine, tokenizer.engine.why
    if trains_on_chats(options.handler_name):
        why = "conversations are tokenized in short parts"
    elif find_spec("gigatoken") is None:
        why = "gigatoken is not installed"
    else:
        try:
            engine = GigaToken(tokenizer.folder, tokenizer.engine, parallel=options.workers == 1)
        except ModelLinkError as error:
            why = error.what
        else:
            difference = engine.difference([*engine.hard_texts(), *_sample(handler, sources)])
            if not difference:
                engine.verify = options.verify_tokenizer
                return engine, engine.why
            why = f"gigatoken differs {difference}"
    if asked == "gigatoken":
        raise ModelLinkError(f"gigatoken cannot be used: {why}", where="--tokenizer-backend", fix="remove the option")
    return tokenizer.engine, why


def _sample(handler: Handler, sources: list[Source]) -> list[str]:
    """Return texts sampled evenly from all inputs; a file without seekable rows is sampled at its beginning."""
    texts: list[str] = []
    chosen = _spread(sources, SAMPLE_PLACES)
    for source in chosen:
        spans = source.cut(max(MIB, source.path.stat().st_size // SAMPLE_PLACES))
        for span in _spread(spans, SAMPLE_PLACES // len(chosen)):
            texts += _some_texts(handler.rows_of(source.path), source, span, SAMPLE_CHARACTERS // SAMPLE_PLACES)
    return texts


def _some_texts(reader: Rows, source: Source, span: Span, characters: int) -> list[str]:
    texts: list[str] = []
    for _, row in islice(source.rows(span, [*reader.columns, *reader.optional]), SAMPLE_ROWS // SAMPLE_PLACES):
        with suppress(ValueError):  # a bad row is reported when its piece is processed
            texts += [] if isinstance(row, BadRow) else reader.parse(row)
        if sum(map(len, texts)) > characters:
            break
    return texts


def _spread(items: list[Any], count: int) -> list[Any]:
    count = min(max(count, 1), len(items))
    return [items[index * len(items) // count] for index in range(count)]
