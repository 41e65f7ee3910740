# SPDX-License-Identifier: Apache-2.0
"""What ckpt-convert writes, megatron-core loads: rank files strictly, distributed checkpoints by its own loader; the same logits.

core builds the models at the layout; their weights are loaded only from the converted files, by torch and megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from modellink.ckpt_convert import convert
from modellink.kernels.parallel import ParallelLayout

SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
         "vocab_size": 131, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | {"head_dim": 20, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2})}
LAYOUTS = {"llama": ParallelLayout(tp=2, pp=2), "mixtral": ParallelLayout(tp=2, ep=2, dp=2)}


def on_rank(folder: str, layout: ParallelLayout, kind: str) -> torch.Tensor | None:
    """Logits of the last stage, from the converted checkpoint alone."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.data.batch import Batch
    from modellink.core.methods.pretrain import Pretrain
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import bare
    from modellink.core.train.step import run_schedule
    from modellink.kernels.device import find

    processes.join(find("cpu"), layout, seed=1)
    settings = BuildSettings(layout=layout, sequence_parallel=layout.ep > 1, make_vocab_size_divisible_by=8)
    models = build_models(open_checkpoint(Path(folder) / "hf").spec, settings)
    (model,) = models
    root = Path(folder) / kind / "iter_0000001"
    if kind == "torch_dist":
        common = dist_checkpointing.load_common_state_dict(str(root))
        state = model.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(preloaded_state_dict=common))
        loaded = dist_checkpointing.load({"model": state}, str(root))["model"]
    else:
        numbers = f"{parallel_state.get_tensor_model_parallel_rank():02d}"
        numbers += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}" if layout.pp > 1 else ""
        numbers += f"_{parallel_state.get_expert_model_parallel_rank():03d}" if layout.ep > 1 else ""
        loaded = torch.load(root / f"mp_rank_{numbers}/model_optim_rng.pt", weights_only=False)["model"]
    result = bare(model).load_state_dict(loaded, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("_extra_state") for name in result.missing_keys), result.missing_keys
    seen: list[torch.Tensor] = []
    # a copy, because the loss writes its gradient over the logits
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    ids = torch.randint(0, 131, (2, 25), generator=torch.Generator().manual_seed(4))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 24))
    run_schedule(Pretrain(None), models, lambda: iter([batch] * 2), num_microbatches=2, seq_length=24, micro_batch_size=2)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    logits: torch.Tensor = tensor_parallel.gather_from_tensor_model_parallel_region(seen[0])
    return logits[..., :131]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_the_logits_of_a_converted_model(name: str, kind: str, tmp_path: Path, ranks: Callable[[int], Ranks]) -> None:
    import transformers

    kind_of_class, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind_of_class}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.dim() < 2 else parameter.mul_(3)
    model.save_pretrained(tmp_path / "hf")
    layout = LAYOUTS[name]
    files = ParallelLayout(tp=layout.tp, pp=layout.pp, ep=layout.ep)
    if kind == "torch":
        convert(tmp_path / "hf", tmp_path / kind, to="megatron-core", layout=files, make_vocab_size_divisible_by=8, verify=True)
    else:
        convert(tmp_path / "hf", tmp_path / kind, to="torch_dist", verify=True)
    ids = torch.randint(0, 131, (2, 25), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(ids[:, :-1]).logits
    results = ranks(layout.world_size)(on_rank, folder=str(tmp_path), layout=layout, kind=kind)
    found = [logits for logits in results if logits is not None]
    assert found
    for logits in found:
        assert (logits - expected).abs().max() < 1e-4
