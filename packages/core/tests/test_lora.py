# SPDX-License-Identifier: Apache-2.0
"""Adapters: what a plain loop learns with them, at every layout; frozen weights; what is saved; merging."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ranks import beside

from modellink.core.prepare.prepare import prepare
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.options import Layer

INSTRUCTIONS, MODELS, SFT = (beside(__file__, name) for name in ("instructions", "models", "test_sft"))
TP2, PP2, VARIABLE = SFT.TP2, SFT.PP2, SFT.VARIABLE
samples, chats = SFT.samples, SFT.chats  # the same set
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LORA: dict[str, Any] = {"lora_target_modules": ALL, "lora_r": 4, "lora_alpha": 12, "lr": 2e-2}
TABLE = {
    "one": (1, VARIABLE), "legacy names": (1, {"lora_target_modules": (
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")}),
    "rslora": (1, {"lora_use_rslora": True, "lora_alpha": 6}),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    "tp2": (2, {"tensor_model_parallel_size": 2}), "tp2 sp": (2, TP2 | {"micro_batch_size": 2}),
    "pp2": (2, PP2 | VARIABLE), "cp2": (2, SFT.CP2), "dp2": (2, {"use_distributed_optimizer": True}),
    "tp2 sp pp2": (4, TP2 | PP2 | {"recompute_activation_function": True})}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of tiny models of other architectures, by case."""
    folders: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("model")
            MODELS.make(case, folders[case])
        return folders[case] / "weights"
    return folder


@pytest.fixture(scope="module")
def run(pools, tiny, chats):
    """`run(ranks, **options)`: the steps of a run with adapters, on the tiny model (`load` replaces it)."""
    def go(ranks: int, **options: Any) -> list[tuple[int, int, float, float]]:
        given = SFT.OPTIONS | {"load": str(tiny), "data_path": (str(chats),)} | LORA | options
        return pools(ranks)(SFT.train, options=given)[-1]
    return go


def put_adapters(model: Any) -> None:
    """The same adapters in transformers' model: one A where our linear is several of its."""
    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core.adapters.saved import initial, targets
    from modellink.core.config import LoraConfig

    parts = {"self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
             "self_attention.linear_proj": ["self_attn.o_proj"], "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
             "mlp.linear_fc2": ["mlp.down_proj"]}
    model.requires_grad_(False)
    spec = open_checkpoint(Path(model.config.name_or_path)).spec
    for name, weight in targets(spec, LoraConfig(lora_target_modules=ALL)).items():
        _, _, layer, inside = name.removesuffix(".weight").split(".", 3)
        a = torch.nn.Parameter(initial(name, (4, weight.shape[1]), 7))
        for part in parts[inside]:
            linear = model.get_submodule(f"model.layers.{layer}.{part}")
            linear.a, linear.b = a, torch.nn.Parameter(torch.zeros(linear.out_features, 4))
            linear.register_forward_hook(lambda own, inputs, output: output + 3.0 * (inputs[0] @ own.a.t()) @ own.b.t())


@pytest.fixture(scope="module")
def plain(tiny, samples):
    return INSTRUCTIONS.plain_losses(tiny, samples, steps=5, batch=8, lr=LORA["lr"], prepare=put_adapters)


@pytest.mark.parametrize("layout", TABLE)
def test_adapters_learn_what_a_plain_loop_learns(run, plain, layout):
    ranks, options = TABLE[layout]
    steps = run(ranks, **options)
    assert plain[-1][0] < plain[0][0] - 0.05  # they do learn
    assert [step[2] for step in steps] == pytest.approx([loss for loss, _ in plain], rel=1e-5)
    assert [step[3] for step in steps] == pytest.approx([norm for _, norm in plain], rel=1e-4)


@pytest.fixture(scope="module")
def alone_of(run, made):
    """`alone_of(case, modules)`: three steps on one rank."""
    return cache(lambda case, modules: run(1, load=str(made(case)), train_iters=3, lora_target_modules=modules))


EP2 = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1",
          "linear_fc2")


@pytest.mark.parametrize(("case", "ranks", "options"), [
    ("mixtral", 2, EP2 | VARIABLE), ("mixtral", 2, TP2),
    ("mixtral", 4, TP2 | {"expert_model_parallel_size": 2, "micro_batch_size": 2}),
    ("mixtral", 2, EP2 | {"lora_target_modules": ("linear_fc1", "linear_fc2")}),
    ("deepseek_v2", 2, TP2 | {"lora_target_modules": LATENT}), ("deepseek_v2", 2, PP2 | {"lora_target_modules": LATENT}),
    ("bloom", 2, TP2), ("llama tied", 2, PP2)])
