# SPDX-License-Identifier: Apache-2.0
"""Requests as token ids, with real tokenizers trained here."""

import pydoc_data.topics

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from modellink.data_prep import Tokenizer
from modellink.eval import GenerationRequest, LikelihoodRequest
from modellink.eval.backends.fingerprint import SAMPLE_BYTES, SAMPLES, fingerprint
from modellink.eval.backends.tokens import Encoder, leading_tokens
from modellink.kernels.errors import ModelLinkError

TEXTS = [pydoc_data.topics.topics[name] for name in ("assert", "with", "yield", "numbers")]


def trained(folder, engine, trainer):
    engine.train_from_iterator([*TEXTS, "Answer: A Answer: B Yes No Yes No Yes No"] * 3, trainer)
    engine.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", [
        ("<s>", engine.token_to_id("<s>")), ("</s>", engine.token_to_id("</s>"))])
    engine.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return trained(tmp_path_factory.mktemp("byte"), engine, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>"]))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return trained(tmp_path_factory.mktemp("pieces"), engine, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]))


def texts(tokenizer, ids):
    return [tokenizer.id_to_token(index) for index in ids]


def test_what_stands_before_a_text_is_kept_and_what_stands_after_is_not(byte_level):
    assert texts(byte_level, leading_tokens(byte_level)) == ["<s>"]
    pair = Encoder(byte_level, 100)(LikelihoodRequest("Answer:", " A"))
    assert texts(byte_level, pair.context)[0] == "<s>" and byte_level.decode(pair.context) == "Answer:"
    assert "</s>" not in texts(byte_level, pair.context)


def test_the_continuation_owns_the_blank(byte_level, pieces):
    assert texts(byte_level, Encoder(byte_level, 100)(LikelihoodRequest("Answer:", " A")).continuation) == ["ĠA"]
    assert texts(pieces, Encoder(pieces, 100)(LikelihoodRequest("Answer:", " A")).continuation) == ["▁A"]


def test_alone_takes_the_last_token_as_the_tokenizer_has_it(byte_level, pieces):
    """A sentencepiece token includes the space, a byte-level one does not."""
    for tokenizer, wanted in ((byte_level, "Yes"), (pieces, "▁Yes")):
        own = tokenizer.encode("Yes", add_special_tokens=False)
        pair = Encoder(tokenizer, 100)(LikelihoodRequest("Answer:", "Yes", alone=True))
        assert pair.continuation == own[-1:] and wanted.endswith(tokenizer.id_to_token(own[-1]))


def test_a_token_over_the_boundary_goes_to_neither_side(byte_level):
    """Two halves of a word that is one token: the continuation is then tokenized on its own."""
    words = [token for index in range(byte_level.vocab_size) if (token := byte_level.id_to_token(index)) and token.isalpha()]
    word = next(word for word in words if word.isascii() and len(word) > 3
                and texts(byte_level, byte_level.encode(word, add_special_tokens=False)) == [word])
    pair = Encoder(byte_level, 100)(LikelihoodRequest(word[:2], word[2:]))
    assert pair.context[1:] == byte_level.encode(word[:2], add_special_tokens=False)
    assert pair.continuation == byte_level.encode(word[2:], add_special_tokens=False) != []


def test_a_context_too_long_loses_its_beginning_but_not_the_first_token(byte_level):
    request = LikelihoodRequest(TEXTS[0][:400], " A")
    ids = byte_level.encode(request.context, add_special_tokens=False)
    whole = Encoder(byte_level, len(ids) + 1)(request)
    assert whole.dropped == 0 and whole.context == [*leading_tokens(byte_level), *ids]
    pair = Encoder(byte_level, 21)(request)  # 21 tokens are read: all but the last one
    assert len(pair.context) + len(pair.continuation) - 1 == 21
    assert pair.context == [*leading_tokens(byte_level), *ids[-20:]] and pair.dropped == len(ids) - 20


def test_a_fingerprint_changes_with_name_size_content_and_words(tmp_path):
    path = tmp_path / "weights"
    content = bytearray(range(256)) * 2048  # 512 KiB
    path.write_bytes(content)
    first = fingerprint([path], "float32")
    assert fingerprint([path], "float32") == first != fingerprint([path], "bfloat16")
    assert len(content) > SAMPLES * SAMPLE_BYTES
    for changed in (content + b"x", b"x" + content[1:], content[:-1] + b"x", bytes(len(content))):
        path.write_bytes(changed)
        assert fingerprint([path], "float32") != first
    path.write_bytes(content)
    assert fingerprint([path.rename(tmp_path / "others")], "float32") != first


def test_an_empty_context_is_the_token_before_all_texts(byte_level, tmp_path):
    """As in the harness: the beginning token, or else the end token; a text that has it already keeps one."""
    engine = tokenizers.Tokenizer.from_str(byte_level_text(byte_level))
    engine.post_processor = processors.ByteLevel()
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    encode = Encoder(Tokenizer.from_folder(tmp_path), 100)
    assert encode.leading == [] and encode.tokenizer.bos_token_id is not None
    text = encode.tokenizer.encode("Yes No")
    assert encode(LikelihoodRequest("", "Yes No")) == ([encode.tokenizer.bos_token_id], text, 0)
    assert encode(LikelihoodRequest("", "<s>Yes No")) == ([encode.tokenizer.bos_token_id], text, 0)
    assert encode.prompt(GenerationRequest("", (), 5)) == ([encode.tokenizer.bos_token_id], 0)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    encode = Encoder(Tokenizer.from_folder(tmp_path), 100)
    assert texts(encode.tokenizer, encode(LikelihoodRequest("", "Yes No")).context) == ["</s>"]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelLinkError, match="needs a beginning or end token"):
        Encoder(Tokenizer.from_folder(tmp_path), 100)(LikelihoodRequest("", "Yes"))


def byte_level_text(tokenizer):
    return (tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8")
