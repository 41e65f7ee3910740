# SPDX-License-Identifier: Apache-2.0
"""One set of ranks per world size for the whole run, a tiny model and a small data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Ranks]]:
    """`pools(n)`: n ranks."""
    made: dict[int, Ranks] = {}
    yield lambda size: made.setdefault(size, Ranks(size))
    for ranks in made.values():
        ranks.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small random Llama, two query groups, odd vocabulary."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=20,
        vocab_size=131, max_position_embeddings=64, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_documents(prefix: str, seed: int, vocab_size: int, documents: int) -> None:
    """On a rank: a .bin/.idx pair of random documents in which every token depends on the one before."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for _ in range(documents):
        steps = generator.integers(0, 3, size=generator.integers(20, 90))
        builder.add_item(torch.from_numpy((generator.integers(0, vocab_size) + 5 * steps.cumsum()) % vocab_size))
        builder.end_document()
    builder.finalize(prefix + ".idx")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, pools: Callable[[int], Ranks]) -> Path:
    """The prefix of a small data set of the tiny model's tokens."""
    prefix = tmp_path_factory.mktemp("corpus") / "words_text_document"
    pools(1)(write_documents, prefix=str(prefix), seed=0, vocab_size=131, documents=60)
    return prefix
