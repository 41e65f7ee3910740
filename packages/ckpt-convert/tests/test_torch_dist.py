# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints: layers separate or stacked, tensors in chunks, padded vocabularies, hostile metadata."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tiny_models import make_folder, spec_of
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from modellink.ckpt_convert import convert, open_checkpoint
from modellink.ckpt_convert.manifest import Manifest, write_companions
from modellink.ckpt_convert.megatron.distributed import refuse_unknown_names
from modellink.ckpt_convert.weights import weights
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.files import mark_complete
from modellink.kernels.parallel import ParallelLayout

Make = Callable[..., Path]


def canonical(source: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(source)
    return {name: checkpoint.read(name, [range(weight.shape[0])], 0) for name, weight in weights(checkpoint.spec).items()}


def stack(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Stack layers along a leading axis, as Megatron-Core saves equal layers."""
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.layers.")}
    for name in tensors:
        if name.startswith("decoder.layers.0."):
            rest = name.removeprefix("decoder.layers.0.")
            found[f"decoder.layers.{rest}"] = torch.stack([tensors[f"decoder.layers.{i}.{rest}"] for i in range(layers)])
    return found


def pad(tensors: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.cat([tensor, torch.zeros(rows, tensor.shape[1])]) if "embedding" in name or "output" in name else tensor
            for name, tensor in tensors.items()}


def finish(root: Path, source: Path) -> None:
    mark_complete(root / "iter_0000010")
    opened = open_checkpoint(source)
    write_companions(root, Manifest(opened.family, opened.spec, "float32"), opened.companions)
    (root / "latest_checkpointed_iteration.txt").write_text("10")


def write_chunked(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    """Split every tensor along its first axis into `files` files, in the format of torch.distributed.checkpoint."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {"rng_state/shard_0.0_1": BytesStorageMetadata(), "decoder.x._extra_state": BytesStorageMetadata()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    handles = [open(folder / f"__{number}_0.distcp", "wb") for number in range(files)]
    for name, tensor in tensors.items():
        chunks, start = [], 0
        for file, piece in enumerate(tensor.chunk(files)):
            offsets = torch.Size([start] + [0] * (tensor.dim() - 1))
            body = io.BytesIO()
            torch.save(piece.clone(), body)
            handle = handles[file]
            places[MetadataIndex(name, offsets)] = _StorageInfo(f"__{file}_0.distcp", handle.tell(), len(body.getvalue()))
            handle.write(body.getvalue())
            chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            start += len(piece)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    for handle in handles:
        handle.close()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, {}, places)))


