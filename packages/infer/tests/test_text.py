# SPDX-License-Identifier: Apache-2.0
"""Incremental text: complete characters only, no part of a stop string, the same text as decoding at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modellink.data_prep import Tokenizer
from modellink.infer.text import GrowingText

WORDS = st.text(alphabet="abcé机🦊 \n", max_size=40)


@pytest.fixture(scope="module")
def tokenizer(llama) -> Tokenizer:
    return Tokenizer.from_folder(llama)


def grow(tokenizer: Tokenizer, ids: list[int], stops: list[str] = ()) -> tuple[list[str], GrowingText]:
    text = GrowingText(tokenizer, stops)
    pieces = [text.push(index) for index in ids]
    return [*pieces, text.finish()], text


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_pieces_join_to_the_text_and_split_no_character(tokenizer, words):
    pieces, text = grow(tokenizer, tokenizer.encode(words))
    assert "".join(pieces) == text.text == words
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(WORDS, st.text(alphabet="abcé机🦊 ", min_size=1, max_size=4))
def test_a_stop_string_ends_the_text_and_never_shows(tokenizer, words, stop):
    pieces, text = grow(tokenizer, tokenizer.encode(words), [stop])
    assert "".join(pieces) == text.text == words.split(stop)[0]
    assert text.stopped == (stop in words)


@settings(max_examples=200, deadline=None)
@given(WORDS, st.text(alphabet="abc", min_size=2, max_size=4))
def test_no_part_of_a_stop_string_is_ever_shown(tokenizer, words, stop):
    text, shown = GrowingText(tokenizer, [stop]), ""
    for index in tokenizer.encode(words + stop):
        shown += text.push(index)
        assert (words + stop).split(stop)[0].startswith(shown)


@pytest.mark.parametrize(("words", "stops", "expected"), [
    ("one two three", ["two", "three"], "one "), ("aab", ["ab"], "a"), ("abab", ["abb"], "abab"),
    ("ab", ["abc"], "ab"), ("x\n\ny", ["\n\n"], "x"), ("stop", ["stop"], ""), ("a🦊b", ["🦊"], "a")])
def test_stop_strings(tokenizer, words, stops, expected):
    assert grow(tokenizer, tokenizer.encode(words), stops)[1].text == expected


def test_nothing_is_added_after_a_stop_string(tokenizer):
    pieces, text = grow(tokenizer, [*tokenizer.encode("a.b"), *tokenizer.encode("cd")], ["."])
    assert "".join(pieces) == text.text == "a"


def test_without_a_tokenizer_the_text_is_empty():
    text = GrowingText(None)
    assert (text.push(5), text.finish(), text.text) == ("", "", "")
