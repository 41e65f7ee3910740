"""Every family generates: what comes out of a cache is what the whole sequence gives, and what the reference gives.

The models are those of core's parity test. Rows of different lengths run in pieces of a few tokens, in a batch and alone, past
windows and past the length at which dynamic scaling begins.
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
LAYOUTS = {"one rank": ParallelLayout(), "tp2": ParallelLayout(tp=2), "uneven": ParallelLayout(pp=2, num_layer_list=(3, 1)),
           "ep2": ParallelLayout(ep=2, dp=2), "tp2 pp2": ParallelLayout(tp=2, pp=2), "tp2 ep2": ParallelLayout(tp=2, ep=2, dp=2)}
MIXTURES = [case for case in MODELS.cases() if any(word in case for word in ("mixtral", "moe", "deepseek", "grok"))]
# four ranks share the cores of a small machine: one of each kind that differs between ranks
CASES = {"one rank": MODELS.cases(), "tp2": MODELS.cases(), "uneven": MODELS.cases(), "ep2": MIXTURES,
         "tp2 pp2": ["llama tied", "gemma2", "bloom", "deepseek_v2"], "tp2 ep2": ["qwen2_moe", "deepseek_v2"]}


def run(network: Any, rows: list[list[int]], budget: int) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of each row, and the log-probabilities [NEW, vocabulary] they were chosen from."""
    from modellink.infer.batch import Batch
    from modellink.infer.request import Answer, Request
    batch = Batch(network, network.cache(rows=3, piece=budget, tokens=3 * 64), rows=3, budget=budget)
    answers = [Answer.to(Request(row, NEW, logprobs=True, top_logprobs=network.spec.vocab_size), None) for row in rows]
    for answer in answers:
        batch.add(answer)
    while not batch.idle:
        batch.step()
    assert all(pool.used == 0 for pool in batch.cache.pools)
    return [(answer.token_ids, torch.stack([torch.tensor([value for _, value in sorted(step)]) for step in answer.top_logprobs]))
            for answer in answers]


def on_rank(folders: dict[str, str], layout: ParallelLayout) -> dict[str, Any]:
    """For every model what a batch gives; on one rank also what rows give alone, and what passes over whole sequences give."""
    from modellink.core import processes
    from modellink.infer.plan import make_plan
    found: dict[str, Any] = {}
    for case, folder in folders.items():
        plan = make_plan(Path(folder) / "weights", layout=layout, device="cpu")
        processes.join(plan.device, layout, seed=0)
        from modellink.infer import cache as paged
        from modellink.infer.network import Network
        paged.WASTED = 2  # single tokens: the shortest row at first apart from the others
        network = Network(plan.source, layout, plan.device, plan.dtype, show=False)
        found[case] = {"batch": run(network, ROWS, budget=7 if layout.world_size == 1 else 24)}
        if layout.world_size == 1:
            found[case]["alone"] = [run(network, [row], budget=64)[0] for row in ROWS]
            found[case]["whole"] = [whole(network, row, tokens)
                                    for row, (tokens, _) in zip(ROWS, found[case]["batch"], strict=True)]
    return found


@torch.inference_mode()
def whole(network: Any, row: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [NEW, vocabulary] by passes without a cache: one, unless a longer sequence changes all angles."""
    if network.spec.rope_scaling_type == "dynamic":
        return torch.stack([network.logits(torch.tensor([row + tokens[:count]]))[0, -1] for count in range(NEW)]).log_softmax(-1)
    return network.logits(torch.tensor([row + tokens[:-1]]))[0, len(row) - 1:].log_softmax(-1)


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
    """`found(layout)`: results of all models at a layout."""
    from ranks import Ranks
    pools: dict[int, Ranks] = {}

    @cache
    def at(name: str) -> dict[str, Any]:
        layout = LAYOUTS[name]
        wanted = {case: folders[case] for case in CASES[name]}
        if layout.world_size == 1:
            return on_rank(wanted, layout)
        first, *others = pools.setdefault(layout.world_size, Ranks(layout.world_size))(on_rank, folders=wanted, layout=layout)
        tokens = {case: [row for row, _ in result["batch"]] for case, result in first.items()}
        for other in others:
            assert {case: [row for row, _ in result["batch"]] for case, result in other.items()} == tokens
        return first
    yield at
    for ranks in pools.values():
        ranks.stop()


@pytest.fixture(scope="module")
def expected(folders) -> Callable[[str], list[list[int]]]:
    """`expected(case)`: each row's greedy tokens by the reference, a whole pass for every token."""
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
    """Token ids [1, seq] -> logits [1, seq, vocabulary], by transformers or the plain reference."""
    if case in MODELS.TRANSFORMERS:
        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
        return lambda ids: model(ids).logits
    from safetensors.torch import load_file
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    module = MODELS.reference(case.split(": ")[0])
    return lambda ids: module.logits(config, weights, ids)


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for layout, cases in CASES.items() for case in cases])
def test_tokens_and_logprobs(found, expected, case, layout):
    rows, single = found(layout)[case]["batch"], found("one rank")[case]
    for (tokens, logprobs), (alone, logprobs_alone), whole in zip(rows, single["alone"], single["whole"], strict=True):
        torch.testing.assert_close(logprobs, whole, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(logprobs_alone, whole, atol=2e-4, rtol=1e-4)
        assert alone == tokens
    assert [tokens for tokens, _ in rows] == expected(case)
