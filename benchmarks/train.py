# SPDX-License-Identifier: Apache-2.0
"""modellink-train pretrain and a plain transformers loop: tokens per second in fp32 and bf16, and memory by memory setting.

A model of SmolLM2-135M's shape with random weights, samples of 512 random tokens, one CPU process with all threads.
The peer is transformers with torch's fused AdamW and a clipped gradient norm, in bf16 with bf16 weights and optimizer
states, as is common; ours keeps fp32 main weights and gradients there. Each contender is a separate process, and they
take turns; the best round counts, and the first step is a warm-up. `limit` is this machine's rate of plain matrix
products in the same dtype, in tokens per second of this model.

    python benchmarks/train.py [--layers 30] [--steps 3] [--rounds 2] [--batch 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEQ, VOCAB = 512, 49152
SHAPE = {"hidden_size": 576, "num_attention_heads": 9, "ffn_hidden_size": 1536, "vocab_size": VOCAB, "num_query_groups": 3,
         "max_position_embeddings": 2048}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
MEMORY = {"activation function": {"recompute_activation_function": True}, "selective": {"recompute_granularity": "selective"},
          "full, half of the layers": BLOCK, "full": BLOCK}
KEPT = {"swap-attention": ("fp32", {"swap_attention": True}), "reuse-fp32-param": ("bf16", {"reuse_fp32_param": True})}
"""Dtype and setting; on a CPU, where host and device are one memory, what is swapped is moved and not saved."""


def flops_per_token(layers: int) -> float:
    """Forward and backward: matrix products, and causal attention at half of its square."""
    hidden, ffn, kv = SHAPE["hidden_size"], SHAPE["ffn_hidden_size"], SHAPE["hidden_size"] * 3 // 9
    return 6.0 * (VOCAB * hidden + layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + SEQ * hidden))


def ours(work: Path, layers: int, steps: int, batch: int, dtype: str, recompute: str) -> float:
    """Tokens a second."""
    from modellink.core import processes
    from modellink.core.prepare.prepare import prepare
    from modellink.kernels.options import Layer

    count = {"full": layers, "full, half of the layers": layers // 2}.get(recompute)
    run = prepare("pretrain", [Layer("benchmark", {
        **SHAPE, "num_layers": layers, "position_embedding_type": "rope", "normalization": "RMSNorm", "gated_linear_unit": True,
        "activation_func": "silu", "untie_embeddings_and_output_weights": False, "bf16": dtype == "bf16",
        "data_path": (str(work / "text_document"),), "seq_length": SEQ, "micro_batch_size": batch, "train_iters": steps + 1,
        "lr": 1e-4, "split": "1", "eval_iters": 0, "device": "cpu", **MEMORY.get(recompute, {}),
        **KEPT.get(recompute, ("", {}))[1],
        **({"recompute_num_layers": count} if count else {})})], 1)
    processes.join(run.device, run.layout, run.optimizer.seed)

    from modellink.core.api import train
    seconds = [step.seconds for step in train(run)]
    return batch * SEQ * steps / sum(seconds[1:])


def theirs(work: Path, layers: int, steps: int, batch: int, dtype: str, _: str) -> float:
    import torch
    import transformers
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=VOCAB, max_position_embeddings=2048, tie_word_embeddings=True)).to(kind)
    optimizer, start = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), 0.0
    ids = torch.from_numpy(np.fromfile(work / "text_document.bin", dtype=np.uint16).astype(np.int64))
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        rows = ids[step * batch * SEQ:(step + 1) * batch * SEQ].view(batch, SEQ)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return batch * SEQ * steps / (time.perf_counter() - start)


def matmul_rate(_work: Path, layers: int, _steps: int, batch: int, dtype: str, _: str) -> float:
    """The same as tokens of the model a second, were all of it one large product, by the faster of torch's two libraries."""
    import torch

    from modellink.kernels import ops
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(batch * SEQ, 1536).to(kind), torch.randn(1536, 1536).to(kind)
    best = float("inf")
    for repeat in range(16):
        start = time.perf_counter()
        ops.linear(a, b) if repeat % 2 else a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * a.size(0) * 1536 * 1536 / best / flops_per_token(layers)


CONTENDERS = {"ours": ours, "peer": theirs, "matmul": matmul_rate}


def measure(words: Sequence[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--one", *words], text=True, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def lowest(words: Sequence[str], rounds: int) -> dict[str, float]:
    """The round of least memory: what the C library holds on to differs from run to run by a twentieth."""
    return min((measure(words) for _ in range(rounds)), key=lambda found: found["peak"])


def write_text(work: Path, tokens: int) -> None:
    from modellink.data_prep.indexed import IndexedWriter
    ids = np.random.default_rng(0).integers(0, VOCAB, tokens, dtype=np.uint16)
    with IndexedWriter(work / "text_document", np.dtype("<u2")) as writer:
        for first in range(0, tokens, 4 * SEQ):
            writer.add_document(ids[first:first + 4 * SEQ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 30), ("steps", 3), ("rounds", 2), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=7)
    given = parser.parse_args()
    if given.one:
        who, work, layers, steps, batch, dtype, recompute = given.one
        rate = CONTENDERS[who](Path(work), int(layers), int(steps), int(batch), dtype, recompute)
        print(json.dumps({"rate": rate, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        write_text(Path(temporary), (given.steps + 2) * given.batch * SEQ)
        sizes = [temporary, str(given.layers), str(given.steps), str(given.batch)]
        for dtype in ("fp32", "bf16"):
            best: dict[str, dict[str, float]] = {}
            for _ in range(given.rounds):
                for who in CONTENDERS:
                    found = measure([who, *sizes, dtype, "none"])
                    if who not in best or found["rate"] > best[who]["rate"]:
                        best[who] = found
            mine, peer, limit = (best[who] for who in CONTENDERS)
            rows.append({"claim": f"training, {dtype}", "ours": mine["rate"], "peer": peer["rate"], "unit": "tokens/s",
                         "peer_name": "transformers", "peak_memory": mine["peak"], "peer_peak_memory": peer["peak"],
                         "limit": limit["rate"]})
            print(f"{dtype}: {mine['rate']:.0f} tokens/s, transformers {peer['rate']:.0f}, "
                  f"ratio {mine['rate'] / peer['rate']:.2f}; of the matmul rate {mine['rate'] / limit['rate']:.0%} and "
                  f"{peer['rate'] / limit['rate']:.0%}; "
                  f"peak {mine['peak'] / 1e6:.0f} MB, theirs {peer['peak'] / 1e6:.0f} MB", flush=True)
        size = ["ours", temporary, str(given.layers), "1", str(given.batch)]
        plain = {dtype: lowest([*size, dtype, "none"], given.rounds) for dtype in ("fp32", "bf16")}
        for name in (*MEMORY, *KEPT):
            dtype = KEPT.get(name, ("fp32", {}))[0]
            found, without = lowest([*size, dtype, name], given.rounds), plain[dtype]
            claim = f"recomputed: {name}" if name in MEMORY else name
            rows.append({"claim": f"memory, {dtype}, {claim}", "ours": found["peak"] / 1e6, "peer": without["peak"] / 1e6,
                         "unit": "MB", "peer_name": "without", "peak_memory": found["peak"], "limit": None})
            print(f"{dtype}, {claim}: {found['peak'] / 1e6:.0f} MB of {without['peak'] / 1e6:.0f} MB; one step at "
                  f"{found['rate']:.0f} tokens/s, without {without['rate']:.0f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
