"""modellink-infer beside transformers' generate: decode tokens a second, greedy, same weights and dtype, in one run.

Two cases: one prompt, and eight prompts of mixed lengths as one batch (transformers pads at the left, as it must). Each contender
has a process of its own, so that the memory is its own; the rounds of the two take turns and the best counts. The limit of one
prompt is the read bandwidth of the memory, measured here, over the bytes of the weights. Tokens must be equal in fp32.

    python benchmarks/infer.py [--model FOLDER] [--dtypes float32 bfloat16] [--tokens 48] [--json FILE]

`--model` (or MODELLINK_TEST_MODEL) is a Hugging Face folder; without one, a random model of SmolLM2-135M's size is written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROUNDS = 3
LENGTHS = {"one prompt": [12], "8 prompts of mixed lengths": [5, 90, 17, 40, 64, 9, 120, 33]}


def random_model(folder: Path) -> Path:
    import transformers
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts(case: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(100, 5000, (length,), generator=generator).tolist() for length in LENGTHS[case]]


def ours(folder: Path, dtype: str, tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    from modellink.infer import load
    engine = load(folder, device="cpu", dtype=dtype)
    return lambda rows: [answer.token_ids for answer in engine.generate(rows, max_new_tokens=tokens, ignore_eos=True)]


def theirs(folder: Path, dtype: str, tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(rows: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                                 pad_token_id=0)
        return out[:, longest:].tolist()
    return generate


def serve(who: str, folder: Path, dtype: str, tokens: int) -> None:
    """A contender: for each case on a line of stdin one timed run, as JSON."""
    generate = {"ours": ours, "theirs": theirs}[who](folder, dtype, tokens)
    generate(prompts("one prompt"))
    print("ready", flush=True)
    for line in sys.stdin:
        rows = prompts(line.strip())
        start = time.perf_counter()
        found = generate(rows)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rate": len(rows) * tokens / seconds, "peak": peak, "tokens": found}), flush=True)


def compare(folder: Path, dtype: str, tokens: int) -> list[dict[str, Any]]:
    contenders = {who: subprocess.Popen([sys.executable, __file__, "--serve", who, str(folder), dtype, str(tokens)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) for who in ("ours", "theirs")}
    rows = []
    for process in contenders.values():
        answer(process)
    for case in LENGTHS:
        best: dict[str, dict[str, Any]] = {}
        for _ in range(ROUNDS):
            for who, process in contenders.items():
                print(case, file=process.stdin, flush=True)
                found = json.loads(answer(process))
                if who not in best or found["rate"] > best[who]["rate"]:
                    best[who] = found
        same = sum(a == b for a, b in zip(best["ours"]["tokens"], best["theirs"]["tokens"], strict=True))
        if dtype == "float32" and same < len(LENGTHS[case]):
            raise SystemExit(f"{case}: only {same} answers are those of transformers")
        limit = bandwidth() / weight_bytes(folder, dtype) if case == "one prompt" else None
        rows.append({"claim": f"greedy decode, {dtype}, {case}", "ours": best["ours"]["rate"], "peer": best["theirs"]["rate"],
                     "unit": "tokens/s", "peer_name": "transformers generate", "peak_memory": best["ours"]["peak"],
                     "peer_peak_memory": best["theirs"]["peak"], "limit": limit})
        show(rows[-1])
    for process in contenders.values():
        process.communicate()
    return rows


def show(row: dict[str, Any]) -> None:
    limit = f", limit {row['limit']:.0f}" if row["limit"] else ""
    print(f"{row['claim']}: {row['ours']:.1f} {row['unit']}, {row['peer_name']} {row['peer']:.1f}, ratio "
          f"{row['ours'] / row['peer']:.2f}{limit}; peak {row['peak_memory'] / 1e6:.0f} MB, theirs "
          f"{row['peer_peak_memory'] / 1e6:.0f} MB", flush=True)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a contender failed")
    return line


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of the weights in that dtype; files hold two bytes a weight (bfloat16)."""
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return files * getattr(torch, dtype).itemsize // 2


def bandwidth() -> float:
    """Bytes a second at which this machine reads memory: the best of ten sums over 1 GB."""
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("MODELLINK_TEST_MODEL"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=4)
    given = parser.parse_args()
    if given.serve:
        who, folder, dtype, tokens = given.serve
        return serve(who, Path(folder), dtype, int(tokens))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.model) if given.model else random_model(Path(temporary) / "model")
        rows = [row for dtype in given.dtypes for row in compare(folder, dtype, given.tokens)]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
