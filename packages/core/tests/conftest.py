"""One long-lived set of ranks per world size for the whole run: starting megatron costs seconds, a task milliseconds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

from modellink.core.processes import free_port

SECONDS = 120  # for one task


class Pool:
    """`pool(function, **kwargs)` runs a function of a test file on every rank and returns the results by rank.

    Arguments and results are pickled. A rank that fails or hangs fails the test with its trace, and the pool is made anew.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "pool")) as listener:
            environment = os.environ | {
                "WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                "POOL_ADDRESS": str(listener.address), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            script = str(Path(__file__).with_name("worker.py"))
            self._ranks = [subprocess.Popen([sys.executable, script], env=environment | {"RANK": str(rank)})
                           for rank in range(self.world_size)]
            arrived = {}
            for _ in range(self.world_size):
                connection = listener.accept()
                arrived[pickle.loads(connection.recv_bytes())] = connection
            self._connections = [arrived[rank] for rank in range(self.world_size)]

    def __call__(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        path = sys.modules[function.__module__].__file__
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((path, function.__name__, kwargs)))
        results, failures = [], []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(5 if failures else SECONDS):
                failures.append(f"rank {rank} did not answer")
                continue
            good, value = pickle.loads(connection.recv_bytes())
            results.append(value)
            if not good:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)
        return results

    def stop(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()
        self._ranks, self._connections = [], []


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """`pools(n)`: the pool of n ranks."""
    made: dict[int, Pool] = {}
    yield lambda size: made.setdefault(size, Pool(size))
    for pool in made.values():
        pool.stop()


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
def corpus(tmp_path_factory: pytest.TempPathFactory, pools: Callable[[int], Pool]) -> Path:
    """The prefix of a small data set of the tiny model's tokens."""
    prefix = tmp_path_factory.mktemp("corpus") / "words_text_document"
    pools(1)(write_documents, prefix=str(prefix), seed=0, vocab_size=131, documents=60)
    return prefix
