"""Our model equals transformers' in logits and gradients, from a Hugging Face folder, at every layout.

The tiny models have no two sizes alike: heads, groups, head size, feed-forward width, an odd vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modellink.kernels.parallel import ParallelLayout

LAYOUTS = {
    "tp1": ParallelLayout(), "tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2),
    "pp2 uneven": ParallelLayout(pp=2, num_layer_list=(3, 1)), "vpp2": ParallelLayout(pp=2, vpp=2),
    "tp2 pp2": ParallelLayout(tp=2, pp=2)}
SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 20, "vocab_size": 131, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
MODELS = {"llama": ("llama", {}), "llama tied": ("llama", {"tie_word_embeddings": True}),
          "llama biased": ("llama", {"attention_bias": True}), "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
          "qwen2": ("qwen2", {"head_dim": 8})}


def tokens() -> torch.Tensor:
    return torch.randint(0, 131, (2, 25), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory) -> tuple[Path, torch.Tensor, float, dict[str, torch.Tensor]]:
    """(folder, logits, loss, gradients by Hugging Face name) of a random model in which every weight counts."""
    import transformers

    family, changes = MODELS[request.param]
    config = getattr(transformers, {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[family])(**(SIZES | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if "norm" in name or "bias" in name else parameter.mul_(3)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model.save_pretrained(folder)
    ids = tokens()
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return folder, logits.detach(), loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def on_rank(folder: str, layout: ParallelLayout, gradients: dict[str, torch.Tensor]) -> dict[str, object]:
    """Load, run forward and backward through megatron-core's schedule; the worst gradient error of this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from modellink.ckpt_convert import open_checkpoint
    from modellink.ckpt_convert.families import family_of
    from modellink.ckpt_convert.weights import stage_names, weights
    from modellink.core import processes
    from modellink.core.data.pretrain import Batch
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import bare, load_weights
    from modellink.core.train.step import run_schedule
    from modellink.kernels.device import find
    from modellink.kernels.parallel import held

    processes.join(find("cpu"), layout, seed=1)
    settings = BuildSettings(layout=layout, sequence_parallel=layout.tp > 1, make_vocab_size_divisible_by=8)
    models = build_models(spec := (source := open_checkpoint(folder)).spec, settings)
    load_weights(models, source, settings)
    wrapped = [DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
               for model in models]
    ids = tokens()
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 24))
    logits = None
    if layout.pp == 1:
        with torch.no_grad():
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(models[0](batch.tokens))[..., :131]
    for model in wrapped:
        model.zero_grad_buffer()
        model.config.finalize_model_grads_func = finalize_model_grads
    passes = 2 * layout.vpp
    loss = run_schedule(wrapped, lambda: iter([batch] * passes), num_microbatches=passes, seq_length=24, micro_batch_size=2)

    rules, table = family_of(source.family).rules(spec), weights(spec)
    worst = 0.0
    tp_rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    for chunk, model in enumerate(wrapped):
        names = stage_names(spec, layout, stage, chunk)
        for own, parameter in bare(model).named_parameters():
            name = names[own]
            full = torch.cat([gradients[hf][rows.start:rows.stop] for hf, rows in rules[name]])
            weight = table[name]
            if weight.split == "vocab":
                full = torch.nn.functional.pad(full, (0, 0, 0, parameter.size(0) * layout.tp - full.size(0)))
            pieces = held(weight.split, full.size(weight.dim), layout.tp, tp_rank)
            index = torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces])
            expected = full.index_select(weight.dim, index)
            worst = max(worst, (parameter.main_grad - expected).abs().max().item())
    dist.is_initialized() and dist.barrier()
    return {"logits": logits, "loss": loss.item(), "worst": worst}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_equal_transformers(reference, pools, layout):
    folder, logits, loss, gradients = reference
    for result in pools(LAYOUTS[layout].world_size)(on_rank, folder=str(folder), layout=LAYOUTS[layout], gradients=gradients):
        assert result["loss"] == pytest.approx(loss, rel=2e-6)
        assert result["worst"] < 1e-4 * max(1, loss)
        if result["logits"] is not None:
            torch.testing.assert_close(result["logits"], logits, atol=1e-5, rtol=1e-5)
