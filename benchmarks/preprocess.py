# SPDX-License-Identifier: Apache-2.0
"""modellink-preprocess against the method of Megatron's tool and against the raw tokenizer: MB of text per second, peak memory.

The method of Megatron's tool: a pool of processes, one document per call, `IndexedDatasetBuilder` in the parent. It is
rewritten here after `tools/preprocess_data.py`, with the tokenizer of transformers, and its files must equal ours. The
raw tokenizer (`tokenizers.encode_batch_fast` on all cores, texts in memory, no output) is the limit of a run without
gigatoken.

    python benchmarks/preprocess.py [--tokenizer FOLDER] [--data FOLDER] [--megabytes 40] [--workers 1 2] [--growth 20 80]

Each run is a separate process, so that its memory can be measured; times exclude the start of Python and imports but
include loading the tokenizer and starting all workers. `--growth` lists input sizes in MB whose peak memory must be
equal: a row compares the largest with the smallest. A tokenizer that gigatoken does not support has no gigatoken row. The
documents are the texts of `--data`, else Python's help topics, repeated with a number before each: about 4 MB of them
differ, which favors tokenizers that cache words. Without `--tokenizer`, a byte-level BPE of 8,000 entries is trained on
them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers

from modellink.data_prep import PreprocessOptions, Tokenizer, preprocess
from modellink.data_prep.engines import Choice

BACKENDS: list[Choice] = ["tokenizers", *(["gigatoken"] if find_spec("gigatoken") else [])]  # type: ignore[list-item]


def texts(data: Path | None) -> list[str]:
    """Documents of some kB."""
    folder = (data or Path()) / "text"
    if data and folder.is_dir():
        found = [json.loads(line)["text"] for line in (folder / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            found += [text[at:at + 4000] for at in range(0, len(text), 4000)]
        return found
    return list(pydoc_data.topics.topics.values())


def train(folder: Path, some: list[str]) -> Path:
    """A small byte-level BPE."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.train_from_iterator(some, tokenizers.trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|end|>"]))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


def measure(what: str, folder: Path, source: Path, workers: int, out: Path) -> None:
    """Print seconds, a digest of what was written and the peak memory of one run as JSON. Runs in a process of its own."""
    seconds = RUNS[what](folder, source, workers, out)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    digest = hashlib.sha256()
    for path in sorted(out.glob("set_text_document.*")):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    print(json.dumps({"seconds": seconds, "rate": source.stat().st_size / 1e6 / seconds, "peak": peak * 1024,
                      "digest": digest.hexdigest()}))


def raw(folder: Path, source: Path, workers: int, out: Path) -> float:
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    start = time.perf_counter()
    for at in range(0, len(documents), 500):
        engine.encode_batch_fast(documents[at:at + 500])
    return time.perf_counter() - start


def ours(backend: Choice, folder: Path, source: Path, workers: int, out: Path) -> float:
    start = time.perf_counter()
    preprocess(PreprocessOptions(input=(str(source),), output_prefix=out / "set", workers=workers, piece_size=4.0,
                                 tokenizer_name_or_path=folder, append_eod=True, tokenizer_backend=backend), show=False)
    return time.perf_counter() - start


def megatrons_way(folder: Path, source: Path, workers: int, out: Path) -> float:
    """A pool of `workers`, lines handed out 32 at a time, one document a call; the parent builds the dataset."""
    import torch
    import transformers  # noqa: F401 - before the clock starts, and forked into the workers
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    start = time.perf_counter()
    prefix = out / "set_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(Tokenizer.from_folder(folder).vocab_size))
    with source.open(encoding="utf-8") as lines, multiprocessing.get_context("fork").Pool(workers, _load, (folder,)) as pool:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - start


WORKER: list[Any] = []


def _load(folder: Path) -> None:
    import transformers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_file=str(folder / "tokenizer.json"))
    WORKER[:] = [tokenizer, Tokenizer.from_folder(folder).eod_token_id]


def _encode(line: str) -> list[int]:
    tokenizer, end = WORKER
    return [*tokenizer(json.loads(line)["text"]).input_ids, end]


RUNS: dict[str, Callable[[Path, Path, int, Path], float]] = {
    "raw": raw, "megatron": megatrons_way, "tokenizers": partial(ours, "tokenizers"), "gigatoken": partial(ours, "gigatoken")}


