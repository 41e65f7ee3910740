# SPDX-License-Identifier: Apache-2.0
"""Tokenizer engines: equal ids if two libraries read the same vocabulary, and the choice of a library with its reason."""

import base64
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

from modellink.data_prep import IndexedDataset, PreprocessOptions, Tokenizer, chat_format, from_messages, preprocess
from modellink.kernels.errors import ModelLinkError

HAS = {name: importlib.util.find_spec(name) is not None for name in ("gigatoken", "sentencepiece", "tiktoken", "transformers")}
TEXTS = ["", "a", " two  spaces ", "naïve 你好 🙂\n\ttab", "x" * 500, "1234567 + 89", "def f(x):\n    return x"]
CHAT = [{"role": "user", "content": "Hi </s><|im_end|> 你好"}, {"role": "assistant", "content": "Yo"}]


def needs(name):
    return pytest.mark.skipif(not HAS[name], reason=f"{name} is not installed")


@pytest.fixture
def run(corpus, byte_folder, tmp_path):
    def run(name="out", **options):
        values = {"input": (str(corpus),), "output_prefix": tmp_path / name / "set", "tokenizer_name_or_path": byte_folder}
        return preprocess(PreprocessOptions(**values | options), show=False)
    return run


@needs("gigatoken")
def test_gigatoken_is_chosen_where_it_agrees_and_changes_no_byte(run, snapshot, tmp_path, piece_folder):
    for number, options in enumerate(({}, {"tokenizer_name_or_path": piece_folder, "append_eod": True})):
        fast = run(f"fast{number}", verify_tokenizer=True, workers=2, piece_size=0.1, **options)
        slow = run(f"slow{number}", tokenizer_backend="tokenizers", **options)
        assert fast.backend.startswith("gigatoken ") and fast.backend_why == "it gives the same ids as tokenizers here"
        assert slow.backend.startswith("tokenizers ") and slow.backend_why == "--tokenizer-backend asks for it"
        assert snapshot(tmp_path / f"fast{number}") == snapshot(tmp_path / f"slow{number}")


@needs("gigatoken")
def test_gigatoken_is_not_chosen_where_it_differs(run, monkeypatch):
    from modellink.data_prep.engines.gigatoken import Fast

    encode = Fast.encode_flat
    monkeypatch.setattr(Fast, "encode_flat", lambda self, texts, *more: encode(
        self, [text.replace("part", "prat").replace("he", "eh") for text in texts], *more))
    summary = run()
    assert summary.backend.startswith("tokenizers ") and summary.backend_why.startswith("gigatoken differs at token")
    with pytest.raises(ModelLinkError, match="gigatoken cannot be used"):
        run("asked", tokenizer_backend="gigatoken")


