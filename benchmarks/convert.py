# SPDX-License-Identifier: Apache-2.0
"""modellink-convert against `cp -r` and against load and save of transformers: MB per second of the same bytes, and peak memory.

A random Llama in bf16 goes from its Hugging Face folder to TP 2 x PP 2 and back. Peers in the same run: `cp -r` of the
folder, which is the limit of the disk, and transformers, which loads and saves the model. All of them fsync their output;
the source is in the page cache. Each run is a separate process, the contenders take turns in varying order, and the best
round of each counts: a virtual machine reclaims freed memory and maps it again on first touch, which costs more than the
work. Memory is the sampled RssAnon + RssShmem beyond that of the imports (the system can drop mapped file pages); VmHWM
is printed too.

    python benchmarks/convert.py [--billions 1.3] [--sizes 0.5 5] [--rounds 6] [--folder DIR] [--json FILE]

`--sizes` also measures the memory of other model sizes, which must be flat. `--folder` needs disk space for three models.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPES = {0.5: (1536, 4096, 16), 1.3: (2048, 5504, 24), 5.0: (4096, 11008, 24)}  # billions -> hidden, FFN, layers


def config(billions: float) -> dict[str, Any]:
    hidden, ffn, layers = SHAPES[billions]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128,
            "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "hidden_act": "silu"}


def make(folder: Path, billions: float) -> int:
    """Write the folder, shard by shard; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    values = config(billions)
    hidden, ffn, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate_proj": (ffn, hidden),
             "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    layer |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    parts = [{"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}]
    parts += [{f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
              for number in range(values["num_hidden_layers"])]
    folder.mkdir(parents=True)
    places, total = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(values))
    return total


def memory() -> tuple[int, int]:
    """(RssAnon + RssShmem, VmHWM) of this process, in bytes."""
    with open("/proc/self/status") as status:
        found = {line.partition(":")[0]: line.split()[1] for line in status if line.startswith(("Rss", "VmHWM"))}
    return (int(found["RssAnon"]) + int(found["RssShmem"])) << 10, int(found["VmHWM"]) << 10


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def measure(what: str, source: Path, target: Path) -> None:
    """Print seconds and peak memory of one run as JSON. Runs in a process of its own."""
    import torch  # noqa: F401  its import is not part of the measurement

    if what == "transformers":
        import transformers
    elif what != "cp":
        from modellink.ckpt_convert import cli

        cli.give_memory_back()
    before, peak, done = memory()[0], 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory()[0])
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    if what == "cp":
        subprocess.run(["cp", "-r", source, target], check=True)
        flush(target)
    elif what == "transformers":
        transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16").save_pretrained(target)
        flush(target)
    else:
        from modellink.ckpt_convert import convert
        from modellink.kernels.parallel import ParallelLayout

        there = {"to": "megatron-core", "layout": ParallelLayout(tp=2, pp=2)}
        convert(source, target, **(there if what == "there" else {"to": "hf"}))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    done.set()
    print(json.dumps({"seconds": seconds, "anonymous": max(0, peak - before), "highest": memory()[1]}))


def run(what: str, source: Path, target: Path) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    done = subprocess.run([sys.executable, __file__, "--measure", what, str(source), str(target)], check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(folder: Path, billions: float, rounds: int, peers: bool) -> list[dict[str, Any]]:
    size = make(folder / "hf", billions)
    turns = [("there", "hf", "mc"), ("back", "mc", "back")] + [(peer, "hf", "back") for peer in ("cp", "transformers") if peers]
    tries: dict[str, list[dict[str, float]]] = {what: [] for what, _, _ in turns}
    run("there", folder / "hf", folder / "mc")  # for `back` to read
    for number in range(rounds):
        for what, source, target in random.Random(number).sample(turns, len(turns)):
            tries[what].append(run(what, folder / source, folder / target))
    results = {what: min(found, key=lambda entry: entry["seconds"]) for what, found in tries.items()}
    for name in ("hf", "mc", "back"):
        shutil.rmtree(folder / name)
    print(f"{billions}B, {size / 1e9:.2f} GB in bf16")
    for what, found in results.items():
        print(f"  {what:13} {found['seconds']:6.1f} s  {size / found['seconds'] / 1e6:6.0f} MB/s  "
              f"peak {found['anonymous'] / 1e6:6.0f} MB above the imports, VmHWM {found['highest'] / 1e6:6.0f} MB")
    rates = {what: size / found["seconds"] / 1e6 for what, found in results.items()}
    return [{"claim": f"convert {billions}B {way}, against {name}", "ours": rates[what], "peer": rates[peer], "unit": "MB/s",
             "peer_name": name, "peak_memory": results[what]["anonymous"], "limit": rates["cp"]}
            for what, way in (("there", "to TP 2 x PP 2"), ("back", "to Hugging Face"))
            for peer, name in (("cp", "cp -r"), ("transformers", "load and save")) if peers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=1.3, choices=SHAPES)
    parser.add_argument("--sizes", type=float, nargs="*", default=[], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="working folder; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, source, target = args.measure
        return measure(what, Path(source), Path(target))
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        rows = compare(Path(scratch), args.billions, args.rounds, peers=True)
        for billions in args.sizes:
            compare(Path(scratch), billions, 1, peers=False)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