@pytest.mark.parametrize("form", ["saved by torch", "stacked", "chunks", "stacked chunks", "prefixed", "fused norm names"])
def test_to_hugging_face(form: str, make_model: Make, tmp_path: Path) -> None:
    source = make_model("qwen2", tie_word_embeddings=form == "chunks")
    tensors = canonical(source)
    if "stacked" in form:
        tensors = stack(tensors, 4)
    if form == "prefixed":
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    if form == "fused norm names":
        tensors = {name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
                   .replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): tensor for name, tensor in tensors.items()}
    tensors = pad(tensors, 5) | {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(3)}
    folder = tmp_path / "dist/iter_0000010"
    if "chunks" in form:
        write_chunked(folder, tensors, 3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    finish(tmp_path / "dist", source)
    convert(tmp_path / "dist", tmp_path / "back", to="hf", verify=True)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("ran",)


def test_metadata_for_another_reader_names_only_what_is_known(tmp_path: Path) -> None:
    """`refuse_unknown_names` is called before megatron-core, which unpickles the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.zeros(3), "b": 1}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    refuse_unknown_names(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": Evil()}, {}, None)))
    with pytest.raises(ModelLinkError, match=r"the metadata names builtins.print"):
        refuse_unknown_names(tmp_path)


class Asks:
    """Pickled as getattr(what, name), as some versions of Python pickle the member of an enum."""

    def __init__(self, what: Any, name: str) -> None:
        self.asked = what, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_an_attribute_is_taken_of_a_known_enum_alone(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": Asks(WriteItemType, "TENSOR")}, {}, None)))
    refuse_unknown_names(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": Asks(WriteItemType, "__subclasses__")}, {}, None)))
    with pytest.raises(ModelLinkError, match=r"planner.WriteItemType.__subclasses__, which a checkpoint does not need"):
        refuse_unknown_names(tmp_path)


@pytest.fixture
def chunked(make_model: Make, tmp_path: Path) -> Path:
    """A valid checkpoint in two files, not yet marked complete."""
    write_chunked(tmp_path / "dist/iter_0000010", canonical(make_model("llama")), 2)
    return tmp_path / "dist"


def test_a_missing_chunk(chunked: Path, tmp_path: Path) -> None:
    path = chunked / "iter_0000010/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    finish(chunked, tmp_path / "hf")
    with pytest.raises(ModelLinkError, match=r"decoder.final_layernorm.weight should have the shape \[20\].*10 were found"):
        open_checkpoint(chunked)


def test_a_file_that_was_cut_off(chunked: Path, tmp_path: Path) -> None:
    path = chunked / "iter_0000010/__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    finish(chunked, tmp_path / "hf")
    with pytest.raises(ModelLinkError, match="the file has"):
        open_checkpoint(chunked)


def test_metadata_must_not_point_elsewhere(chunked: Path, tmp_path: Path) -> None:
    path = chunked / "iter_0000010/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    finish(chunked, tmp_path / "hf")
    with pytest.raises(ModelLinkError, match="not a file name of this folder"):
        open_checkpoint(chunked)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}, {}, None))])
def test_damaged_metadata(content: bytes, chunked: Path, tmp_path: Path) -> None:
    (chunked / "iter_0000010/.metadata").write_bytes(content)
    finish(chunked, tmp_path / "hf")
    with pytest.raises(ModelLinkError, match=r"\.metadata"):
        open_checkpoint(chunked)


def test_a_checkpoint_of_another_model(chunked: Path, make_model: Make) -> None:
    finish(chunked, make_model("llama", name="other", intermediate_size=42))
    with pytest.raises(ModelLinkError, match=r"decoder.layers.0.mlp.linear_fc1.weight has the shape"):
        open_checkpoint(chunked)
    manifest = json.loads((chunked / "modellink.json").read_text())
    assert manifest["spec"]["ffn_hidden_size"] == 42


@pytest.mark.parametrize("model", ["llama tied", "gpt2", "mixtral", "qwen2_moe", "deepseek_v2"])
def test_written_and_read_again(model: str, tmp_path: Path) -> None:
    before = make_folder(tmp_path / "hf", *spec_of(model))
    convert(tmp_path / "hf", tmp_path / "dist", to="torch-dist", max_shard_bytes=50_000, verify=True)
    refuse_unknown_names(tmp_path / "dist/iter_0000001")
    assert len(list((tmp_path / "dist/iter_0000001").glob("__*_0.distcp"))) > 1
    convert(tmp_path / "dist", tmp_path / "mc", to="megatron-core", layout=ParallelLayout(tp=2))
    convert(tmp_path / "mc", tmp_path / "again", to="torch-dist", max_shard_bytes=50_000)
    for path in (tmp_path / "dist/iter_0000001").glob("*.distcp"):
        assert path.read_bytes() == (tmp_path / "again/iter_0000001" / path.name).read_bytes()
    convert(tmp_path / "again", tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    """Equal layers are one tensor with a leading axis, and so are the experts of a layer."""
    for model, stacked, shape in [("mixtral", "decoder.layers.mlp.experts.experts.linear_fc2.weight", (4, 4, 20, 36)),
                                  ("deepseek_v2", "decoder.layers.3.mlp.experts.experts.linear_fc2.weight", (4, 24, 14))]:
        make_folder(tmp_path / f"{model}-hf", *spec_of(model))
        convert(tmp_path / f"{model}-hf", tmp_path / model, to="torch-dist")
        state = {stacked: torch.empty(shape, dtype=torch.bfloat16)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / model / "iter_0000001"), no_dist=True)
        source = open_checkpoint(tmp_path / f"{model}-hf")
        expected = torch.stack([source.read(f"decoder.layers.3.mlp.experts.local_experts.{expert}.linear_fc2.weight",
                                            [range(shape[-2])], 0) for expert in range(4)])
        assert torch.equal(state[stacked][3] if len(shape) == 4 else state[stacked], expected)