@needs("gigatoken")
def test_the_sample_is_spread_over_all_inputs(run, monkeypatch, tmp_path, write_lines):
    """A difference in the middle of the second file is found before anything is written."""
    from modellink.data_prep.engines.gigatoken import GigaToken

    rows = [{"text": f"{number} " + "plain words " * 2000} for number in range(200)]
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "b.jsonl", [*rows[:80], *([{"text": "odd words " * 2000}] * 80), *rows[160:]])
    seen: list[str] = []
    monkeypatch.setattr(GigaToken, "difference", lambda self, texts: seen.extend(texts) or "")
    run(input=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    assert sum(text.startswith("odd ") for text in seen) >= 2
    assert sum(map(len, seen)) < 2 << 20


@needs("gigatoken")
@pytest.mark.parametrize("parallel", [False, True])
def test_one_core_and_all_give_the_same(byte_folder, parallel):
    from modellink.data_prep.engines.gigatoken import GigaToken

    engine = GigaToken(byte_folder, parallel=parallel)
    ids, lengths = engine.encode_flat(TEXTS, wrap=True)
    assert np.split(ids, np.cumsum(lengths)[:-1])[4].tolist() == engine.encode_batch(TEXTS, wrap=True)[4]
    assert lengths.tolist() == [len(ids) for ids in engine.encode_batch(TEXTS, wrap=True)]
    assert len(engine.encode_flat([], wrap=True)[0]) == 0


@needs("gigatoken")
def test_every_document_is_compared_when_asked(run, monkeypatch):
    from modellink.data_prep.engines.gigatoken import GigaToken

    monkeypatch.setattr(GigaToken, "difference", lambda self, texts: "")
    monkeypatch.setattr(GigaToken, "_compare", lambda self, texts, flat, wrap: "at token 3")
    with pytest.raises(ModelLinkError, match="gigatoken and tokenizers differ: at token 3"):
        run(verify_tokenizer=True)


@needs("gigatoken")
def test_pieces_made_without_comparing_are_not_used_when_it_is_asked(run):
    for first, then, used in ((False, True, False), (True, True, True), (True, False, True)):
        name = f"{first} {then}"
        run(name, piece="0/2", piece_size=0.1, verify_tokenizer=first)
        assert bool(run(name, piece_size=0.1, verify_tokenizer=then).pieces_found_done) == used


@needs("gigatoken")
def test_what_gigatoken_remembers_is_thrown_away(byte_folder, monkeypatch):
    monkeypatch.setattr("modellink.data_prep.engines.gigatoken.GROWN", -1 << 40)
    engine = Tokenizer.from_folder(byte_folder, "gigatoken").engine
    before = engine.fast._inner
    first, _ = engine.encode_flat(["a b c" * 30], wrap=True)
    assert engine.fast._inner is not before and (engine.encode_flat(["a b c" * 30], wrap=True)[0] == first).all()


def test_without_the_extra_tokenizers_is_used(run, monkeypatch):
    monkeypatch.setattr("modellink.data_prep.plan.find_spec", lambda name: None)
    summary = run()
    assert summary.backend.startswith("tokenizers ") and summary.backend_why == "gigatoken is not installed"


def test_conversations_do_not_use_gigatoken(run, tmp_path, write_lines):
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    summary = run(input=(str(path),), handler_name="AlpacaStyleInstructionHandler", prompt_type="qwen")
    assert summary.backend_why == "conversations are tokenized in short parts"


def test_another_library_is_another_run(run, monkeypatch, tmp_path):
    """Parts made by another library or version are not used."""
    def stop(*_, **__):
        raise RuntimeError

    with pytest.raises(RuntimeError), monkeypatch.context() as broken:
        broken.setattr(sys.modules["modellink.data_prep.preprocess"], "_join", stop)
        run(tokenizer_backend="tokenizers", piece_size=0.1)
    monkeypatch.setattr("modellink.data_prep.engines.huggingface.HuggingFace.name", "tokenizers 0.0.1")
    assert run(tokenizer_backend="tokenizers", piece_size=0.1).pieces_found_done == 0


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory, texts):
    """A sentencepiece model like LLaMA's, trained here."""
    module = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(texts[:20]))
    module.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def test_sentencepiece_files(sentencepiece_folder, run, tmp_path, corpus):
    module = pytest.importorskip("sentencepiece")
    theirs = module.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    assert tokenizer.backend.startswith("sentencepiece ") and len(tokenizer.engine.raw_bytes) == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 700)
    for text in TEXTS:
        assert tokenizer.encode(text, False) == theirs.encode(text) and tokenizer.encode(text)[0] == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a</s>b", False) == [*theirs.encode("a"), 2, *theirs.encode("b")]
    summary = run(tokenizer_name_or_path=sentencepiece_folder, append_eod=True)
    first = json.loads(corpus.read_text().splitlines()[0])["text"]
    assert IndexedDataset(tmp_path / "out" / "set_text_document")[0].tolist() == [1, *theirs.encode(first), 2]
    assert "tokenizer.model" in summary.backend_why


def test_templates_over_sentencepiece(sentencepiece_folder):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    encoded = chat_format(tokenizer, "llama2").encode(from_messages(CHAT))
    assert sum(tokenizer.is_special(index) for index in encoded.ids) == 2  # bos and eos of the template, none of the text
    assert tokenizer.decode(encoded.turns[0].target, skip_special_tokens=False) == "Yo</s>"
    assert "</s><|im_end|>" in tokenizer.decode(encoded.turns[0].source)


ADDED = {"700": {"content": "<|im_end|>", "special": True}, "701": {"content": "<think>", "special": False},
         "1": {"content": "<s>", "special": True}}


