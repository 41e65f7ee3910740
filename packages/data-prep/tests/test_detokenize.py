# SPDX-License-Identifier: Apache-2.0
"""Streaming decode: chunks add up to the full text, characters are never split, and the work per token is constant."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.data_prep import StreamDecoder


def pieces_of(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.push(index) for index in ids] + [decoder.finish()]


@pytest.mark.parametrize("text", [
    "Hello, world", "你好，世界", "a🙂b👩‍👩‍👧🙂", " leading and  double ", "naïve\n\n\tend\n", "", " ", "\ufffd literal \ufffd"])
def test_pieces_add_up(byte_tokenizer, piece_tokenizer, text):
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        ids = tokenizer.encode(text)
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_whole_with_its_last_byte(byte_tokenizer):
    ids = byte_tokenizer.encode("a🙂b")
    assert len(ids) == 6  # four bytes for the smiley
    assert pieces_of(byte_tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_text_before_an_unfinished_character_is_not_held_back(byte_tokenizer):
    ids = [*byte_tokenizer.encode("x"), *byte_tokenizer.encode("🙂")[:2]]
    assert pieces_of(byte_tokenizer, ids) == ["x", "", "", "\ufffd"]


def test_spaces_between_pieces(piece_tokenizer):
    ids = piece_tokenizer.encode("the list of the list")
    assert [piece for piece in pieces_of(piece_tokenizer, ids) if piece.startswith(" ")]
    assert "".join(pieces_of(piece_tokenizer, ids)) == "the list of the list"


def test_special_tokens(byte_tokenizer):
    ids = byte_tokenizer.encode("<|im_start|>a<|im_end|>")
    assert "".join(pieces_of(byte_tokenizer, ids)) == "a"
    assert "".join(pieces_of(byte_tokenizer, ids, skip_special_tokens=False)) == "<|im_start|>a<|im_end|>"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_add_up_to_what_decode_makes(byte_tokenizer, piece_tokenizer, data):
    """Also id sequences that no text encodes to: lone bytes, special tokens in the middle of a character."""
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        some = st.integers(0, tokenizer.vocab_size - 1) | st.integers(3, 258) | st.integers(0, 2)  # bytes and special tokens
        ids = data.draw(st.lists(some, max_size=120))
        for skip in (True, False):
            assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("count", range(28, 48))
def test_a_character_after_many_bytes_that_are_none(byte_tokenizer, count):
    """The window is cut in the middle of them, and once in the middle of the character."""
    lone = byte_tokenizer.encode("🙂")[1]
    ids = [lone] * count + byte_tokenizer.encode("🙂a é", add_special_tokens=False)
    assert "".join(pieces_of(byte_tokenizer, ids)) == byte_tokenizer.decode(ids) == "\ufffd" * count + "🙂a é"


@pytest.mark.parametrize("unit", ["word ", "🙂", "\\xff"])
def test_the_work_a_token_costs_does_not_grow(byte_tokenizer, piece_tokenizer, monkeypatch, unit):
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        lone = next(index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]) == "\ufffd")
        ids = [lone] * 1000 if unit == "\\xff" else tokenizer.encode(unit * 400)
        decoded = 0

        def count(some, skip_special_tokens=True, real=tokenizer.decode):
            nonlocal decoded
            some = list(some)
            decoded += len(some)
            return real(some, skip_special_tokens)

        monkeypatch.setattr(tokenizer, "decode", count)
        pieces_of(tokenizer, ids)
        monkeypatch.undo()
        assert decoded < 40 * len(ids)