def test_experts_and_other_architectures(run, alone_of, made, case, ranks, options):
    """As one rank does, whose adapters are proven above."""
    alone = alone_of(case, options.get("lora_target_modules", ALL))
    steps = run(ranks, load=str(made(case)), train_iters=3, **options)
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in alone], rel=1e-5)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in alone], rel=1e-4)
    assert alone[-1][2] < alone[0][2]


@pytest.mark.parametrize(("modules", "options"), [
    (("linear_fc1", "linear_fc2"), {"swap_attention": True, "recompute_num_layers": 4}),
    (("linear_fc2",), {"recompute_activation_function": True})])
def test_a_recomputed_part_whose_input_is_frozen(run, alone_of, made, modules, options):
    alone = alone_of("llama", modules)
    steps = run(1, load=str(made("llama")), train_iters=3, lora_target_modules=modules, **options)
    assert [step[3] for step in steps] == pytest.approx([step[3] for step in alone], rel=1e-4)
    assert alone[0][3] > 0


@pytest.mark.parametrize(("ranks", "options"), [(1, {}), (2, TP2), (2, {"use_distributed_optimizer": True, "bf16": True})])
def test_stopping_and_going_on_changes_no_bit(run, tmp_path, ranks, options):
    options = options | {"lora_dropout": 0.2, "shuffle": True}
    straight = run(ranks, **options)
    stopped = run(ranks, save=str(tmp_path / "a"), exit_interval=2, **options)
    assert stopped + run(ranks, lora_load=str(tmp_path / "a"), **options) == straight
    assert straight[0][2:] != run(ranks, train_iters=1, **(options | {"lora_dropout": 0.0}))[0][2:]


@pytest.mark.parametrize(("case", "before", "after"), [("llama", (2, TP2), (2, PP2)), ("mixtral", (2, EP2), (2, TP2))])
def test_going_on_at_another_layout(run, made, tmp_path, case, before, after):
    base = {"load": str(made(case))}
    straight = run(1, **base)
    run(before[0], save=str(tmp_path / "a"), exit_interval=2, **base, **before[1])
    resumed = run(after[0], lora_load=str(tmp_path / "a"), **base, **after[1])
    assert [step[2] for step in resumed] == pytest.approx([step[2] for step in straight[2:]], rel=1e-5)


@pytest.mark.parametrize(("case", "ranks", "options"), [("llama", 2, TP2), ("mixtral", 2, EP2)])
def test_a_save_is_a_folder_of_peft_too(run, made, tmp_path, case, ranks, options):
    """A run that starts from the saved folder has the loss of the run that continues."""
    base, save = {"load": str(made(case))}, tmp_path / "a"
    run(ranks, save=str(save), exit_interval=2, **base, **options)
    resumed = run(1, lora_load=str(save), **base)
    again = run(1, lora_load=str(save / "iter_0000002/peft"), train_iters=1, data_path=skipped(tmp_path), **base)
    assert again[0][:2] == (1, 8)
    assert again[0][2:] == pytest.approx(resumed[0][2:], rel=1e-5)


def skipped(folder: Path) -> tuple[str, ...]:
    """The set without the 16 samples of two steps."""
    INSTRUCTIONS.write_set(folder / "rest", INSTRUCTIONS.make_samples(30, 131)[16:])
    return (str(folder / "rest"),)


def test_finetune_starts_with_the_adapters_of_an_iteration(run, tmp_path):
    """The third batch is the first of the new run: it has the loss of the third step with what two steps have learned."""
    straight = run(1, save=str(tmp_path / "a"), save_interval=1, exit_interval=3)
    options = {"lora_load": str(tmp_path / "a"), "finetune": True, "train_iters": 1, "data_path": skipped(tmp_path)}
    (begun,), (last,) = run(1, ckpt_step=2, **options), run(1, **options)
    assert begun[:2] == last[:2] == (1, 8)
    assert begun[2:] == pytest.approx(straight[2][2:], rel=1e-5)
    assert last[2] != pytest.approx(straight[2][2], rel=1e-4)  # those of the third step


def test_the_folder_of_a_run_is_an_adapter_to_the_converter(run, tiny, tmp_path):
    from modellink.ckpt_convert import open_checkpoint
    from modellink.ckpt_convert.open import open_adapter

    run(1, save=str(tmp_path / "a"), train_iters=1, prompt_type="chatml")
    found = open_adapter(tmp_path / "a", open_checkpoint(tiny))
    assert found.folder == tmp_path / "a/iter_0000001/peft" and found.prompt_type == "chatml"


