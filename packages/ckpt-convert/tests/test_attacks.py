# SPDX-License-Identifier: Apache-2.0
"""Every hostile checkpoint of `../attacks`: one message, exit status 2, nothing executed, nothing written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from modellink.ckpt_convert import convert

FOLDER = Path(__file__).parents[1] / "attacks"
spec = importlib.util.spec_from_file_location("attacks_make", FOLDER / "make.py")
assert spec is not None and spec.loader is not None
attacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attacks)
HARMLESS = ("pickle-in-arguments", "code-in-the-folder")  # the conversion does not need the hostile part
MESSAGES = dict(re.findall(r"^\| `([\w-]+)` \|.*\| `(.+)` \|$", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
"""Attack -> the text that the message must contain, from README.md."""


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_an_attack(name: str, make_model: Callable[..., Path], run: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    make_model("llama", name="sound-hf")
    sound.mkdir()
    (tmp_path / "sound-hf").rename(sound / "hf")
    (sound / "hf/modeling_evil.py").unlink()
    convert(sound / "hf", sound / "mc", to="megatron-core")
    (sound / "mc/modellink.json").unlink()
    (sound / "mc/iter_0000001/modellink.complete").unlink()
    folder = attacks.make(name, sound, tmp_path / "made")
    done = run([folder, tmp_path / "out", "--to", "hf", "--tokenizer-name-or-path", sound / "hf"])
    assert not list(tmp_path.rglob("ran"))
    if name in HARMLESS:
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / "out").glob("*.py"))
        shutil.rmtree(tmp_path / "out")
    else:
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert MESSAGES[name] in done.stderr
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_the_readme_lists_every_attack() -> None:
    assert MESSAGES.keys() == attacks.ATTACKS.keys(), json.dumps(sorted(MESSAGES.keys() ^ attacks.ATTACKS.keys()))
