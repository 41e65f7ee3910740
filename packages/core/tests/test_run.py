# SPDX-License-Identifier: Apache-2.0
"""A run is refused, before any process starts, for everything a user can get wrong; the message says what would work."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from modellink.core.prepare.prepare import prepare
from modellink.core.presets import load_preset
from modellink.core.run import CONFIGS
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer


@pytest.fixture
def options(tiny, corpus):
    return {"load": str(tiny), "data_path": (str(corpus),), "seq_length": 24, "lr": 1e-3, "train_iters": 2, "device": "cpu"}


def test_a_good_run_is_settled(options):
    run = prepare("pretrain", [Layer("a.yaml", {"lr": 1.0, "tensor_model_parallel_size": 2}), Layer("command line", options)])
    assert (run.optimizer.lr, run.layout.tp, run.layout.world_size, run.spec.num_query_groups) == (1e-3, 2, 2, 2)
    assert prepare("pretrain", [Layer("x", options)], 4).layout.dp == 4


@pytest.mark.parametrize(("changes", "message", "fix"), [
    ({"load": "nowhere"}, "the checkpoint to load is missing", "nowhere"),
    ({"tensor_model_parallel_size": 3}, "tensor parallel size 3 does not divide the 2 query groups", "use 1 or 2"),
    ({"pipeline_model_parallel_size": 3}, "4 layers cannot be split evenly into 3 pipeline stages", "use 1, 2 or 4 stages"),
    ({"pipeline_model_parallel_size": 2, "num_layer_list": "1,2"}, "1,2 has 2 stages with 3 layers", "4 layers"),
    ({"tensor_model_parallel_size": 2, "nproc_per_node": 3}, "3 processes are not a multiple of 2 (TP 2)", "use 2, 4"),
    ({"num_layers_per_virtual_pipeline_stage": 1},
     "need a pipeline parallel size of at least 2", "--pipeline-model-parallel-size 2"),
    ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 3},
     "3 micro batches are not a multiple of the 2 interleaved stages", "--global-batch-size"),
    ({"enable_high_availability": True, "nproc_per_node": 2}, "needs a folder to save in", "--save"),
    ({"enable_high_availability": True, "save": "out"}, "each part of the state is on only one rank", "twice as many"),
    ({"enable_high_availability": True, "save": "out", "nproc_per_node": 2, "fp16": True}, "fp16 may skip steps", "--bf16"),
    ({"enable_high_availability": True, "save": "out", "nproc_per_node": 3, "use_distributed_optimizer": True,
      "global_batch_size": 3}, "3 data-parallel ranks cannot be split into two halves", "even data parallel size"),
    ({"enable_high_availability": True, "save": "out", "nproc_per_node": 2, "bf16": True, "reuse_fp32_param": True},
     "one copy of each parameter", "remove one"),
    ({"enable_optimizer_state_local_copy": True}, "needs --enable-high-availability", "--enable-high-availability"),
    ({"enable_high_availability": True, "nnodes": "3:2"}, "--nnodes 3:2: the minimum", "2:4"),
    ({"enable_high_availability": True, "nnodes": "2"}, "needs a rendezvous endpoint", "HOST:PORT"),
    ({"sequence_parallel": True}, "--sequence-parallel needs a tensor parallel size", "--tensor-model-parallel-size 2"),
    ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 25}, "25 is not a multiple of", "--seq-length"),
    ({"seq_length": 65}, "65 exceeds the model's 64 positions", "--max-position-embeddings"),
    ({"micro_batch_size": 2, "global_batch_size": 3}, "3 is not a multiple of micro batch size 2", "--global-batch-size"),
    ({"data_path": ("gone",)}, "gone.idx is missing", "without .bin or .idx"),
    ({"data_path": ()}, "--data-path is not set", "modellink-preprocess"),
    ({"data_path": ("a", "b")}, "a b is not a list of alternating weights and prefixes", "--data-path 0.3"),
    ({"split": "a,b"}, "not a ratio of at most three numbers", "969,30,1"),
    ({"hidden_size": 64}, "--hidden-size is 64 in test and 48 in the checkpoint", "the checkpoint is of another model"),
    ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other", "--bf16"),
    ({"min_lr": 1.0}, "above the peak", "--min-lr"),
    ({"lr_warmup_iters": 2}, "does not end within the decay", "--lr-warmup-iters"),
    ({"save_interval": 2}, "needs a folder to save in", "--save"),
    ({"device": "npu"}, "no npu device", "modellink-doctor"),
    ({"expert_model_parallel_size": 2, "nproc_per_node": 2}, "without experts cannot have an expert", "--expert-model-"),
    ({"expert_model_parallel_size": 2, "nproc_per_node": 3},
     "expert parallel size 2 does not divide the 3 data-parallel ranks", "divisor of 3"),
    ({"context_parallel_size": 3, "seq_length": 28}, "28 cannot be split into 6 chunks", "two chunks"),
    ({"context_parallel_size": 4, "seq_length": 24, "tensor_model_parallel_size": 1}, "6 heads on 1 tensor-parallel ranks",
     "megatron_cp_algo"),
    ({"context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo"},
     "context parallel size 4 cannot be split into Ulysses groups", "--ulysses-degree-in-cp"),
    ({"ulysses_degree_in_cp": 2}, "--ulysses-degree-in-cp applies to hybrid_cp_algo", "--context-parallel-algo"),
    ({"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo", "attention_dropout": 0.1},
     "does not support attention dropout",
     "ulysses_cp_algo"),
    ({"recompute_granularity": "full"}, "needs --recompute-method and --recompute-num-layers", "--recompute-num-layers 4"),
    ({"recompute_num_layers": 2}, "apply to full recomputation", "--recompute-granularity full"),
    ({"recompute_granularity": "selective", "recompute_method": "block"}, "not to selective", "--recompute-granularity full"),
    ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
      "enable_recompute_layers_per_pp_rank": True}, "only with the block method", "--recompute-method block"),
    ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1,
      "enable_recompute_layers_per_pp_rank": True},
     "stages with several model chunks", "--num-layers-per-virtual-pipeline-stage"),
    ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
     "groups of 3 layers do not divide a model chunk of 4", "a divisor of 4"),
    ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2, "num_layer_list": "1,3",
      "pipeline_model_parallel_size": 2}, "groups of 2 layers do not divide", "a divisor of 1"),
    ({"recompute_granularity": "selective", "recompute_activation_function": True},
     "cannot be recomputed together", "one of them"),
    ({"recompute_activation_function_num_layers": 1}, "needs --recompute-activation-function", "--recompute-activation-function"),
    ({"use_mc2": True}, "--use-mc2 needs a tensor parallel size", "--tensor-model-parallel-size 2"),
    ({"moe_grouped_gemm": True}, "the model has no experts", "remove it"),
    ({"moe_permutation_async_comm": True}, "the model has no experts", "--moe-permutation-async-comm"),
    ({"reuse_fp32_param": True}, "a float32 weight is not the upper half", "--bf16"),
    ({"reuse_fp32_param": True, "fp16": True}, "a float16 weight is not the upper half", "--bf16"),
    ({"swap_modules": "mlp"}, "--swap-modules needs --swap-attention", "--swap-attention"),
    ({"swap_attention": True, "swap_modules": "self_attention,attn"}, "a layer has no module attn", "pre_mlp_layernorm"),
    ({"swap_attention": True, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
     "leaves nothing to offload", "--recompute-method block"),
    ({"swap_attention": True, "swap_modules": "mlp", "recompute_num_layers": 1}, "both recomputed and offloaded", "remove mlp"),
    ({"overlap_param_gather": True}, "needs the distributed optimizer", "--overlap-grad-reduce"),
    ({"rampup_batch_size": (2, 1)}, "three numbers, not 2", "16,16,30000"),
    ({"rampup_batch_size": (3, 2, 9), "global_batch_size": 4}, "starts at 3 and grows by 2 does not reach 4", "multiples of 1"),
    ({"rampup_batch_size": (2, 1, 0), "global_batch_size": 4}, "does not reach 4", "--rampup-batch-size"),
    ({"rampup_batch_size": (2, 1, 9), "global_batch_size": 4, "micro_batch_size": 2}, "multiples of 2", "end at 4"),
    ({"rampup_batch_size": (1, 1, 9), "global_batch_size": 4, "pipeline_model_parallel_size": 2,
      "num_layers_per_virtual_pipeline_stage": 1}, "multiples of 2", "end at 4"),
    ({"auto_resume": True}, "needs a folder to save in", "--auto-resume"),
    ({"save_total_limit": 1}, "needs a folder to save in", "--save-total-limit"),
    ({"decoupled_min_lr": 0.1}, "needs a larger --decoupled-lr", "--decoupled-lr"),
    ({"adam_eps": 0.0}, "--adam-eps is 0.0, it must be above 0", "--adam-eps"),
    ({"adam_beta1": 1.0}, "--adam-beta1 is 1.0, it must be at least 0 and below 1", "--adam-beta1"),
    ({"adam_beta2": float("nan")}, "--adam-beta2 is nan, it must be at least 0 and below 1", "--adam-beta2"),
    ({"lr_warmup_init": 1.0}, "the warm-up starts at 1.0, above the peak", "--lr-warmup-init"),
    ({"start_weight_decay": 0.1}, "needs no ends", "--end-weight-decay"),
    ({"weight_decay_incr_style": "linear"}, "a linear weight decay needs both ends", "--start-weight-decay"),
    ({"eod_mask_loss": True, "eod_token_id": 500}, "500, outside the vocabulary of 131", "--eod-token-id"),
    ({"moe_expert_capacity_factor": 1.0}, "the allgather dispatcher does not support", "--moe-token-dispatcher-type alltoall"),
    ({"moe_pad_expert_input_to_capacity": True}, "needs a capacity", "--moe-expert-capacity-factor"),
    ({"ckpt_step": 3}, "--ckpt-step 3 is set, but the folder has no iterations", "remove --ckpt-step"),
    ({"train_iters": None}, "the length of the run is not set", "--train-iters, --train-samples"),
    ({"train_samples": 8}, "the length of the run is set twice", "--train-iters, --train-samples"),
    ({"train_iters": None, "train_samples": 8, "lr_decay_iters": 2}, "its schedule in another unit", "--lr-decay-samples"),
    ({"lr_warmup_samples": 2}, "its schedule in another unit", "--lr-warmup-iters"),
    ({"train_iters": None, "train_samples": 8, "global_batch_size": 9}, "8 samples are fewer than one global batch of 9",
     "--global-batch-size"),
    ({"train_iters": None, "train_samples": 8, "lr_warmup_samples": 8}, "does not end within the decay of 8 samples",
     "--lr-warmup-samples, --lr-decay-samples"),
    ({"wandb_exp_name": "x"}, "Weights & Biases needs a project", "--wandb-project"),
    ({"async_save": True}, "needs a folder to save in", "--async-save"),
    ({"profile_level": "level1"}, "needs --profile", "add --profile"),
    ({"profile": True, "profile_step_start": 3, "profile_step_end": 3}, "after 3 and up to 3", "--profile-step-end"),
    ({"profile": True, "profile_ranks": (0, 2), "tensor_model_parallel_size": 2}, "rank 2 does not exist", "from 0 to 1"),
    ({"save_format": "megatron-core"}, "needs a folder to save in", "--save-format"),
    ({"save": "s", "save_format": "megatron-core", "lora_target_modules": ("linear_qkv",)}, "a LoRA run saves only adapters",
     "--save-format, --lora-target-modules"),
    ({"trian_iters": 3}, "unknown key 'trian_iters'", "train_iters"),
])
def test_a_wrong_run_is_refused(options, monkeypatch, changes, message, fix):
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started
    with pytest.raises(ModelLinkError) as caught:
        prepare("pretrain", [Layer("test", {name: value for name, value in (options | changes).items() if value is not None})])
    assert message in str(caught.value) and fix in str(caught.value)
    assert "--" in str(caught.value) or set(changes) <= {"trian_iters"}


def test_model_options_may_repeat_what_the_checkpoint_says(options):
    prepare("pretrain", [Layer("test", options | {"hidden_size": 48, "num_layers": "4"})])


def test_a_preset_fills_everything_and_options_win(options):
    preset = load_preset("qwen2.5-7b-32k")
    del options["load"], options["seq_length"]
    run = prepare("pretrain", [preset.layer(), Layer("command line", options)], 8)
    assert run.spec == preset.spec and run.optimizer.bf16
    assert (run.layout.tp, run.layout.pp, run.layout.dp) == (4, 2, 1)
    assert (run.data.seq_length, run.data.global_batch_size, run.parallel.sequence_parallel) == (32768, 16, True)
    smaller = prepare("pretrain", [preset.layer(), Layer("command line", options | {"num_layers": 2, "seq_length": 24})], 8)
    assert (smaller.spec.num_layers, smaller.data.seq_length) == (2, 24)


def test_a_script_that_recomputes_more_layers_than_a_stage_has(options):
    """Of the original's Mixtral 8x22B: 30 layers where a stage has 14 and a model chunk 2. It recomputes all there are."""
    del options["load"]
    options |= {"swap_attention": True, "recompute_method": "block", "recompute_num_layers": 30, "reuse_fp32_param": True,
                "seq_length": 128}
    large = load_preset("mixtral-8x22b-32k").layer()
    run = prepare("pretrain", [large, Layer("x", options)], 64)
    assert "30 is more than the 2 layers of a model chunk" in (run.memory.note(run.layout, run.spec.num_layers) or "")
    by_stage = {"enable_recompute_layers_per_pp_rank": True}
    run = prepare("pretrain", [large, Layer("x", options | by_stage)], 64)
    assert "the 14 layers of a pipeline stage" in (run.memory.note(run.layout, run.spec.num_layers) or "")
    small = load_preset("mixtral-8x7b-32k").layer()
    fits = prepare("pretrain", [small, Layer("x", options | {"recompute_num_layers": 8})], 64)
    assert fits.memory.note(fits.layout, fits.spec.num_layers) is None