def test_adapters_alone_are_saved(run, pools, tiny, chats, tmp_path):
    run(1, save=str(tmp_path / "a"), train_iters=1)
    names = pools(1)(saved, folder=str(tmp_path / "a/iter_0000001"))[0]
    weights = {name: shape for name, shape in names.items() if name.startswith("decoder.")}
    assert len(weights) == 4 * 4 * 2 and not any(name.startswith("embedding") for name in names)
    assert weights["decoder.layers.3.self_attention.linear_qkv.lora_A.weight"] == (4, 48)
    assert weights["decoder.layers.0.mlp.linear_fc1.lora_B.weight"] == (224, 4)
    assert len([name for name in names if "exp_avg" in name]) == 2 * len(weights)
    with pytest.raises(ModelLinkError, match="holds only adapters"):
        prepare("pretrain", [Layer("test", SFT.OPTIONS | LORA | {"load": str(tmp_path / "a"), "data_path": (str(chats),)})])
    with pytest.raises(ModelLinkError, match="--lora-r is 8 and 4 in the adapters"):
        prepare("pretrain", [Layer("test", SFT.OPTIONS | LORA | {"load": str(tiny), "data_path": (str(chats),), "lora_r": 8,
                                                     "lora_load": str(tmp_path / "a")})], None)


def saved(folder: str) -> dict[str, tuple[int, ...]]:
    from megatron.core import dist_checkpointing

    return {name: tuple(tensor.global_shape) for name, tensor in dist_checkpointing.load_tensors_metadata(folder).items()}


def merge(model: Any) -> None:
    """Add to the weights of a rank what its adapters are to add to its products."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.weight += module.scale * module.lora_B.weight @ module.lora_A.weight
            module.lora_B.weight.zero_()


def merged_and_not(folder: str, tp: int, modules: tuple[str, ...]) -> float:
    """On a rank: the largest difference of logits before and after merging, by the largest that adapters make."""
    import torch

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.adapters.lora import add_adapters
    from modellink.core.config import LoraConfig
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import load_weights
    from modellink.kernels.device import find
    from modellink.kernels.parallel import ParallelLayout

    processes.join(find("cpu"), layout := ParallelLayout(tp=tp), seed=1)
    settings = BuildSettings(layout=layout, sequence_parallel=tp > 1, make_vocab_size_divisible_by=8)
    source = open_checkpoint(Path(folder))
    models = build_models(source.spec, settings)
    load_weights(models, source, settings)
    ids, model = torch.arange(24)[None] * 5 % 131, models[0].eval()
    with torch.no_grad():
        base = model(ids)
        add_adapters(models, source.spec, layout, LoraConfig(lora_target_modules=modules, lora_r=4), seed=1)
        assert model(ids).equal(base)  # B begins with 0
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.02)
        apart = model(ids)
        merge(model)
        together = model(ids)
    return ((apart - together).abs().max() / (apart - base)[..., :131 // tp].abs().max()).item()


@pytest.mark.parametrize(("case", "tp", "modules"), [("llama", 1, ALL), ("llama", 2, ALL), ("mixtral", 2, ALL),
                                                     ("deepseek_v2", 2, LATENT)])
def test_merged_logits_are_those_of_the_adapters(pools, made, case, tp, modules):
    assert max(pools(tp)(merged_and_not, folder=str(made(case)), tp=tp, modules=modules)) < 1e-4


@pytest.mark.parametrize(("changes", "message", "fix"), [
    ({"lora_target_modules": ("linear_vqk",)}, "the model has no linear linear_vqk", "did you mean linear_qkv?"),
    ({"lora_target_modules": ("q_proj",)}, "the model has no linear q_proj", "did you mean linear_qkv?"),
    ({"lora_target_modules": ("all",)}, "the model has no linear all", "linear_fc1 linear_fc2 linear_proj linear_qkv?"),
    ({"lora_target_modules": (), "lora_load": "."}, "--lora-load needs --lora-target-modules", "repeat"),
    ({"lora_load": "nowhere"}, "the adapters to load are missing", "nowhere"),
    ({"lora_load": "."}, "the folder holds no adapters", "lora.json"),
    ({"load": None, "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "ffn_hidden_size": 9,
      "max_position_embeddings": 24}, "LoRA needs a base model", "--load"),
])
def test_what_cannot_work_is_refused(tiny, chats, changes, message, fix):
    with pytest.raises(ModelLinkError) as caught:
        prepare("pretrain", [Layer("test", SFT.OPTIONS | LORA | {"load": str(tiny), "data_path": (str(chats),)} | changes)])
    assert message in str(caught.value) and fix in str(caught.value)
