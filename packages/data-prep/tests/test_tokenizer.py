# SPDX-License-Identifier: Apache-2.0
"""Ids, special tokens and templates from folders of transformers 4 and 5, and errors."""

import json
from pathlib import Path

import pytest

from modellink.data_prep import Tokenizer
from modellink.kernels.errors import ModelLinkError


def test_text_survives_the_way_there_and_back(byte_tokenizer, piece_tokenizer, texts):
    for text in [*texts[:10], "naïve 你好 🙂\n\ttab", " two  spaces "]:
        assert byte_tokenizer.decode(byte_tokenizer.encode(text)) == text
        assert piece_tokenizer.decode(piece_tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(piece_tokenizer, texts):
    assert piece_tokenizer.encode_batch(texts[:5]) == [piece_tokenizer.encode(text) for text in texts[:5]]
    assert piece_tokenizer.encode_batch(["a b"], add_special_tokens=False) == [piece_tokenizer.encode("a b", False)]


def test_bos_is_added_only_when_asked(piece_tokenizer):
    with_bos, without = piece_tokenizer.encode("a"), piece_tokenizer.encode("a", add_special_tokens=False)
    assert with_bos == [1, *without]


def test_special_tokens_as_transformers_5_writes_them(byte_tokenizer):
    assert (byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id, byte_tokenizer.pad_token_id) == (1, 2, 0)
    assert byte_tokenizer.id_to_token(byte_tokenizer.eod_token_id) == "<|im_end|>"
    assert byte_tokenizer.eos_token_ids == (2, 0)  # the tokenizer's own first, then those of generation_config.json


def test_special_tokens_as_transformers_4_writes_them(piece_tokenizer):
    assert piece_tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (piece_tokenizer.bos_token_id, piece_tokenizer.eos_token_id) == (1, 2)
    assert piece_tokenizer.pad_token_id == 2  # a missing pad token is the eos token


@pytest.mark.parametrize(("file", "value"), [("config.json", 2), ("generation_config.json", [2, 0])])
def test_special_tokens_that_only_the_model_knows(tmp_path, byte_folder, file, value):
    (tmp_path / "tokenizer.json").write_bytes((byte_folder / "tokenizer.json").read_bytes())
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value, "bos_token_id": 1}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer.special_tokens == {}


def test_vocabulary_counts_added_tokens(byte_tokenizer):
    assert byte_tokenizer.vocab_size == len(byte_tokenizer) == 701
    assert byte_tokenizer.id_to_token(700) is not None and byte_tokenizer.id_to_token(701) is None


def test_special_tokens_are_left_out_when_asked(byte_tokenizer):
    ids = byte_tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert byte_tokenizer.decode(ids) == "hello"
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_the_fingerprint_is_of_the_file(byte_folder, byte_tokenizer, piece_tokenizer):
    assert byte_tokenizer.fingerprint == Tokenizer.from_folder(byte_folder).fingerprint != piece_tokenizer.fingerprint


def test_templates_by_name(byte_tokenizer, piece_tokenizer):
    assert list(byte_tokenizer.chat_templates) == ["default"]
    assert piece_tokenizer.chat_template(tools=True).startswith("{{ tools")
    assert piece_tokenizer.chat_template("default") == byte_tokenizer.chat_template()
    with pytest.raises(ModelLinkError, match="no chat template 'rag'"):
        piece_tokenizer.chat_template("rag")


def test_the_file_wins_over_the_configuration(tmp_path, piece_folder):
    for path in piece_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_folder(tmp_path).chat_template() == "from the file"


def test_a_padding_setting_in_the_file_changes_nothing(tmp_path, byte_folder, byte_tokenizer):
    state = json.loads((byte_folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    text = "a text of more than nine tokens, surely, in any vocabulary"
    assert Tokenizer.from_folder(tmp_path).encode(text) == byte_tokenizer.encode(text)


def test_a_checkpoint_of_ours_carries_its_tokenizer(tmp_path, byte_folder, byte_tokenizer):
    (tmp_path / "hf").symlink_to(byte_folder)
    assert Tokenizer.from_folder(tmp_path).fingerprint == byte_tokenizer.fingerprint


def test_wrong_folders_are_named(tmp_path: Path):
    with pytest.raises(ModelLinkError, match="tokenizer folder does not exist"):
        Tokenizer.from_folder(tmp_path / "absent")
    with pytest.raises(ModelLinkError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ModelLinkError, match="not a tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.where == tmp_path / "tokenizer.json"


def test_same_ids_as_transformers(byte_folder, piece_folder, texts):
    transformers = pytest.importorskip("transformers")
    for folder in (byte_folder, piece_folder):
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        ours = Tokenizer.from_folder(folder)
        assert len(theirs) == len(ours)
        assert theirs(texts[:10])["input_ids"] == ours.encode_batch(texts[:10])
