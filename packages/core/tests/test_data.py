# SPDX-License-Identifier: Apache-2.0
"""Which samples a run sees: every one once, in an order that depends on the seed and not on the layout."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy
import pytest
from ranks import beside

write_documents = beside(__file__, "conftest").write_documents
CONFIG = {"seq_length": 24, "micro_batch_size": 2}


def first_tokens(prefixes: tuple[str, ...], dp: int, consumed: int, passes: int, seed: int = 1, vocab_size: int = 131,
                 cache: str | None = None, split: str = "90,10,0",
                 trained: tuple[int, ...] = (40,), evaluated: int = 4) -> list[list[list[int]]]:
    """On a rank: the tokens of the first passes of every data-parallel rank, in the order of the samples."""
    import torch

    from modellink.core.config import DataConfig
    from modellink.core.data.pretrain import build_datasets, micro_batches

    config = DataConfig(data_path=prefixes, data_cache_path=Path(cache) if cache else None, split=split, **CONFIG)
    train, _, test = build_datasets(config, trained=trained, evaluated=evaluated, seed=seed, vocab_size=vocab_size)
    assert test is None
    feeds = [micro_batches(train, config, consumed=consumed, dp_rank=rank, dp=dp, vocab_size=vocab_size,
                           device=torch.device("cpu")) for rank in range(dp)]
    found = []
    for _ in range(passes):
        for feed in feeds:
            batch = next(feed)
            assert batch.tokens[:, 1:].equal(batch.labels[:, :-1]) and batch.loss_mask.all()
            found += batch.tokens.tolist()
    return found


def test_the_order_does_not_depend_on_the_ranks(pools, corpus):
    (one,) = pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=6)
    (three,) = pools(1)(first_tokens, prefixes=(str(corpus),), dp=3, consumed=0, passes=2)
    assert one == three
    (later,) = pools(1)(first_tokens, prefixes=(str(corpus),), dp=2, consumed=4, passes=2)
    assert later == one[4:]


def test_all_ranks_read_the_index_that_the_first_one_builds(pools, corpus, tmp_path):
    found = [pools(2)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=6, cache=str(tmp_path / "cache"))
             for _ in ("built", "read")]
    assert found[0] == found[1] and found[0][0] == found[0][1]


def test_the_seed_mixes(pools, corpus):
    runs = [pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=6, seed=seed)[0] for seed in (1, 2)]
    assert runs[0] != runs[1]


def test_a_blend_draws_from_each_by_weight(pools, corpus, tmp_path):
    other = tmp_path / "low_text_document"
    pools(1)(write_low, prefix=str(other))
    (rows,) = pools(1)(first_tokens, prefixes=("0.25", str(other), "0.75", str(corpus)), dp=1, consumed=0, passes=20,
                       cache=str(tmp_path / "cache"))
    low = sum(max(row) < 3 for row in rows)
    assert low == 10 and len(rows) == 40


def test_a_longer_run_keeps_the_order_and_has_another_behind_it(pools, corpus):
    one, longer, other = (pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=passes, trained=trained)[0]
                          for passes, trained in ((3, (6,)), (20, (6, 34)), (20, (1000,))))
    assert longer[:6] == one and other[:6] != one
    assert len({tuple(row) for row in longer[6:]}) > 17 and longer[6:12] != one


def test_data_replaced_under_its_name_is_noticed(pools, tmp_path):
    """The sample index is cached by file name, and rebuilt when the files change."""
    prefix, kept = tmp_path / "words_text_document", str(tmp_path / "cache")
    pools(1)(write_documents, prefix=str(prefix), seed=1, vocab_size=131, documents=50)
    before = pools(1)(first_tokens, prefixes=(str(prefix),), dp=1, consumed=0, passes=6, cache=kept)
    assert pools(1)(first_tokens, prefixes=(str(prefix),), dp=1, consumed=0, passes=6, cache=kept) == before
    pools(1)(write_documents, prefix=str(prefix), seed=2, vocab_size=131, documents=50)
    after, rebuilt = (pools(1)(first_tokens, prefixes=(str(prefix),), dp=1, consumed=0, passes=6, cache=folder)
                   for folder in (kept, str(tmp_path / "another")))
    assert after == rebuilt != before
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the index of the replaced data is gone


class Payload:
    """Pickled, a command that creates a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("attack", ["pickle", "array of objects", "truncated", "empty", "beyond the data", "no marker"])
