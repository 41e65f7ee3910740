# SPDX-License-Identifier: Apache-2.0
"""`modellink-train determinism`: runs a tiny model twice in many configurations and shows which repeat bit for bit.

    modellink-train determinism [--device npu] [--no-use-deter-comp]

Each run has its own processes, --use-deter-comp, random documents, and dropout if the configuration supports it. All
digests (train/digest.py) and the last checkpoint are compared byte by byte. Runs with another number of ranks or on
another kind of device are not compared: they sum in another order.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modellink.core import api, launch
from modellink.core.digests import compare
from modellink.core.prepare.prepare import prepare
from modellink.kernels.command import command
from modellink.kernels.errors import InternalError, run_command
from modellink.kernels.general_options import DryRun, print_plan
from modellink.kernels.options import Layer, option, resolve
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.tables import print_table

VOCABULARY = 97
MODEL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2, "ffn_hidden_size": 112,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "position_embedding_type": "rope", "normalization": "RMSNorm",
    "gated_linear_unit": True, "activation_func": "silu", "model_type_hf": "none"}
RUN: dict[str, Any] = {
    "seq_length": 32, "global_batch_size": 4, "train_iters": 4, "lr": 5e-3, "split": "100,0,0", "eval_iters": 0,
    "log_interval": 9}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_intermediate_size": 28, "moe_aux_loss_coeff": 0.01}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
EP2 = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "dense, dropout": (1, DROPOUT), "dense, dropout, bf16": (1, DROPOUT | {"bf16": True}),
    "dense, dropout, recomputed": (1, DROPOUT | FULL),
    "dense, dropout, activations recomputed and swapped": (1, DROPOUT | {
        "recompute_activation_function": True, "swap_attention": True}),
    "experts, dropout": (1, DROPOUT | EXPERTS), "experts, dropout, grouped, recomputed": (
        1, DROPOUT | EXPERTS | FULL | {"moe_grouped_gemm": True}),
    "data parallel, distributed optimizer, dropout": (2, DROPOUT | DISTRIBUTED),
    "tensor parallel, dropout": (2, DROPOUT | TP2), "interleaved stages, dropout, recomputed": (2, DROPOUT | VPP | FULL),
    "expert parallel, dropout": (2, DROPOUT | EXPERTS | EP2),
    "context parallel, ulysses, dropout, recomputed": (2, DROPOUT | FULL | {"context_parallel_size": 2}),
    "context parallel, ring, dropout of the residual": (2, {"hidden_dropout": 0.1, "context_parallel_size": 2,
                                                            "context_parallel_algo": "megatron_cp_algo"})}
"""Name -> ranks, options."""
OF_THE_SAVE = (".metadata", "modellink.complete")
"""Files of a checkpoint that depend on where and when it was saved."""


def run_all(folder: str, names: Sequence[str], more: Mapping[str, Any]) -> None:
    """Run these configurations on a rank one by one; each leaves its digests and last checkpoint in FOLDER/NAME."""
    import torch.distributed as dist

    from modellink.core import processes
    from modellink.kernels.device import find
    processes.join(find(more.get("device", "auto"), launch.rank()), ParallelLayout(dp=launch.world_size()), seed=1)
    data = Path(folder) / "text_document"
    if launch.rank() == 0:
        data.parent.mkdir(parents=True, exist_ok=True)
        write_documents(str(data))
    dist.barrier()
    for name in names:
        place = Path(folder) / name
        options = MODEL | RUN | CONFIGURATIONS[name][1] | {
            "data_path": (str(data),), "save": str(place / "save"), "log_digest": str(place / "digests"),
            "micro_batch_size": 1, "nproc_per_node": CONFIGURATIONS[name][0], **more}
        run = prepare("pretrain", [Layer("modellink-train determinism", options)], launch.world_size(), launch.rank())
        processes.join(run.device, run.layout, run.optimizer.seed)
        api.train(run)


def write_documents(prefix: str) -> None:
    """Write a data set in which every token depends on the previous one."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator, builder = np.random.default_rng(3), IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for _ in range(20):
        steps = generator.integers(0, 3, size=generator.integers(20, 90))
        builder.add_item(torch.from_numpy((generator.integers(0, VOCABULARY) + 5 * steps.cumsum()) % VOCABULARY))
        builder.end_document()
    builder.finalize(prefix + ".idx")


def rows(first: Path, second: Path, names: Sequence[str]) -> list[tuple[str, str, str, str, str]]:
    """(configuration, ranks, digests equal, checkpoint equal, first difference) of two folders from `run_all`."""
    made = []
    for name in names:
        _, ranks, difference = compare(first / name / "digests", second / name / "digests")
        saved = [{path.relative_to(folder / name): path.read_bytes() for path in sorted((folder / name / "save").glob("iter_*/*"))
                  if path.name not in OF_THE_SAVE} for folder in (first, second)]
        differ = [path.name for path in saved[0].keys() | saved[1].keys() if saved[0].get(path) != saved[1].get(path)]
        where = str(difference) if difference else ", ".join(sorted(differ)[:3])
        digests_equal = "no" if difference else "yes"
        checkpoint_equal = "no" if differ or not saved[0] else "yes"
        made.append((name, str(ranks), digests_equal, checkpoint_equal, where))
    return made


@dataclass(frozen=True)
class DeterminismOptions:
    """Options of `modellink-train determinism`."""

    device: Literal["auto", "cpu", "cuda", "npu"] = option("auto", "Device to run on.")
    use_deter_comp: bool = option(True, "Use deterministic operations.")


@command(DeterminismOptions, name="determinism", example="modellink-train determinism --device cpu")
def determinism(given: Layer, dry_run: DryRun | None) -> None:
    """Run a small model twice in many configurations, and print which runs repeat bit for bit. Exit status 1 if one does not."""
    options = resolve([DeterminismOptions], given)[DeterminismOptions]
    use_deter_comp = options.use_deter_comp
    from modellink.kernels.device import find  # imports torch
    found = find(options.device)
    there = found.module.device_count() if found.module else max(count for count, _ in CONFIGURATIONS.values())
    if dry_run:
        there = dry_run.devices or there
        print_plan((name, f"{ranks} ranks" if ranks <= there else f"not run: {ranks} ranks")
                   for name, (ranks, _) in CONFIGURATIONS.items())
        return
    done: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        for attempt in ("first", "second"):
            for count in sorted({ranks for ranks, _ in CONFIGURATIONS.values() if ranks <= there}):
                names = [name for name, (ranks, _) in CONFIGURATIONS.items() if ranks == count]
                settings = {"device": found.kind, "use_deter_comp": use_deter_comp}
                argument = json.dumps([f"{work}/{attempt}/{count}", names, settings])
                if launch.spawn(count, "modellink.core.repeatability", [argument]):
                    raise InternalError(f"a run on {count} ranks failed", where=", ".join(names))
                done += names if attempt == "first" else []
        table = [row for count in (1, 2) for row in rows(Path(work) / "first" / str(count), Path(work) / "second" / str(count), [
            name for name in done if CONFIGURATIONS[name][0] == count])]
    print_table(("configuration", "ranks", "digests", "checkpoint", "first difference"), table)
    for name, (ranks, _) in CONFIGURATIONS.items():
        if name not in done:
            print(f"not run: {name}: it needs {ranks} devices, {there} are available")
    if any("no" in row for row in table):
        sys.exit(1)


def _main() -> None:
    """Entry point of a rank."""
    with contextlib.redirect_stdout(None):  # the logs of the runs are not shown
        run_all(*json.loads(sys.argv[1]))


if __name__ == "__main__":
    run_command(_main)
