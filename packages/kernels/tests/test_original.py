# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original, translated to our options."""

from __future__ import annotations

import pytest

from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import translate

TABLE = {
    "--geglu": {"as": "--gated --activation gelu"}, "--scale-emb": {"values": 1, "as": "--scale {}"},
    "--kind": {"values": 1, "choices": {"a": "--pre", "b": ""}}, "--ranks": {"values": 9, "ignored": "not needed"},
    "--plain": {"as": "--no-a", "place": "first"}, "--sure": {"as": "--c", "place": "last"},
    "--twice": {"values": 1, "as": "--size {}", "of": {"product": "--lr"}, "refused": "no --lr"},
    "--flash": {"ignored": "always"}, "--mask": {"values": 1, "ignored": "always causal", "only": ["causal"], "fix": "remove it"},
    "--before": {"values": 1, "ignored": "all", "least": ["--seq", 8], "fix": "remove it"},
    "--norm": {"ignored": "always", "with": ["--latent"], "fix": "remove it"},
    "--fp8": {"refused": "no such numbers", "fix": "remove it"}}


@pytest.mark.parametrize(("given", "made"), [
    (["--lr", "1", "x"], ["--lr", "1", "x"]),
    (["--geglu", "--lr", "1"], ["--gated", "--activation", "gelu", "--lr", "1"]),
    (["--scale-emb", "12", "--scale-emb=3"], ["--scale", "12", "--scale", "3"]),
    (["--scale_emb", "12"], ["--scale", "12"]),
    (["--kind", "a", "--kind", "b"], ["--pre"]),
    (["--kind", "a", "--sure", "--lr", "1", "--plain"], ["--no-a", "--lr", "1", "--pre", "--c"]),
    (["--twice", "3", "--lr", "1.5"], ["--size", "4.5", "--lr", "1.5"]),
    (["--ranks", "0", "1", "2", "--flash", "--lr", "1"], ["--lr", "1"]),
    (["--mask", "causal", "--before", "8", "--norm", "--latent"], ["--latent"]),
    (["--before=16", "--seq=16"], ["--seq=16"])])
def test_flags_are_translated(given, made):
    assert translate(given, TABLE) == made


def test_what_is_ignored_is_said(capsys):
    translate(["--flash"], TABLE)
    assert capsys.readouterr().err == "note: --flash is ignored: always\n"


@pytest.mark.parametrize(("given", "message"), [
    (["--fp8"], "no such numbers"), (["--kind", "c"], "known: a, b"), (["--kind"], "''"),
    (["--mask", "full"], "--mask full would change the result"), (["--norm"], "--norm would change the result"),
    (["--before", "7"], "--before 7 would change"), (["--before", "15", "--seq", "16"], "change the result"),
    (["--before"], "--before would change the result")])
def test_what_is_not_done_is_an_error(given, message):
    with pytest.raises(ModelLinkError) as caught:
        translate(given, TABLE)
    assert message in str(caught.value)
