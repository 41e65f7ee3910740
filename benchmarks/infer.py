# SPDX-License-Identifier: Apache-2.0
"""modellink-infer next to transformers' generate: time to the first token, decode speed, and sixteen requests
at once.

Greedy decoding with the same weights and dtype, in one run. Cases: the first token of a prompt of 512 tokens;
one prompt (batch 1); sixteen prompts of mixed lengths, which transformers completes one after the other, and
as one batch padded on the left. Ours runs with the compiled step, without it (eager), and with int8 weights.
Each of these runs in a process of its own, so that the peak memory is its own. The server is measured with
one HTTP connection per prompt, for full responses (server) and for streams that are read token by token
(streams), and compared with calls of the same engine (library). These three share a process: the same weights
in another process are up to a tenth faster or slower here. The contenders take turns over several rounds and
the best round counts, for these three the median. With --text, the perplexity of its first tokens is printed
for the original and int8 weights. The limit for one prompt is the measured read bandwidth of the memory
divided by the bytes of the weights. In fp32, the tokens of every prompt must equal those of transformers for
that prompt.

    python benchmarks/infer.py [--model FOLDER] [--dtypes float32 bfloat16] [--tokens 48] [--rounds 3] [--text
    FILE] [--json FILE]

`--model` (or MODELLINK_TEST_MODEL) is a Hugging Face folder. Default: a random model of the size of
SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from modellink.infer.engine import Engine

LENGTHS = {"first token of 512": [512], "one prompt": [12],
           "16 prompts": [5, 90, 17, 40, 64, 9, 120, 33, 51, 8, 77, 25, 13, 100, 60, 29]}
PEERS, SERVED = ("padded", "one by one"), ("library", "server", "streams")
CONTENDERS = ("compiled", "eager", "int8", *SERVED, *PEERS)
PROCESSES = {who: "served" if who in SERVED else who for who in CONTENDERS}
WINDOW = 512  # tokens of a text per window


def random_model(folder: Path) -> Path:
    import transformers
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def prompts(case: str) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(100, 5000, (length,), generator=generator).tolist() for length in LENGTHS[case]]


Contender = Callable[[list[list[int]], int], list[list[int]]]
"""Generates a number of tokens for each prompt and returns them."""


def ours(folder: Path, dtype: str, **options: bool) -> Contender:
    from modellink.infer import load
    return called(load(folder, device="cpu", dtype=dtype, **options))


def called(engine: Engine) -> Contender:
    def generate(rows: list[list[int]], tokens: int) -> list[list[int]]:
        engine.forget()  # else the prefixes of an earlier round would be reused
        return [completion.token_ids for completion in engine.generate(rows, max_new_tokens=tokens,
                                                                       ignore_eos=True)]
    return generate


def served(folder: Path, dtype: str) -> dict[str, Contender]:
    import asyncio
    import threading

    import uvicorn

    from modellink.core.launch import free_port
    from modellink.infer import load
    engine = load(folder, device="cpu", dtype=dtype, native=True)
    from modellink.infer.server.app import make_app  # imports megatron, after its device is known
    from modellink.infer.server.service import Service
    service = Service(engine, max_waiting=64)
    app = make_app(service, name="model", api_key=None, max_body=1 << 20)
    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)

    runner = asyncio.Runner()

    async def one(body: dict[str, Any]) -> int:
        """Send a request and return the number of generated tokens; a client library would need more CPU time
        than the server."""
        content = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                     b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(content),
                                                                                          content))
        response = await reader.read()
        writer.close()
        return int(re.findall(rb'"completion_tokens": ?([0-9]+)', response)[-1])

    async def send_all(more: dict[str, Any], rows: list[list[int]], tokens: int) -> None:
        body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        assert await asyncio.gather(*(one({**body, "prompt": row}) for row in rows)) == [tokens] * len(rows)

    def generate(more: dict[str, Any], rows: list[list[int]], tokens: int) -> list[list[int]]:
        engine.forget()
        service.batch = engine.batch()
        runner.run(send_all(more, rows, tokens))
        return []
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"library": called(engine), "server": partial(generate, {}), "streams": partial(generate, stream)}


def theirs(folder: Path, dtype: str, *, padded: bool) -> Contender:
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    # no end token; `min_new_tokens` would mask it and so change the tokens
    model.generation_config.eos_token_id = None

    def generate(rows: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
                                 pad_token_id=0)
        return out[:, longest:].tolist()
    return generate if padded else lambda rows, tokens: [found for row in rows
                                                         for found in generate([row], tokens)]


def make(process: str, folder: Path, dtype: str) -> dict[str, Contender]:
    """Return the contenders of a process."""
    if process == "served":
        return served(folder, dtype)
    if process in PEERS:
        return {process: theirs(folder, dtype, padded=process == "padded")}
    return {process: ours(folder, dtype, native=process != "eager", int8=process == "int8")}


def serve(process: str, folder: Path, dtype: str, tokens: int) -> None:
    """Run as a process: read a contender and a case per line of stdin, and print a timed run as JSON."""
    contenders = make(process, folder, dtype)
    for generate in contenders.values():
        generate(prompts("one prompt"), 4)
    print("ready", flush=True)
    for line in sys.stdin:
        who, case = json.loads(line)
        generate = contenders[who]
        rows, count = prompts(case), 1 if case.startswith("first") else tokens
        start = time.perf_counter()
        found = generate(rows, count)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"rate": len(rows) * count / seconds, "peak": peak, "tokens": found}), flush=True)


def compare(folder: Path, dtype: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    processes = {name: subprocess.Popen([sys.executable, __file__, "--serve", name, str(folder), dtype,
                                         str(tokens)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                 for name in set(PROCESSES.values())}
    rows = []
    for process in processes.values():
        read_line(process)
    for case in LENGTHS:
        best: dict[str, dict[str, Any]] = {}
        rates: dict[str, list[float]] = {who: [] for who in CONTENDERS}
        for _ in range(rounds):
            for who in CONTENDERS:
                if who == "padded" and len(LENGTHS[case]) == 1:
                    continue  # there is nothing to pad
                process = processes[PROCESSES[who]]
                print(json.dumps([who, case]), file=process.stdin, flush=True)
                found = json.loads(read_line(process))
                if who not in best or found["rate"] > best[who]["rate"]:
                    best[who] = found
                rates[who].append(found["rate"])
        for who in SERVED:  # they differ by less than one round from the next
            best[who]["rate"] = statistics.median(rates[who])
        if dtype == "float32":
            check(case, best)
        limit = bandwidth() / weight_bytes(folder, dtype) if case == "one prompt" else None
        for who in (who for who in CONTENDERS if who not in (*PEERS, "library")):
            for peer in (peer for peer in (("library",) if who in SERVED else PEERS) if peer in best):
                rows.append({"claim": f"{case}, {dtype}, {who}", "ours": best[who]["rate"],
                             "peer": best[peer]["rate"], "unit": "tokens/s",
                             "peer_name": "library" if who in SERVED else f"transformers {peer}",
                             "peak_memory": best[who]["peak"], "peer_peak_memory": best[peer]["peak"],
                             "limit": limit if who in ("compiled", "eager") else None})
                show(rows[-1])
    for process in processes.values():
        process.communicate()
    return rows


def check(case: str, found: dict[str, dict[str, Any]]) -> None:
    """Check that all tokens except those of int8 weights equal those of transformers for single prompts."""
    for who in ("compiled", "eager"):
        same = sum(a == b for a, b in zip(found[who]["tokens"], found["one by one"]["tokens"], strict=True))
        if same < len(LENGTHS[case]):
            raise SystemExit(f"{case}, {who}: only {same} of {len(LENGTHS[case])} completions equal those of "
                             "transformers")


def show(row: dict[str, Any]) -> None:
    limit = f", limit {row['limit']:.0f}" if row["limit"] else ""
    print(f"{row['claim']}: {row['ours']:.1f} {row['unit']}, {row['peer_name']} {row['peer']:.1f}, ratio "
          f"{row['ours'] / row['peer']:.2f}{limit}; peak {row['peak_memory'] / 1e6:.0f} MB, theirs "
          f"{row['peer_peak_memory'] / 1e6:.0f} MB", flush=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a contender failed")
    return line


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of the weights in that dtype; the files hold two bytes per weight (bfloat16)."""
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return files * getattr(torch, dtype).itemsize // 2


