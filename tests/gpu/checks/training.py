# SPDX-License-Identifier: Apache-2.0
"""Training a tiny Llama: losses against the CPU's, precisions, memory options, adapters, experts, resuming.

Only the resumed run, which must be bit-equal, uses deterministic operations (--use-deter-comp), so that one
without a deterministic form on a device costs one row.
"""

from __future__ import annotations

from typing import Any

from models import TINY, write_documents, write_llama
from registry import Machine, Skipped, require, row

Losses = list[tuple[float, float]]
OPTIONS: dict[str, Any] = {
    "seq_length": 64, "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 8, "lr": 3e-3,
    "lr_decay_style": "constant", "split": "100,0,0", "eval_iters": 0, "log_interval": 100, "seed": 7}
ALL_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 1024.0},
    "LoRA": {"lora_target_modules": ALL_LINEARS, "lora_r": 16, "lora_alpha": 32, "lr": 2e-2},
    "plain forms": {f"use_{name}": False for name in (
        "flash_attn", "fused_rmsnorm", "fused_swiglu", "fused_rotary_pos_emb")},
    "recomputed layers": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "recomputed activation functions": {"recompute_activation_function": True},
    "swapped activations": {"swap_attention": True}}
"""Name -> options in addition to OPTIONS."""
EXPERTS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 120, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 24,
    "ffn_hidden_size": 336, "vocab_size": TINY["vocab_size"], "max_position_embeddings": 256,
    "model_type_hf": "none", "init_method_std": 0.1, "num_experts": 4, "moe_router_topk": 2,
    "moe_intermediate_size": 48, "bf16": True}


def train(options: dict[str, Any]) -> Losses:
    """On a rank: (loss, gradient norm) of every iteration of a pretraining run."""
    from modellink.core import fit

    return [(step.loss, step.grad_norm or 0.0) for step in fit("pretrain", options)]


def inputs(machine: Machine) -> dict[str, Any]:
    """Return the options that name the model and the data, both written at the first call."""

    def write() -> dict[str, Any]:
        model, data = machine.folder / "llama", machine.folder / "text_document"
        machine.on_device(write_llama, folder=str(model), sizes=TINY, dtype="float32")
        machine.on_device(write_documents, prefix=str(data), vocabulary=TINY["vocab_size"], documents=60,
                          length=120)
        return {"load": str(model), "data_path": (str(data),)}

    found: dict[str, Any] = machine.once("inputs", write)
    return found


def run(machine: Machine, options: dict[str, Any], kind: str | None = None) -> Losses:
    """Train on the device, or on another kind."""
    kind = kind or machine.kind
    given = OPTIONS | inputs(machine) | options | {"device": kind}
    wanted = {name: value for name, value in given.items() if value is not None}
    found: Losses = (machine.on_cpu if kind == "cpu" else machine.on_device)(train, options=wanted)
    return found


def losses(machine: Machine, name: str, kind: str | None = None) -> Losses:
    """Return the losses of a run of RUNS, trained at the first call."""
    kind = kind or machine.kind
    found: Losses = machine.once((name, kind), lambda: run(machine, RUNS[name], kind))
    return found


def compare(found: Losses, expected: Losses, loss: float, norm: float) -> str:
    """Require that losses and gradient norms differ by at most `loss` and `norm` of the expected ones."""
    pairs = list(zip(found, expected, strict=True))
    of_loss, of_norm = (max(abs(one[at] - two[at]) / abs(two[at]) for one, two in pairs) for at in (0, 1))
    if found == expected:
        return f"{len(found)} iterations, bit-equal"
    require(of_loss <= loss and of_norm <= norm,
            f"losses differ by {of_loss:.1e} (allowed {loss:.0e}), gradient norms by {of_norm:.1e} "
            f"(allowed {norm:.0e})")
    return f"{len(found)} iterations, losses within {of_loss:.0e}, gradient norms within {of_norm:.0e}"


def against_the_cpu(machine: Machine, name: str) -> str:
    if machine.kind == "cpu":
        raise Skipped("the device is the CPU")
    return compare(losses(machine, name), losses(machine, name, "cpu"), loss=1e-4, norm=1e-3)


def learned(machine: Machine, name: str, least: float) -> str:
    first, last = (losses(machine, name)[at][0] for at in (0, -1))
    require(first - last > least, f"the loss went from {first:.3f} to {last:.3f}")
    return f"from {first:.3f} to {last:.3f} in {OPTIONS['train_iters']} iterations"


@row("training: the loss falls")
def falls(machine: Machine) -> str:
    return learned(machine, "fp32", 0.5)


@row("training: losses equal the CPU's")
def equal(machine: Machine) -> str:
    return against_the_cpu(machine, "fp32")


@row("training: the plain forms give the same losses")
def plain_forms(machine: Machine) -> str:
    return compare(losses(machine, "plain forms"), losses(machine, "fp32"), loss=1e-5, norm=1e-4)


@row("training: bf16 follows fp32")
def bf16(machine: Machine) -> str:
    return compare(losses(machine, "bf16"), losses(machine, "fp32"), loss=2e-2, norm=1e-1)


@row("training: fp16 follows fp32")
def fp16(machine: Machine) -> str:
    return compare(losses(machine, "fp16"), losses(machine, "fp32"), loss=2e-2, norm=1e-1)


def memory(machine: Machine, name: str) -> str:
    return compare(losses(machine, name), losses(machine, "fp32"), loss=1e-5, norm=1e-4)


@row("training: recomputed layers change no loss")
def recomputed(machine: Machine) -> str:
    return memory(machine, "recomputed layers")


@row("training: recomputed activation functions change no loss")
def recomputed_functions(machine: Machine) -> str:
    return memory(machine, "recomputed activation functions")


@row("training: swapped activations change no loss")
def swapped(machine: Machine) -> str:
    return memory(machine, "swapped activations")


@row("training: LoRA learns")
def lora(machine: Machine) -> str:
    return learned(machine, "LoRA", 0.2)


@row("training: LoRA's losses equal the CPU's")
def lora_equal(machine: Machine) -> str:
    return against_the_cpu(machine, "LoRA")


@row("training: experts in one grouped product follow single ones")
def experts(machine: Machine) -> str:
    folder = str(machine.folder / "experts")
    run(machine, EXPERTS | {"load": None, "save": folder, "train_iters": 1})
    again = {"load": folder, "finetune": True, "bf16": True, "train_iters": 4}
    single = run(machine, again)
    grouped = run(machine, again | {"moe_grouped_gemm": True})
    return compare(grouped, single, loss=1e-2, norm=1e-1)


@row("training: a stopped run resumes, bit-equal")
def resumes(machine: Machine) -> str:
    from modellink.core.digests import compare as divergence_of

    straight, stopped, resumed = (machine.folder / name for name in ("straight", "stopped", "resumed"))
    options = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 4, "use_deter_comp": True}
    digests = [folder / "digests" for folder in (straight, resumed)]
    expected = run(machine, options | {"save": str(straight), "log_digest": str(digests[0])})
    first = run(machine, options | {"save": str(stopped), "exit_interval": 2})
    options |= {"load": str(stopped), "save": str(resumed), "log_digest": str(digests[1])}
    second = run(machine, options)
    iterations, _, divergence = divergence_of(*digests)
    require(divergence is None, f"the resumed run diverges at {divergence}")
    require(first + second == expected, f"losses, gradient norms {first + second}, without a stop {expected}")
    return f"stopped after 2 of 4 iterations; gradients and parameters of the other {iterations} are equal"
