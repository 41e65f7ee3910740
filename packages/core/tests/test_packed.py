# SPDX-License-Identifier: Apache-2.0
"""Documents packed into a sample: each is computed as if it stood alone, at every way to cut the sequence."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import beside

from modellink.kernels.parallel import ParallelLayout

MODELS, training = beside(__file__, "models"), beside(__file__, "test_training")
ROWS = ((0, 5, 6, 17, 24), (0, 11, 24))
CASES = ("llama llama3 tied", "gemma2", "bloom", "gpt2 gelu", "deepseek_v2", "internlm2: internlm2 dynamic")
"""Models that between them have rotary, learned and dynamic positions, ALiBi, windows, soft caps and latent attention."""
CUTS = {"cp2": ParallelLayout(cp=2), "cp2 ulysses": ParallelLayout(cp=2, ulysses=2),
        "cp4 hybrid": ParallelLayout(cp=4, ulysses=2), "tp2 cp2": ParallelLayout(tp=2, cp=2)}


def logits(folder: str, layout: ParallelLayout, alone: bool) -> torch.Tensor:
    """On a rank: the logits [2, 24, 131] of two rows of documents, packed, or each in a pass of its own."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from modellink.ckpt_convert import open_checkpoint
    from modellink.core import processes
    from modellink.core.data.batch import Batch
    from modellink.core.model.build import BuildSettings, build_models
    from modellink.core.model.load import load_weights
    from modellink.core.parallel.context import local_part, local_positions
    from modellink.core.train.step import state_of
    from modellink.kernels.device import find

    processes.join(find("cpu"), layout, seed=1)
    source = open_checkpoint(Path(folder) / "weights")
    settings = BuildSettings(layout=layout, sequence_parallel=layout.tp > 1)
    (model,) = build_models(source.spec, settings)
    load_weights([model], source, settings)
    tokens = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        if alone:
            return torch.stack([torch.cat([model(tokens[row:row + 1, start:end])[0] for start, end in pairwise(ends)])
                                for row, ends in enumerate(ROWS)])
        starts = torch.tensor([[start for start, end in pairwise(ends) for _ in range(start, end)] for ends in ROWS])
        out = model(local_part(tokens), state_of(Batch(tokens, tokens, tokens, starts, restart=True)))
    out = tensor_parallel.gather_from_tensor_model_parallel_region(out)[..., :131]
    whole = torch.zeros(2, 24, 131)
    whole[:, local_positions(out.size(1), out.device) if layout.cp > 1 else slice(None)] = out
    dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return whole


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {case: tmp_path_factory.mktemp("packed") for case in CASES}
    for case, folder in made.items():
        MODELS.make(case, folder)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_document_is_computed_as_if_alone(pools, folders, case):
    folder = str(folders[case])
    (expected,) = pools(1)(logits, folder=folder, layout=ParallelLayout(), alone=True)
    for name, layout in {"whole": ParallelLayout(), **CUTS}.items():
        for out in pools(layout.world_size)(logits, folder=folder, layout=layout, alone=False):
            torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


PACKED = {"reset_position_ids": True, "eod_token_id": 5, "eod_mask_loss": True}
RING, HYBRID = ({"context_parallel_algo": name} for name in ("megatron_cp_algo", "hybrid_cp_algo"))
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "ulysses": (2, {"context_parallel_size": 2}), "ring": (2, {"context_parallel_size": 2} | RING),
    "hybrid": (4, {"context_parallel_size": 4, "ulysses_degree_in_cp": 2} | HYBRID),
    "tp2 ring": (4, TP2 | {"context_parallel_size": 2} | RING),
    "tp2 pp2 mc2": (4, TP2 | {"pipeline_model_parallel_size": 2, "use_mc2": True}),
    "pp2 ulysses": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "ring swapped": (2, {"context_parallel_size": 2, "swap_attention": True} | RING),
    "pp2 ring": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2} | RING),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})}


@pytest.fixture(scope="module")
def steps(pools, tiny, corpus):
    texts = {"load": str(tiny), "data_path": (str(corpus),)}
    return lambda size, more: pools(size)(training.train, options=texts | more)[-1]


@pytest.fixture(scope="module")
def expected(steps):
    return steps(1, PACKED)


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_the_same_at_every_layout(steps, expected, name):
    size, more = RUNS[name]
    found = steps(size, PACKED | more)
    assert [step[2] for step in found] == pytest.approx([step[2] for step in expected], rel=2e-6)
    assert [step[3] for step in found] == pytest.approx([step[3] for step in expected], rel=1e-5)


def test_each_flag_changes_the_loss(steps, expected):
    """Rotary positions are relative: restarting them changes nothing where documents do not see each other."""
    first = [steps(1, {"eod_token_id": 5, "exit_interval": 1} | more)[0][2] for more in (
        {}, {"reset_attention_mask": True}, {"reset_position_ids": True}, {"eod_mask_loss": True})]
    assert first[1] == pytest.approx(first[2], rel=1e-6)
    assert len({round(loss, 4) for loss in (*first, expected[0][2])}) == 4



def first_step(options: dict[str, Any]) -> tuple[float, float, int]:
    """On a rank: the loss of a run's first iteration; what transformers finds for its learned tokens (sum) and their number."""
    import transformers

    from modellink.core.methods.pretrain import Pretrain
    loss, seen = Pretrain.loss, []

    def kept(self: Any, batch: Any, output: Any) -> Any:
        seen.append(batch)
        return loss(self, batch, output)

    with patch.object(Pretrain, "loss", kept):
        steps = training.train(options=options | {"exit_interval": 1})
    model = transformers.LlamaForCausalLM.from_pretrained(options["load"], dtype=torch.float32)
    total = 0.0
    for batch in seen:
        each = torch.nn.functional.cross_entropy(model(batch.tokens).logits.transpose(1, 2), batch.labels, reduction="none")
        total += float((each * (batch.tokens != 5)).sum())
    return (steps[0][2] if steps else 0.0), total, sum(int((batch.tokens != 5).sum()) for batch in seen)


def test_masked_tokens_leave_the_mean_over_the_global_batch(pools, tiny, corpus):
    """Independent of micro batches and of data parallelism, although they hold different numbers of learned tokens."""
    options = {"load": str(tiny), "data_path": (str(corpus),), "eod_token_id": 5, "eod_mask_loss": True}
    for ranks, size in ((1, 1), (1, 4), (2, 1)):
        found = pools(ranks)(first_step, options=options | {"micro_batch_size": size})
        count = sum(number for _, _, number in found)
        assert 24 * 4 - 12 < count < 24 * 4
        assert found[-1][0] == pytest.approx(sum(total for _, total, _ in found) / count, rel=1e-6)