def bandwidth() -> float:
    """Return the memory read bandwidth of this machine in bytes per second: the best of ten sums over 1 GB.
    """
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def perplexities(folder: Path, dtype: str, text: Path) -> str:
    """Return a line with the perplexity of a text in separate windows of 512 tokens."""
    from tokenizers import Tokenizer

    from modellink.infer import load
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    windows = [ids[start:start + WINDOW] for start in range(0, min(len(ids), 40 * WINDOW), WINDOW)]
    found = []
    for int8 in (False, True):
        engine = load(folder, device="cpu", dtype=dtype, int8=int8)
        sums = [total for total, _ in engine.loglikelihood([(window[:1], window[1:]) for window in windows
                                                            if len(window) > 1])]
        found.append(math.exp(-sum(sums) / sum(len(window) - 1 for window in windows)))
    return (f"perplexity of {sum(map(len, windows)):,} tokens of {text.name}, {dtype}: {found[0]:.3f}, with "
            f"int8 weights {found[1]:.3f} ({100 * (found[1] / found[0] - 1):+.2f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=os.environ.get("MODELLINK_TEST_MODEL"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path,
                        help="UTF-8 text for the perplexity; needs --model with a tokenizer.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=4)
    given = parser.parse_args()
    if given.serve:
        who, folder, dtype, tokens = given.serve
        return serve(who, Path(folder), dtype, int(tokens))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.model) if given.model else random_model(Path(temporary) / "model")
        rows = [row for dtype in given.dtypes for row in compare(folder, dtype, given.tokens, given.rounds)]
        if given.text:  # last: a child process inherits the peak memory of its parent
            print("\n".join(perplexities(folder, dtype, given.text) for dtype in given.dtypes), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
