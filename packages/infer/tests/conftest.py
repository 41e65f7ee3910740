# SPDX-License-Identifier: Apache-2.0
"""Small random models with a small real tokenizer. transformers writes the folders and is the reference."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog; the dog does not mind, and the fox goes home.",
    "Schöne Grüße aus Köln: Straße, Fähre, Übermut. Ça va déjà mieux, garçon?",
    "机器学习是人工智能的一个分支。模型从数据中学习。", "日本語の文章もあります。絵文字: 🦊🐶🌍 🦊🐶🌍",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3"]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
          "+ '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VOCABULARY = 379
# No two sizes are equal: heads and groups, head size and hidden / heads, feed-forward size and 4 x hidden.
SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 2,
         "pad_token_id": 0}
FAMILIES = {"llama": ("LlamaConfig", {"head_dim": 20}),
            "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
            "mistral": ("MistralConfig", {"head_dim": 20, "sliding_window": 40})}
# Of different lengths, with characters of one to four bytes.
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog", "Köln: 机器学习", "🦊",
           "def add(a, b):\n    return",
           "Schöne Grüße aus Köln: Straße, Fähre, Übermut. Ça va déjà mieux, garçon? " * 2]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return PROMPTS


def write_tokenizer(folder: Path) -> None:
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    assert engine.get_vocab_size() == VOCABULARY
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHATML)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(family)`: a Hugging Face folder with a random model; norms and biases matter, and no two tokens
    are near-ties."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        import torch
        import transformers
        kind, changes = FAMILIES[family]
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "bias" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.mul_(6)
        model.generation_config.eos_token_id = [2, 0]
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        write_tokenizer(path)
        return path

    return lambda family: made[family] if family in made else made.setdefault(family, make(family))


@pytest.fixture(scope="session")
def llama(folder) -> Path:
    return folder("llama")


@pytest.fixture(scope="session")
def engine(llama):
    """The llama model, loaded in this process."""
    from modellink.infer import load
    return load(llama, device="cpu")


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of tokens of each pass that any network computes."""
    from modellink.infer.network import Network
    counts: list[int] = []
    logits = Network.logits

    def count(network: Network, work: Any) -> Any:
        counts.append(work.token_ids.numel())
        return logits(network, work)
    monkeypatch.setattr(Network, "logits", count)
    return counts


@pytest.fixture(scope="session")
def theirs(llama):
    """The same model in transformers."""
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture
def full_logits(theirs) -> Callable[[list[int]], object]:
    """`full_logits(ids)`: log-probabilities [seq, vocabulary] of transformers, in one pass over the sequence.
    """
    import torch

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    return compute


@pytest.fixture
def command(monkeypatch, capsys, request) -> Iterator[Callable[..., SimpleNamespace]]:
    """`command("generate", "--load", ...)` runs in this process: status, out, err."""
    import sys

    from modellink.infer import cli

    def run(*args: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["modellink-infer", *map(str, args)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(status=leaving.value.code, out=out, err=err)
    yield run


@pytest.fixture(scope="module")
def server(engine) -> Iterator[SimpleNamespace]:
    """A server in this process on a port of its own: client, service, port, url."""
    httpx, uvicorn = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from modellink.core.launch import free_port
    from modellink.infer.server.app import make_app
    from modellink.infer.server.service import Service
    service, port = Service(engine, max_waiting=24), free_port()
    app = make_app(service, name="tiny", api_key=None, max_body=100_000)
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        yield SimpleNamespace(client=client, service=service, port=port, url=url)
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not service._thread.is_alive()


@pytest.fixture
def idle_afterwards(server) -> Iterator[None]:
    """Check that the test leaves no request behind."""
    yield
    deadline = time.monotonic() + 20
    while server.service.unfinished and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.service.unfinished == 0 and server.service.failure is None
    assert all(pool.used == 0 for pool in server.service.batch.cache.pools)


@pytest.fixture
def paused(server, monkeypatch) -> Iterator[threading.Event]:
    """The server computes nothing until the test sets this event."""
    resume, step = threading.Event(), server.service.batch.step

    def wait_and_step() -> Any:
        resume.wait()
        return step()
    monkeypatch.setattr(server.service.batch, "step", wait_and_step)
    yield resume
    resume.set()
