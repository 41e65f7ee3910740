# SPDX-License-Identifier: Apache-2.0
"""Whole runs with `device.type == "npu"` on the simulated device, on one and two ranks, equal to those on the CPU.

Every rank there fails when ModelLink or megatron-core touches torch.cuda (device.forbid_cuda).
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import beside

TASKS = beside(__file__, "tasks")
PRETRAIN, SFT = (beside(str(TASKS.CORE / f"{name}.py"), name) for name in ("test_training", "test_sft"))
INSTRUCTIONS = SFT.INSTRUCTIONS
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
ATTENTION, PACKED = "aclnnFlashAttentionScore", "aclnnFlashAttentionVarLenScore"
ALWAYS = {"aclnnRmsNorm", "aclnnRmsNormGrad", "aclnnSwiGlu", "aclnnSwiGluGrad", "aclnnRotaryPositionEmbeddingV2", "ApplyAdamW"}
WIDE = {"num_layers": 2, "hidden_size": 272, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 64,
        "ffn_hidden_size": 544, "vocab_size": 131, "max_position_embeddings": 64, "model_type_hf": "llama"}
"""A model whose matrices are wide enough for the products joined with a collective, in a type they take."""
EXPERTS = WIDE | {"num_experts": 4, "moe_router_topk": 2, "moe_intermediate_size": 40,
                  "model_type_hf": "mixtral"}
RUNS: dict[str, tuple[int, dict[str, Any], set[str]]] = {
    "one rank": (1, {}, {ATTENTION}),
    "bf16": (1, {"bf16": True}, {ATTENTION}),
    "documents apart": (1, {"reset_position_ids": True, "reset_attention_mask": True, "eod_token_id": 5}, {PACKED}),
    "experts": (1, {"load": "experts", "moe_grouped_gemm": True}, {ATTENTION, "aclnnGroupedMatmulV5"}),
    "dp2 distributed optimizer": (2, {"use_distributed_optimizer": True}, {ATTENTION}),
    "tp2": (2, TP2, {ATTENTION}),
    "tp2 mc2": (2, TP2 | {"load": "wide", "bf16": True, "use_mc2": True}, {ATTENTION, "aclnnAllGatherMatmul",
                                                                                "aclnnMatmulReduceScatter"}),
    "tp2 mc2 whole": (2, {"load": "wide", "bf16": True, "tensor_model_parallel_size": 2, "use_mc2": True},
                      {ATTENTION, "aclnnMatmulAllReduce"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {ATTENTION}),
    "ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"},
             {ATTENTION, "aclnnRingAttentionUpdateV2"}),
    "swapped activations": (1, {"swap_attention": True}, {ATTENTION})}


@pytest.fixture(scope="module")
def folders(pools, tiny, corpus, tmp_path_factory):
    """Checkpoints of the models, made on the CPU: random weights are those of a device's own generator."""
    made = {"tiny": tiny}
    for name, model in {"wide": WIDE, "experts": EXPERTS}.items():
        made[name] = tmp_path_factory.mktemp(name)
        run(pools, "test_training", 1, "cpu", PRETRAIN.OPTIONS | model | {
            "data_path": (str(corpus),), "exit_interval": 1, "save": str(made[name])})
    return {name: str(folder) for name, folder in made.items()}


def run(pools, kind: str, size: int, device: str, options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in (options | {"device": device}).items() if value is not None}
    return pools(size, device)(TASKS.train, kind=kind, options=given)[-1]


