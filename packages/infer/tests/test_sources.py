# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint format gives the same tokens, whatever layout it was written at."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest

from modellink.ckpt_convert import convert
from modellink.infer import load
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.parallel import ParallelLayout


def megatron(source: Path, path: Path) -> Path:
    convert(source, path, to="megatron-core", layout=ParallelLayout(tp=2, pp=3),
            make_vocab_size_divisible_by=8)
    return path


def legacy(source: Path, path: Path) -> Path:
    convert(source, path, to="megatron-legacy", layout=ParallelLayout(tp=2, pp=3),
            make_vocab_size_divisible_by=8)
    return path


def trained(source: Path, path: Path) -> Path:
    """Write a torch-dist checkpoint by one training step with learning rate 0."""
    from modellink.core import processes
    from modellink.core.api import train
    from modellink.core.prepare.prepare import prepare
    from modellink.data_prep import IndexedWriter
    from modellink.kernels.options import Layer
    prefix = path.with_name("tokens")
    with IndexedWriter(prefix, numpy.dtype("uint16")) as writer:
        for start in range(40):
            writer.add_document(numpy.arange(start, start + 50))
    run = prepare("pretrain", [Layer("test", {
        "load": str(source), "save": str(path), "data_path": (str(prefix),), "seq_length": 16,
        "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1, "lr": 0.0, "min_lr": 0.0,
        "eval_iters": 0, "split": "100,0,0", "device": "cpu"})], 1)
    processes.join(run.device, run.layout, run.optimizer.seed)
    train(run)
    return path


@pytest.mark.parametrize("make", [megatron, legacy, trained])
def test_every_format_gives_the_same_tokens(engine, llama, prompts, tmp_path, make):
    expected = engine.generate(prompts, max_new_tokens=20)
    other = load(make(llama, tmp_path / "checkpoint"), device="cpu")
    assert other.plan.source.format == {megatron: "Megatron-Core", legacy: "Megatron-Legacy",
                                        trained: "torch-dist"}[make]
    assert other.generate(prompts, max_new_tokens=20) == expected


def test_an_earlier_iteration_can_be_loaded(engine, llama, prompts, tmp_path):
    folder = megatron(llama, tmp_path / "checkpoint")
    (first,) = folder.glob("iter_*")
    shutil.copytree(first, folder / "iter_0000009")
    for path in (folder / "iter_0000009").rglob("*.pt"):
        path.write_bytes(b"")  # a damaged later iteration
    (folder / "latest_checkpointed_iteration.txt").write_text("9")
    number = int(first.name.removeprefix("iter_"))
    assert load(folder, device="cpu", iteration=number).generate(prompts,
                                                                 max_new_tokens=5) == engine.generate(
        prompts, max_new_tokens=5)
    with pytest.raises(ModelLinkError, match="no iterations"):
        load(llama, device="cpu", iteration=number)


@pytest.mark.parametrize(("layout", "message", "fix"), [
    (ParallelLayout(tp=3), "does not divide the 2 query groups", "use 1 or 2"),
    (ParallelLayout(pp=2), "3 layers cannot be split evenly", "use 1 or 3 stages"),
    (ParallelLayout(dp=2), "cannot run at DP 2", "keep the other sizes at 1"),
    (ParallelLayout(ep=2, dp=2), "cannot run at EP 2 x DP 2", "at 1")])
def test_an_unsupported_layout_is_refused_with_a_fix(llama, layout, message, fix):
    with pytest.raises(ModelLinkError, match=message) as refusal:
        load(llama, layout=layout, device="cpu")
    assert fix in str(refusal.value)


def test_an_unsupported_dtype_is_refused(llama):
    with pytest.raises(ModelLinkError, match="cannot run in int8"):
        load(llama, dtype="int8", device="cpu")


def test_without_a_tokenizer_token_ids_still_work(engine, llama, tmp_path):
    for path in llama.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = load(tmp_path, device="cpu")
    (completion,) = bare.generate([5, 6, 7], max_new_tokens=5)
    assert completion.token_ids == engine.generate([5, 6, 7], max_new_tokens=5, ignore_eos=True)[0].token_ids
    assert completion.text == ""
    for prompt in ("a text", [{"role": "user", "content": "a chat"}]):
        with pytest.raises(ModelLinkError, match="needs a tokenizer"):
            bare.generate(prompt)
    named = load(tmp_path, device="cpu", tokenizer=llama)
    assert named.generate("The", max_new_tokens=5) == engine.generate("The", max_new_tokens=5)
