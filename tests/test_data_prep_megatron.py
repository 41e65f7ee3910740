"""data-prep and megatron-core write the same bytes and read each other's datasets."""

import json
import os
from pathlib import Path

import numpy as np
import pydoc_data.topics
import pytest
from modellink.data_prep import IndexedDataset, IndexedWriter, PreprocessOptions, Tokenizer, preprocess

torch = pytest.importorskip("torch")
indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")

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
        builder.add_document(torch.tensor(sum(document, [])), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "set.idx"))
    data = IndexedDataset(tmp_path / "set")
    assert [[list(sequence) for sequence in data.document(index)] for index in range(3)] == DOCUMENTS


def test_megatron_reads_what_preprocess_makes(tmp_path: Path):
    """With the real SmolLM2 tokenizer where MODELLINK_SMOLLM2 names its folder."""
    folder = os.environ.get("MODELLINK_SMOLLM2")
    if not folder:
        pytest.skip("MODELLINK_SMOLLM2 names no model folder")
    texts = list(pydoc_data.topics.topics.values())[:20]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(PreprocessOptions(input=(str(tmp_path / "a.jsonl"),), output_prefix=tmp_path / "set", append_eod=True,
                                 tokenizer_name_or_path=Path(folder)), show=False)
    theirs = indexed.IndexedDataset(str(tmp_path / "set_text_document"))
    tokenizer = Tokenizer.from_folder(folder)
    assert len(theirs) == len(texts) and list(theirs.document_indices) == list(range(len(texts) + 1))
    for text, ids in zip(texts, theirs, strict=True):
        assert list(ids) == [*tokenizer.encode(text), tokenizer.eod_token_id]
        assert tokenizer.decode(ids[:-1].tolist()) == text
