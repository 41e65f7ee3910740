# SPDX-License-Identifier: Apache-2.0
"""data-prep and megatron-core write the same bytes and read each other's datasets."""

import json
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from modellink.data_prep import IndexedDataset, IndexedWriter, PreprocessOptions, Tokenizer, preprocess

torch = pytest.importorskip("torch")
indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")

TEXTS = list(pydoc_data.topics.topics.values())[:20]
DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7] * 1000]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_same_bytes_as_megatrons_builder(tmp_path: Path, dtype):
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedWriter(tmp_path / "ours", np.dtype(dtype)) as writer:
        for document in DOCUMENTS:
            writer.add_document(*document)
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_we_read_what_megatron_writes(tmp_path: Path):
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.int32)
    for document in DOCUMENTS:
        tokens = torch.tensor([token for sequence in document for token in sequence])
        builder.add_document(tokens, [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "set.idx"))
    data = IndexedDataset(tmp_path / "set")
    assert [[list(sequence) for sequence in data.document(index)] for index in range(3)] == DOCUMENTS


@pytest.fixture(params=["trained", "SmolLM2"])
def folder(request, tmp_path: Path) -> Path:
    """A byte-level BPE trained on the spot, and a real one."""
    if request.param == "SmolLM2":
        return Path(request.getfixturevalue("smollm2"))
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
        vocab_size=999, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|end|>"]))
    engine.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return tmp_path


def test_megatron_reads_what_preprocess_makes(tmp_path: Path, folder: Path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    preprocess(PreprocessOptions(input=(str(tmp_path / "a.jsonl"),), output_prefix=tmp_path / "set", append_eod=True,
                                 tokenizer_name_or_path=folder), show=False)
    theirs = indexed.IndexedDataset(str(tmp_path / "set_text_document"))
    tokenizer = Tokenizer.from_folder(folder)
    assert len(theirs) == len(TEXTS) and list(theirs.document_indices) == list(range(len(TEXTS) + 1))
    for text, ids in zip(TEXTS, theirs, strict=True):
        assert list(ids) == [*tokenizer.encode(text), tokenizer.eod_token_id]
        assert tokenizer.decode(ids[:-1].tolist()) == text


@pytest.mark.parametrize("pack", [False, True])
def test_megatron_reads_instruction_sets(tmp_path: Path, folder: Path, pack: bool):
    rows = [{"instruction": f"Say {text[:20]}", "output": text[:50 + number]} for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = preprocess(PreprocessOptions(
        input=(str(tmp_path / "a.jsonl"),), output_prefix=tmp_path / "set", tokenizer_name_or_path=folder, pack=pack,
        handler_name="AlpacaStyleInstructionHandler", prompt_type="default", seq_length=256), show=False)
    for name, prefix in summary.outputs.items():
        theirs, ours = indexed.IndexedDataset(prefix), IndexedDataset(prefix)
        assert prefix == str(tmp_path / f"set_{name}_document") and len(theirs) == len(ours) > 0
        assert theirs.index.dtype == np.int32 and list(theirs.document_indices) == list(range(len(ours) + 1))
        assert all((one == other).all() for one, other in zip(theirs, ours, strict=True))
        assert not pack or set(theirs.sequence_lengths) == {256}