def best(what: str, folder: Path, source: Path, workers: int, rounds: int = 1) -> dict[str, Any] | None:
    """The fastest of the rounds; None where gigatoken does not take the tokenizer."""
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run([sys.executable, __file__, "--measure", what, str(folder), str(source), str(workers), out],
                                  capture_output=True, text=True)
        if done.returncode and ("gigatoken cannot" in done.stderr or "gigatoken does not" in done.stderr):
            return None
        if done.returncode:
            sys.exit(f"{what}: {done.stderr.strip()[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return max(runs, key=lambda run: run["rate"])


def write_texts(path: Path, some: list[str], megabytes: float) -> Path:
    """A .jsonl of that size."""
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < megabytes * 1e6:
            for text in some:
                file.write(json.dumps({"text": f"{number} {text}"}, ensure_ascii=False) + "\n")
                number += 1
                if number % 100 == 0 and file.tell() >= megabytes * 1e6:
                    break
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkout = Path(__file__).resolve().parents[1]
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MODELLINK_TEST_DATA")
                                                          or checkout.parent / "shared" / "data"))
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="of each run, the best of which counts")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--growth", type=float, nargs="*", default=[20, 80], help="MB of inputs for the peak memory")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder, source, workers, out = args.measure
        return measure(what, Path(folder), Path(source), int(workers), Path(out))
    some = texts(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.tokenizer or train(Path(scratch), some)
        source = write_texts(Path(scratch) / "texts.jsonl", some, args.megabytes)
        kind = folder.name if args.tokenizer else "trained on the spot"
        print(f"{source.stat().st_size / 1e6:.1f} MB, tokenizer {kind}, {os.cpu_count()} processors; MB/s and peak MB of the "
              "largest process")
        rows = compare(folder, source, args.workers, args.rounds)
        rows += growth(folder, some, args.growth, max(args.workers))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


def growth(folder: Path, some: list[str], sizes: list[float], workers: int) -> list[dict[str, Any]]:
    """Peak memory of the largest process over inputs of these sizes, with the fastest library that takes the tokenizer."""
    peaks: dict[float, float] = {}
    for size in sorted(sizes):
        with tempfile.TemporaryDirectory() as scratch:
            grown = write_texts(Path(scratch) / "grown.jsonl", some, size)
            what, run = next((what, run) for what in reversed(BACKENDS)
                             if (run := best(what, folder, grown, workers)) is not None)
        peaks[size] = run["peak"]
        print(f"{what}, {size:,.0f} MB of input: {run['rate']:.1f} MB/s, peak {run['peak'] / 1e6:,.0f} MB")
    if len(peaks) < 2:
        return []
    small, large = min(peaks), max(peaks)
    return [{"claim": f"peak memory of {large:,.0f} MB, {what}", "ours": peaks[large] / 1e6, "peer": peaks[small] / 1e6,
             "unit": "MB", "peer_name": f"{small:,.0f} MB of the same input", "peak_memory": peaks[large], "limit": None}]


def compare(folder: Path, source: Path, workers: list[int], rounds: int) -> list[dict[str, Any]]:
    limit = best("raw", folder, source, 0, rounds)
    assert limit is not None
    print(f"{'raw tokenizer, all cores':<32}{limit['rate']:>8.1f}{limit['peak'] / 1e6:>8,.0f}")
    rows = []
    for count in workers:
        peer = best("megatron", folder, source, count, rounds)
        assert peer is not None
        print(f"{f'Megatron, {count} worker(s)':<32}{peer['rate']:>8.1f}{peer['peak'] / 1e6:>8,.0f}")
        for what in BACKENDS:
            if (run := best(what, folder, source, count, rounds)) is None:
                continue
            assert run["digest"] == peer["digest"], f"{what} wrote other bytes than Megatron's builder"
            print(f"{f'preprocess, {what}, {count} worker(s)':<32}{run['rate']:>8.1f}{run['peak'] / 1e6:>8,.0f}"
                  f"   {run['rate'] / peer['rate']:.1f} x Megatron, same bytes")
            rows.append({"claim": f"preprocess, {what}, {count} worker(s)", "ours": run["rate"], "peer": peer["rate"],
                         "unit": "MB/s", "peer_name": "pool of processes and IndexedDatasetBuilder",
                         "peak_memory": run["peak"], "limit": limit["rate"] if what == "tokenizers" else None})
    return rows


if __name__ == "__main__":
    main()
