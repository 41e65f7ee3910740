# SPDX-License-Identifier: Apache-2.0
"""Command lines of the original's preprocess_data.py: every flag is an option, or is ignored or refused with a reason."""

from __future__ import annotations

import pytest

from modellink.data_prep.cli import preprocess_command
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.original import original_flags, translate

TABLE = original_flags("modellink.data_prep")
OPTIONS = {name for option in preprocess_command.params for name in (*option.opts, *option.secondary_opts)}
GIVEN = {"--input": "a.jsonl", "--output-prefix": "out/a", "--tokenizer-name-or-path": "hf"}
FLAGS = GIVEN | {
    "--handler-name": "AlpacaStyleInstructionHandler", "--streaming": "", "--hf-datasets-params": "p.json", "--datasets": "a b",
    "--json-keys": "text title", "--json-key": "text", "--split-sentences": "", "--keep-newlines": "", "--prompt-type": "qwen",
    "--interleave-probs": "0.5,0.5", "--mix-strategy": "concat", "--dataset-dir": "data", "--overwrite-cache": "",
    "--max-samples": "5", "--seed": "7", "--cache-dir": "cache", "--map-keys": '{"prompt":"question"}', "--pack": "",
    "--tokenizer-type": "PretrainedFromHF", "--tokenizer-not-use-fast": "", "--vocab-file": "v", "--merge-file": "m",
    "--append-eod": "", "--seq-length": "4096", "--make-vocab-size-divisible-by": "8", "--pad-vocab-size-to": "512",
    "--dataset-impl": "mmap", "--workers": "4", "--n-subs": "4", "--log-interval": "1000"}
"""With a value each; --merge-group-keys makes it another command (test_command.py)."""


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_an_option_or_is_answered(flag, capsys):
    words = [flag, *FLAGS[flag].split()]
    about = TABLE.get(flag, {})
    assert (flag in OPTIONS) != bool(about)
    if "refused" in about:
        with pytest.raises(ModelLinkError, match=f"{flag} is not supported") as caught:
            translate(words, TABLE)
        assert caught.value.fix
        return
    required = [word for name, value in GIVEN.items() if name != flag for word in (name, value)]
    context = preprocess_command.make_context("modellink-preprocess", translate(words + required, TABLE))
    given = {name: value for name, value in context.params.items() if value not in (None, ())}
    assert bool(capsys.readouterr().err) == ("ignored" in about)
    assert len(given) == 3 + (flag in OPTIONS and flag not in GIVEN)  # a value that follows is not taken for something else


def test_every_flag_in_the_table_is_one_of_the_originals():
    assert set(TABLE) <= set(FLAGS)


def test_a_script_of_the_original(command, write_lines, byte_folder, tmp_path):
    """The arguments of one of its data_convert scripts for instructions."""
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(6)]
    script = f"""--input {write_lines(tmp_path / "alpaca.jsonl", rows)} --tokenizer-name-or-path {byte_folder}
        --output-prefix finetune_dataset/alpaca --workers 1 --log-interval 1000 --tokenizer-type PretrainedFromHF
        --handler-name AlpacaStyleInstructionHandler --prompt-type qwen --seq-length 128 --append-eod --overwrite-cache
        --tokenizer-not-use-fast --cache-dir ./cache --map-keys {{"prompt":"instruction","query":"input","response":"output"}}"""
    done = command(*script.split())
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "finetune_dataset").glob("*.idx")} == {
        f"alpaca_packed_{field}_document.idx" for field in ("input_ids", "attention_mask", "labels")}
    notes = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("note: ") and "ignored" in line]
    assert notes == ["--log-interval", "--overwrite-cache", "--tokenizer-not-use-fast", "--cache-dir"]
