# SPDX-License-Identifier: Apache-2.0
"""Tokenize text files into Megatron datasets, piece by piece; the parts are recorded in a journal and joined in order at the end.

`PREFIX.parts/` holds the finished parts. A run that was killed resumes from them and ends with the same bytes, as does any number
of workers, shares on several machines or Ray nodes. Parts of a run with other inputs or options are not used. The disk needs
twice the space of the result; memory does not grow with the input, except for four numbers per sample when packing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from modellink.data_prep.indexed import existing
from modellink.data_prep.inputs import Piece, open_source
from modellink.data_prep.merge import merge
from modellink.data_prep.options import PreprocessOptions, Summary
from modellink.data_prep.packing import Packed, pack
from modellink.data_prep.parts import alone, clear, entries_of_shares, finished, noted, open_journal
from modellink.data_prep.pieces import Done, Workers, part_prefix, tokenize
from modellink.data_prep.plan import PreprocessPlan, make_plan, output_exists
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import Journal, kill_point
from modellink.kernels.messages import note
from modellink.kernels.progress import Work

__all__ = ["PreprocessOptions", "Summary", "preprocess"]

NAMED = 20  # bad rows listed in the summary


def preprocess(options: PreprocessOptions, *, show: bool = True) -> Summary:
    """Tokenize the inputs into `{output_prefix}_{key}_document.bin` and `.idx`; with `options.piece`, do one share of the work.

    Args:
        show: show progress on stderr.

    Raises:
        ModelLinkError: an input, option or row is wrong. Nothing is left behind except finished pieces, which stay in
            `{output_prefix}.parts/` for the next run.
    """
    with Workers() as workers:
        return _preprocess(options, workers, show=show)


def _preprocess(options: PreprocessOptions, workers: Workers, *, show: bool) -> Summary:
    start = time.monotonic()
    share = options.share
    most = options.workers if options.executor == "local" else 1
    plan = make_plan(options, begin=lambda pieces: workers.start(min(most, pieces)), show=show)
    parts, folder = plan.job.parts, options.output_prefix.parent
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone(parts, share, show=show):
            try:
                found, done, packed = _run(plan, options, workers, show=show)
            except ModelLinkError:
                if share is None and not any(path.stat().st_size for path in parts.glob("*.bin")):
                    clear(parts)
                raise
            if share is None:
                clear(parts)
    except ModelLinkError:
        if is_new:
            with suppress(OSError):  # it is not empty: finished parts, or files of others
                folder.rmdir()
        raise
    return _summarize(plan, found, done, packed, time.monotonic() - start)


Pieces = dict[int, Done]


def _run(plan: PreprocessPlan, options: PreprocessOptions, workers: Workers, *,
         show: bool) -> tuple[Pieces, Pieces, Packed | None]:
    """Do the remaining work; return the pieces an earlier run had finished, all pieces, and the result of packing."""
    parts, share = plan.job.parts, options.share
    with open_journal(parts, share, plan.made_from, overwrite=options.overwrite, show=show) as journal:
        entries = [*([] if share else entries_of_shares(parts, plan.made_from)), *journal.entries]
        states = {entry["state"]: entry for entry in entries if "state" in entry}
        usable, outputs = noted(entries, plan.job), existing(list(plan.outputs.values()))
        if "merged" in states and len(outputs) == 2 * len(plan.outputs) and len(usable) == len(plan.pieces):
            packed = states["merged"].get("packed")  # killed while removing the parts
            return usable, usable, Packed(**packed) if packed else None
        found = finished(parts, usable, show=show)
        if outputs and not options.overwrite and "merging" not in states:
            raise output_exists(outputs[0])
        todo = [piece for piece in plan.pieces if piece.index not in found
                and (share is None or piece.index % share[1] == share[0])]
        done = found | _work(plan, todo, journal, options, workers, show=show)
        if share is not None:
            return found, done, None
        journal.append({"state": "merging"})  # from here on, existing outputs are those of this run
        made = _join(plan, done, options, show=show)
        journal.append({"state": "merged", "packed": asdict(made) if made else None})
        kill_point("merged")
        for path in parts.glob("*_*"):
            path.unlink()
    return found, done, made


def _work(plan: PreprocessPlan, todo: list[Piece], journal: Journal, options: PreprocessOptions, workers: Workers, *,
          show: bool) -> Pieces:
    done: Pieces = {}
    if show and len(todo) < len(plan.pieces):
        note(f"{len(plan.pieces) - len(todo)} of {len(plan.pieces)} pieces are done or belong to other shares")
    run: Callable[..., Iterator[Done]] = partial(tokenize, started=workers)
    if options.executor == "ray":
        from modellink.data_prep.cluster import tokenize_on_ray as run
    with Work("tokenizing", sum(piece.bytes for piece in todo), unit="bytes", show=show) as work:
        for item in run(plan.job, todo, min(options.workers, len(todo)), plan.handler):
            journal.append(asdict(item))
            done[item.piece] = item
            kill_point("piece-noted")
            work.advance(plan.pieces[item.piece].bytes)
    return done


def _join(plan: PreprocessPlan, done: Pieces, options: PreprocessOptions, *, show: bool) -> Packed | None:
    """Join the parts to the outputs."""
    kill_point("before-merge")
    for name in plan.outputs:
        if not sum(item.documents[name] for item in done.values()):
            dropped, empty = (sum(getattr(item, what) for item in done.values()) for what in ("dropped", "empty"))
            reasons = [f"samples longer than --seq-length: {dropped:,}"] if dropped else []
            reasons += [f"samples with an empty question or answer: {empty:,}"] if empty else []
            why = "; ".join(reasons) or "the input is empty"
            raise ModelLinkError(f"the output {name!r} has no tokens", where=", ".join(options.input[:5]), fix=why)
    parts = {name: [part_prefix(plan.job.parts, index, name) for index in sorted(done)] for name in plan.outputs}
    if options.packs:
        assert options.seq_length is not None
        made = pack(parts, plan.outputs, options.seq_length, show=show)
        kill_point("output-written")
        return made
    for name, prefix in plan.outputs.items():
        merge(parts[name], prefix, show=show)
        kill_point("output-written")
    return None


def _summarize(plan: PreprocessPlan, found: Pieces, done: Pieces, packed: Packed | None, seconds: float) -> Summary:
    items = [done[index] for index in sorted(done)]
    new = sum(sum(item.tokens.values()) for item in items if item.piece not in found)
    documents = {name: sum(item.documents[name] for item in items) for name in plan.outputs}
    tokens = {name: sum(item.tokens[name] for item in items) for name in plan.outputs}
    if packed:
        documents = dict.fromkeys(documents, packed.packs)
        tokens = dict.fromkeys(tokens, packed.packs * packed.length)
    return Summary(
        outputs={name: str(prefix) for name, prefix in plan.outputs.items()}, documents=documents, tokens=tokens,
        rows=sum(item.rows for item in items), skipped_rows=sum(item.skipped for item in items),
        bad_rows=_name_rows([row for item in items for row in item.bad][:NAMED]), cut_samples=sum(item.cut for item in items),
        dropped_samples=sum(item.dropped for item in items), empty_samples=sum(item.empty for item in items),
        learned_tokens=sum(item.learned for item in items),
        packs=packed.packs if packed else 0, fill=round(packed.fill, 4) if packed else 0.0,
        text_bytes=sum(item.text_bytes for item in items), dtype=plan.job.dtype, backend=plan.backend, backend_why=plan.why,
        seconds=round(seconds, 3), tokens_per_second=round(new / max(seconds, 1e-9), 1), pieces=len(plan.pieces),
        pieces_found_done=len(found))


def _name_rows(bad: list[tuple[str, int, str]]) -> list[str]:
    """Describe bad rows by file and line. Line numbers need a pass over the file, so each file is read once, only here."""
    names: list[str] = []
    for path, rows in groupby(bad, itemgetter(0)):
        places, faults = zip(*((place, why) for _, place, why in rows), strict=True)
        where = open_source(Path(path)).name_places(places)
        names += [f"{place}: {why}" for place, why in zip(where, faults, strict=True)]
    return names