def test_experts_need_sequence_parallelism_beside_tensor_parallelism(options):
    preset = load_preset("mixtral-8x7b-32k")
    del options["load"]
    with pytest.raises(ModelLinkError, match="experts with tensor parallel size 8 need sequence parallelism"):
        changes = {"sequence_parallel": False, "seq_length": 128}
        prepare("pretrain", [preset.layer(), Layer("command line", options | changes)], 64)


def test_legacy_files_that_could_not_hold_the_model_are_refused(options, tmp_path):
    del options["load"]
    changes = {"save": str(tmp_path), "seq_length": 128, "save_format": "megatron-legacy"}
    with pytest.raises(ModelLinkError, match="Megatron-Legacy has no name for") as caught:
        prepare("pretrain", [load_preset("mixtral-8x7b-32k").layer(), Layer("x", options | changes)], 64)
    assert caught.value.where == "--save-format megatron-legacy"


def test_a_model_without_a_hugging_face_form_can_be_saved(options, tmp_path):
    del options["load"]
    changes = {"save": str(tmp_path), "seq_length": 128}
    run = prepare("pretrain", [load_preset("gpt4-4x13b-128k").layer(), Layer("x", options | changes)], 64)
    assert run.manifest.family == "none"


def test_a_model_from_options_alone_needs_a_family_to_be_saved(options, tmp_path):
    model = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "vocab_size": 131, "max_position_embeddings": 64}
    del options["load"]
    assert prepare("pretrain", [Layer("test", options | model)]).spec.ffn == 96
    with pytest.raises(ModelLinkError, match="the model family is unknown"):
        prepare("pretrain", [Layer("test", options | model | {"save": str(tmp_path)})])
    with pytest.raises(ModelLinkError, match="--vocab-size is required"):
        prepare("pretrain", [Layer("test", options | {k: v for k, v in model.items() if k != "vocab_size"})])


def test_a_checkpoint_with_a_damaged_manifest_is_refused(options, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    config = json.loads((broken / "config.json").read_text())
    del config["num_hidden_layers"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLinkError, match="num_hidden_layers"):
        prepare("pretrain", [Layer("test", options | {"load": str(broken)})])


def test_every_concern_has_its_table_in_the_readme():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [kind.__name__ for kind in CONFIGS.values() if f":{kind.__name__} -->" not in readme] == []