def test_a_sample_index_is_checked_or_built_again(pools, corpus, tmp_path, attack):
    """megatron-core reads its index with allow_pickle: numpy unpickles a file that is no array, and elements that are objects."""
    kept, low = str(tmp_path / "cache"), tmp_path / "low_text_document"
    pools(1)(write_low, prefix=str(low))
    blend = ("0.5", str(corpus), "0.5", str(low))

    def read():
        return pools(1)(first_tokens, prefixes=blend, dp=1, consumed=0, passes=6, cache=kept)

    before = read()
    (folder,) = (tmp_path / "cache").iterdir()
    files = sorted(folder.glob("*.npy"))
    whole = {path: path.read_bytes() for path in files}
    assert len(files) == 2 * 3 * 2 + 2 * 2  # training and validation of two sets, and their blends
    for path in files if attack != "no marker" else ():
        if attack == "array of objects":
            numpy.save(path, numpy.array([Payload(tmp_path / "made")], dtype=object), allow_pickle=True)
        elif attack == "beyond the data":
            array = numpy.load(path)
            array.flat[-1] = 30000
            numpy.save(path, array)
            assert read() == before and path.read_bytes() == whole[path]
        else:
            path.write_bytes({"pickle": pickle.dumps(Payload(tmp_path / "made")), "truncated": whole[path][:-1],
                              "empty": b""}[attack])
    sizes = {path.name: path.stat().st_size for path in folder.glob("*[!e]") if path.suffix in (".npy", ".txt")}
    marker = folder / "modellink.complete"
    marker.write_text(json.dumps({"files": sizes}))  # an attacker writes it too
    if attack == "no marker":
        marker.unlink()
    assert read() == before and not (tmp_path / "made").exists()
    assert {path: path.read_bytes() for path in files} == whole and list((tmp_path / "cache").iterdir()) == [folder]


@pytest.mark.parametrize("point", ["after-write", "before-rename"])
def test_a_kill_while_the_index_is_built_leaves_nothing_behind(pools, corpus, tmp_path, point):
    kept = tmp_path / "cache"
    before = pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=2, cache=str(kept))
    (folder,) = kept.iterdir()
    folder.rename(unfinished := folder.with_name(folder.name + ".tmp"))
    if point == "after-write":
        (unfinished / "modellink.complete").unlink()
        next(unfinished.glob("*.npy")).write_bytes(b"")
    assert pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=2, cache=str(kept)) == before
    assert list(kept.iterdir()) == [folder]


def write_low(prefix: str) -> None:
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for _ in range(30):
        builder.add_item(torch.arange(60) % 3)
        builder.end_document()
    builder.finalize(prefix + ".idx")


def test_a_token_the_model_does_not_have_is_refused(pools, corpus):
    with pytest.raises(AssertionError, match="outside the model's vocabulary of 100"):
        pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=6, vocab_size=100)


def test_a_share_without_a_document_is_none(pools, corpus, tmp_path):
    few = tmp_path / "few_text_document"
    pools(1)(write_low, prefix=str(few))
    for split, evaluated in (("999,1,0", 0), ("999,1,0", 2), ("999,1", 2), ("99,1,1", 2)):
        (rows,) = pools(1)(first_tokens, prefixes=(str(few),), dp=1, consumed=0, passes=1, split=split, evaluated=evaluated)
        assert len(rows) == 2
    with pytest.raises(AssertionError, match="the training share has none of the 30 documents"):
        pools(1)(first_tokens, prefixes=(str(few),), dp=1, consumed=0, passes=1, split="1,999,0")


def test_evaluation_does_not_change_the_order_of_training(pools, corpus):
    with_and_without = [pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=40, split="178,21,1",
                                 evaluated=evaluated) for evaluated in (0, 2)]
    assert with_and_without[0] == with_and_without[1]


def test_a_folder_that_cannot_hold_the_order_is_named(pools, corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AssertionError, match=r"(?s)the sample index cannot be built: .*Not a directory.*--data-cache-path"):
        pools(1)(first_tokens, prefixes=(str(corpus),), dp=1, consumed=0, passes=1, cache=str(tmp_path / "file/cache"))
