# SPDX-License-Identifier: Apache-2.0
"""Every family generates the tokens of the reference, and the log-probabilities of a pass over the full
sequence.

The models are those of core's parity test. Sequences of different lengths run in chunks of a few tokens, in a
batch and one by one, beyond windows and beyond the length at which dynamic scaling begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside

from modellink.kernels.parallel import ParallelLayout

MODELS = beside(str(Path(__file__).parents[2] / "core/tests/models.py"), "models")
NEW = 8
ROWS = [torch.randint(0, MODELS.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (5, 19, 12)]
LAYOUTS = {"one rank": ParallelLayout(), "tp2": ParallelLayout(tp=2),
           "uneven": ParallelLayout(pp=2, num_layer_list=(3, 1)), "ep2": ParallelLayout(ep=2, dp=2),
           "tp2 pp2": ParallelLayout(tp=2, pp=2), "tp2 ep2": ParallelLayout(tp=2, ep=2, dp=2)}
MIXTURES = [case for case in MODELS.cases() if any(word in case
                                                   for word in ("mixtral", "moe", "deepseek", "grok"))]
# four ranks share few cores: one model of each kind that is sharded differently
CASES = {"one rank": MODELS.cases(), "tp2": MODELS.cases(), "uneven": MODELS.cases(), "ep2": MIXTURES,
         "tp2 pp2": ["llama tied", "gemma2", "bloom", "deepseek_v2"], "tp2 ep2": ["qwen2_moe", "deepseek_v2"]}


def run(network: Any, rows: list[list[int]], budget: int) -> list[tuple[list[int], torch.Tensor]]:
    """Return the greedy tokens of each row, and the log-probabilities [NEW, vocabulary] they were chosen
    from."""
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.request import Completion, GenerationRequest
    cache = network.make_cache(max_sequences=3, max_chunk=budget, tokens=3 * 64)
    batch = ContinuousBatch(network, cache, max_sequences=3, token_budget=budget)
    completions = [Completion.start(GenerationRequest(row, NEW, logprobs=True,
                                                      top_logprobs=network.spec.vocab_size), None)
               for row in rows]
    for completion in completions:
        batch.add(completion)
    while not batch.idle:
        batch.step()
    assert all(pool.used == 0 for pool in batch.cache.pools)
    return [(one.token_ids, torch.stack([torch.tensor([value for _, value in sorted(step)])
                                         for step in one.top_logprobs]))
            for one in completions]


def on_rank(folders: dict[str, str], layout: ParallelLayout) -> dict[str, Any]:
    """Return the results of a batch for every model; on one rank also those of single rows and of passes over
    full sequences."""
    from modellink.core import processes
    from modellink.infer.plan import make_load_plan
    found: dict[str, Any] = {}
    for case, folder in folders.items():
        plan = make_load_plan(Path(folder) / "weights", layout=layout, device="cpu")
        processes.join(plan.device, layout, seed=0)
        from modellink.infer import attention
        from modellink.infer.network import Network
        attention.PADDING_KEYS = 2  # so that the shortest row decodes in a group of its own at first
        network = Network(plan.source, layout, plan.device, plan.dtype, show=False)
        found[case] = {"batch": run(network, ROWS, budget=7 if layout.world_size == 1 else 24)}
        if layout.world_size == 1:
            found[case]["single"] = [run(network, [row], budget=64)[0] for row in ROWS]
            found[case]["full"] = [full_pass(network, row, tokens)
                                    for row, (tokens, _) in zip(ROWS, found[case]["batch"], strict=True)]
    return found


@torch.inference_mode()
def full_pass(network: Any, row: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities [NEW, vocabulary] without a cache, in one pass unless the angles depend on
    the length."""
    if network.spec.rope_scaling_type == "dynamic":
        logits = [network.run_model(torch.tensor([row + tokens[:count]]))[0, -1] for count in range(NEW)]
        return torch.stack(logits).log_softmax(-1)
    return network.run_model(torch.tensor([row + tokens[:-1]]))[0, len(row) - 1:].log_softmax(-1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for case in MODELS.cases():
        path = tmp_path_factory.mktemp(re.sub(r"\W+", "-", case))
        MODELS.make(case, path)
        made[case] = str(path)
    return made


@pytest.fixture(scope="module")
def found(folders) -> Iterator[Callable[[str], dict[str, Any]]]:
    """`found(layout)`: the results of all models at a layout."""
    from ranks import Ranks
    pools: dict[int, Ranks] = {}

    @cache
    def at(name: str) -> dict[str, Any]:
        layout = LAYOUTS[name]
        wanted = {case: folders[case] for case in CASES[name]}
        if layout.world_size == 1:
            return on_rank(wanted, layout)
        ranks = pools.setdefault(layout.world_size, Ranks(layout.world_size))
        first, *others = ranks(on_rank, folders=wanted, layout=layout)
        tokens = {case: [row for row, _ in result["batch"]] for case, result in first.items()}
        for other in others:
            assert {case: [row for row, _ in result["batch"]] for case, result in other.items()} == tokens
        return first
    yield at
    for ranks in pools.values():
        ranks.stop()


@pytest.fixture(scope="module")
def expected(folders) -> Callable[[str], list[list[int]]]:
    """`expected(case)`: the greedy tokens of each row by the reference, with a pass over the full sequence
    for every token."""
    @cache
    def tokens(case: str) -> list[list[int]]:
        logits = reference(case, Path(folders[case]) / "weights")
        rows = []
        for row in ROWS:
            ids = list(row)
            for _ in range(NEW):
                with torch.no_grad():
                    ids.append(int(logits(torch.tensor([ids]))[0, -1].argmax()))
            rows.append(ids[len(row):])
        return rows
    return tokens


def reference(case: str, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from token ids [1, seq] to logits [1, seq, vocabulary], by transformers or the plain
    reference."""
    if case in MODELS.TRANSFORMERS:
        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager",
                                                                  dtype="float32").eval()
        return lambda ids: model(ids).logits
    from safetensors.torch import load_file
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    module = MODELS.reference(case.split(": ")[0])
    return lambda ids: module.logits(config, weights, ids)


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for layout,
                                              cases in CASES.items() for case in cases])
def test_tokens_and_logprobs(found, expected, case, layout):
    rows, single = found(layout)[case]["batch"], found("one rank")[case]
    for (tokens, logprobs), (single_tokens, single_logprobs), full in zip(rows, single["single"],
                                                                          single["full"], strict=True):
        torch.testing.assert_close(logprobs, full, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(single_logprobs, full, atol=2e-4, rtol=1e-4)
        assert single_tokens == tokens
    assert [tokens for tokens, _ in rows] == expected(case)