@pytest.mark.parametrize("files", [
    {"tokenizer_config.json": {"eos_token": "<|im_end|>", "added_tokens_decoder": ADDED}},
    {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 700, "<think>": 701}}])
def test_tokens_added_to_a_sentencepiece_model(sentencepiece_folder, tmp_path, files):
    shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
    bare = Tokenizer.from_folder(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.token_to_id("<think>")) == (702, 700, 701)
    assert tokenizer.id_to_token(700) == "<|im_end|>" and tokenizer.fingerprint != bare.fingerprint
    ids = tokenizer.encode("a<|im_end|><think>b", False)
    assert ids == [*bare.encode("a", False), 700, 701, *bare.encode("b", False)]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|><think>b"
    is_word = "added_tokens_decoder" in files["tokenizer_config.json"]  # nothing in added_tokens.json says so
    assert tokenizer.decode(ids) == ("a<think>b" if is_word else "a b")
    encoded = chat_format(tokenizer, "chatml_de").encode(from_messages(CHAT))
    said = tokenizer.encode_literal("<|im_end|><think>")
    assert 700 not in said and (701 in said) == is_word
    assert encoded.turns[0].target[-1] == 700 and encoded.turns[0].source.count(700) == 2  # of system and question


def test_what_sentencepiece_adds_is_part_of_the_fingerprint(sentencepiece_folder, tmp_path):
    before = Tokenizer.from_folder(sentencepiece_folder).fingerprint
    shutil.copytree(sentencepiece_folder, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer.from_folder(tmp_path).fingerprint != before  # and a checkpoint's folder hf/ is found
    (tmp_path / "hf" / "added_tokens.json").write_text('{"a": "b"}')
    with pytest.raises(ModelLinkError, match="not a mapping of strings to ids"):
        Tokenizer.from_folder(tmp_path)


@pytest.fixture
def tiktoken_folder(tmp_path):
    """A .tiktoken file of bytes and a few merges."""
    folder = tmp_path / "tiktoken"
    folder.mkdir()
    pieces = [bytes([byte]) for byte in range(256)] + [b"he", b" t", b"in", b" th", b" the"]
    (folder / "qwen.tiktoken").write_text("".join(
        f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


@needs("tiktoken")
def test_tiktoken_files(tiktoken_folder):
    tokenizer = Tokenizer.from_folder(tiktoken_folder)
    assert tokenizer.backend.startswith("tiktoken ") and tokenizer.vocab_size == 261 + 208
    assert tokenizer.eos_token_id == 263 and tokenizer.encode("in the<|im_end|>") == [258, 260, 263]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    encoded = chat_format(tokenizer, "qwen").encode(from_messages(CHAT))
    assert sum(index == 263 for index in encoded.ids) == 3  # system, question, answer; not the one in the question's text
    (tiktoken_folder / "qwen.tiktoken").rename(tiktoken_folder / "other.tiktoken")
    with pytest.raises(ModelLinkError, match="neither a split pattern nor control tokens"):
        Tokenizer.from_folder(tiktoken_folder)
    (tiktoken_folder / "other.tiktoken").write_text("not base64\n")
    with pytest.raises(ModelLinkError, match="not a token and its rank"):
        Tokenizer.from_folder(tiktoken_folder)


@needs("transformers")
def test_slow_tokenizers_of_transformers(sentencepiece_folder, tmp_path, byte_folder):
    import transformers

    state = json.loads((byte_folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>",
        "unk_token": "<|endoftext|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=False)
    assert tokenizer.backend.startswith("transformers ")
    assert all(tokenizer.encode(text) == theirs.encode(text) for text in TEXTS)
    assert tokenizer.eos_token_id == 2
    encoded = chat_format(tokenizer, "chatml").encode(from_messages(CHAT))
    assert sum(index == 2 for index in encoded.ids) == 2


@pytest.mark.parametrize(("file", "name"), [("tokenizer.model", "sentencepiece"), ("a.tiktoken", "tiktoken"),
                                            ("vocab.json", "transformers")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, file, name):
    (tmp_path / file).write_text("{}")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelLinkError, match=f"needs the library {name}") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.fix == f"install modellink-data-prep[{name}]"


def test_broken_files_of_other_libraries_are_named(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ModelLinkError, match="not a sentencepiece model"):
        Tokenizer.from_folder(tmp_path)
