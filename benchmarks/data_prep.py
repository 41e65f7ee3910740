"""modellink-preprocess beside the raw tokenizer: tokens a second of both on the same texts, their ratio, and peak memory.

The raw tokenizer (`tokenizers.encode_batch_fast` on all cores, texts in memory, nothing written) is peer and limit in one: what
preprocess adds is reading, checking, writing and joining, and starting its workers. Each run has a process of its own, so that
the memory is its own. On two cores one worker is as good as two: tokenizers uses both.

    python benchmarks/data_prep.py [--tokenizer FOLDER] [--data FOLDER] [--megabytes 6] [--workers 1 2] [--json FILE]

Texts are those of the shared test data (`--data`, or MODELLINK_TEST_DATA, or ../shared/data beside the checkout), else Python's
own help topics. Without `--tokenizer`, a byte-level BPE of 8,000 entries is trained on them.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers

from modellink.data_prep import PreprocessOptions, preprocess

ROUNDS = 3  # the best counts


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


def measure(what: str, folder: Path, source: Path, workers: int) -> None:
    """Print tokens, seconds and peak memory of one run as JSON. Runs in a process of its own."""
    if what == "raw":
        engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        documents = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
        start = time.perf_counter()
        tokens = sum(len(item.ids) for at in range(0, len(documents), 500)
                     for item in engine.encode_batch_fast(documents[at:at + 500]))
        seconds = time.perf_counter() - start
    else:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            summary = preprocess(PreprocessOptions(input=(str(source),), output_prefix=Path(out) / "set", workers=workers,
                                                   tokenizer_name_or_path=folder, piece_size=1.0), show=False)
            seconds = time.perf_counter() - start
            tokens = summary.tokens["text"]
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"tokens": tokens, "seconds": seconds, "rate": tokens / seconds, "peak": peak * 1024}))


def best(what: str, folder: Path, source: Path, workers: int) -> dict[str, float]:
    runs = [json.loads(subprocess.run([sys.executable, __file__, "--measure", what, str(folder), str(source), str(workers)],
                                      check=True, capture_output=True, text=True).stdout) for _ in range(ROUNDS)]
    return max(runs, key=lambda run: run["rate"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkout = Path(__file__).resolve().parents[1]
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MODELLINK_TEST_DATA")
                                                          or checkout.parent / "shared" / "data"))
    parser.add_argument("--megabytes", type=float, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder, source, workers = args.measure
        return measure(what, Path(folder), Path(source), int(workers))
    some = texts(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.tokenizer or train(Path(scratch), some)
        source = Path(scratch) / "texts.jsonl"
        with source.open("w", encoding="utf-8") as file:
            number = 0
            while file.tell() < args.megabytes * 1e6:
                file.write(json.dumps({"text": some[number % len(some)]}, ensure_ascii=False) + "\n")
                number += 1
        kind = folder.name if args.tokenizer else "trained on the spot"
        print(f"{source.stat().st_size / 1e6:.1f} MB, {number:,} documents, tokenizer {kind}")
        raw = best("raw", folder, source, 0)
        print(f"raw tokenizer:           {raw['rate']:>10,.0f} tokens/s, peak {raw['peak'] / 1e6:,.0f} MB")
        rows = []
        for workers in args.workers:
            ours = best("ours", folder, source, workers)
            assert ours["tokens"] == raw["tokens"]
            rows.append({"claim": f"preprocess, {workers} worker(s), against raw", "ours": ours["rate"], "peer": raw["rate"],
                         "unit": "tokens/s", "peer_name": "tokenizers.encode_batch_fast", "peak_memory": ours["peak"],
                         "limit": raw["rate"]})
            print(f"preprocess, {workers} worker(s): {ours['rate']:>10,.0f} tokens/s, peak {ours['peak'] / 1e6:,.0f} MB in the "
                  f"largest process, {ours['rate'] / raw['rate']:.2f} of raw")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
