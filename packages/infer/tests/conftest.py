"""Small random models with a small real tokenizer; transformers writes the folders and is what we compare with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog; the dog does not mind, and the fox goes home.",
    "Schöne Grüße aus Köln: Straße, Fähre, Übermut. Ça va déjà mieux, garçon?",
    "机器学习是人工智能的一个分支。模型从数据中学习。", "日本語の文章もあります。絵文字: 🦊🐶🌍 🦊🐶🌍",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3"]
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
VOCABULARY = 379
# No two sizes alike: heads and groups, head size and hidden / heads, feed-forward width and 4 x hidden.
SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
         "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {"llama": ("LlamaConfig", {"head_dim": 20}), "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
            "mistral": ("MistralConfig", {"head_dim": 20, "sliding_window": 40})}
# Of many lengths, with characters of one to four bytes.
PROMPTS = ["The", "The quick brown fox jumps over the lazy dog", "Köln: 机器学习", "🦊", "def add(a, b):\n    return",
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
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHATML)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder(family)`: a Hugging Face folder of a random model in which every weight counts and choices are not close."""
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
    """The llama model, in this process."""
    from modellink.infer import load
    return load(llama, device="cpu")


@pytest.fixture(scope="session")
def theirs(llama):
    """The same model in transformers."""
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture
def full_logits(theirs) -> Callable[[list[int]], object]:
    """`full_logits(ids)`: log-probabilities [seq, vocabulary] of one pass of transformers over a whole sequence."""
    import torch

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    return compute


@pytest.fixture
def command(monkeypatch, capsys, request) -> Iterator[Callable[..., SimpleNamespace]]:
    """`command("generate", "--load", ...)` in this process: status, out, err."""
    import sys

    from modellink.infer import cli

    def run(*args: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["modellink-infer", *map(str, args)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(status=leaving.value.code, out=out, err=err)
    yield run