def same(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert [step[:2] for step in found["steps"]] == [step[:2] for step in expected["steps"]]
    for number in (2, 3):
        assert [step[number] for step in found["steps"]] == pytest.approx(
            [step[number] for step in expected["steps"]], rel=rel)


@pytest.mark.parametrize("name", RUNS)
def test_pretraining_is_that_on_the_cpu(pools, folders, corpus, name):
    size, more, kernels = RUNS[name]
    options = PRETRAIN.OPTIONS | {"data_path": (str(corpus),), "finetune": True, "load": "tiny"} | more
    options["load"] = folders[options["load"]]
    found, expected = (run(pools, "test_training", size, device, options) for device in ("npu", "cpu"))
    assert len(found["steps"]) == 5
    same(found, expected, 1e-2 if options.get("bf16") else 1e-5)
    assert kernels <= set(found["kernels"]) and ALWAYS - {"ApplyAdamW"} <= set(found["kernels"])
    assert "ApplyAdamW" in found["kernels"] and expected["kernels"] == []


@pytest.mark.parametrize(("size", "more"), [(1, {}), (2, TP2)], ids=["one rank", "tp2"])
def test_packed_instructions_are_learned_as_on_the_cpu(pools, tiny, tmp_path, size, more):
    samples = INSTRUCTIONS.make_samples(40, 131, longest=20)
    INSTRUCTIONS.write_set(tmp_path / "packs", [INSTRUCTIONS.pack(samples[3 * at:3 * at + 3], 64) for at in range(12)])
    options = SFT.OPTIONS | {"load": str(tiny), "data_path": (str(tmp_path / "packs"),), "seq_length": 64, "global_batch_size": 4,
                             "reset_position_ids": True} | more
    found, expected = (run(pools, "test_sft", size, device, options) for device in ("npu", "cpu"))
    assert len(found["steps"]) == 5 and PACKED in found["kernels"]
    same(found, expected, 1e-5)


@pytest.mark.parametrize(("size", "more"), [(1, {}), (2, {"use_distributed_optimizer": True})], ids=["one rank", "dp2"])
def test_a_checkpoint_goes_on_where_it_was_made_and_elsewhere(pools, tiny, corpus, tmp_path, size, more):
    options = PRETRAIN.OPTIONS | {"data_path": (str(corpus),), "hidden_dropout": 0.1} | more
    start = options | {"load": str(tiny)}
    straight = run(pools, "test_training", size, "npu", start)["steps"]
    stopped = run(pools, "test_training", size, "npu", start | {"save": str(tmp_path / "a"), "exit_interval": 2})["steps"]
    going_on = options | {"load": str(tmp_path / "a"), "save": str(tmp_path / "b")}
    resumed = run(pools, "test_training", size, "npu", going_on)["steps"]
    assert stopped + resumed == straight
    plain = options | {"hidden_dropout": 0.0, "load": str(tmp_path / "a"), "load_rng": False}  # random states are a device's own
    same(*({"steps": run(pools, "test_training", size, device, plain)["steps"]} for device in ("cpu", "npu")), 1e-5)


def test_the_state_of_the_devices_own_generator_is_kept(pools, tiny, corpus):
    options = PRETRAIN.OPTIONS | {"load": str(tiny), "data_path": (str(corpus),), "device": "npu"}
    pools(1)(TASKS.where, options=options)  # which joins, and so makes megatron-core's generators
    changed, kept = pools(1)(TASKS.random_states)[0]
    assert changed == ["cpu", "npu"]
    assert all(kept)


def test_everything_a_run_holds_is_on_the_device(pools, tiny, corpus):
    options = PRETRAIN.OPTIONS | {"load": str(tiny), "data_path": (str(corpus),), "device": "npu"}
    assert pools(1)(TASKS.where, options=options) == [{"npu"}]


@pytest.mark.parametrize("tp", [1, 2])
def test_answers_are_those_of_the_cpu(pools, tiny, tp):
    found, expected = (pools(tp, device)(TASKS.generate, folder=str(tiny), device=device, tp=tp)[0] for device in ("npu", "cpu"))
    assert found["devices"] == {"npu"}
    for what in ("tokens", "drawn"):
        assert found[what] == expected[what]
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)
    for (ours, ours_best), (theirs, theirs_best) in zip(found["likelihoods"], expected["likelihoods"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) and ours_best == theirs_best
