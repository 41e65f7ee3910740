# SPDX-License-Identifier: Apache-2.0
"""Make hostile and damaged checkpoints: each function turns a copy of a valid one into an attack. `python make.py SOUND TARGET`.

SOUND is a small Llama as a Hugging Face folder (`hf`) and as a Megatron-Core checkpoint (`mc`, one rank, without manifest).
README.md lists what happens with each attack, and ../tests/test_attacks.py checks it. A pickle here requests a call of `touch`
with a file `ran` next to the checkpoint as its argument: harmless, but visible.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK = "iter_0000001/mp_rank_00/model_optim_rng.pt"
Maker = Callable[[Path], None]
ATTACKS: dict[str, tuple[str, Maker]] = {}
"""Name -> (the valid checkpoint it starts from, the change of the copy)."""


def attack(start: str) -> Callable[[Maker], Maker]:
    def note(maker: Maker) -> Maker:
        ATTACKS[maker.__name__.replace("_", "-")] = (start, maker)
        return maker
    return note


class Call:
    """Its pickle requests a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def shell(folder: Path) -> Call:
    return Call(os.system, f"touch {folder.parent / 'ran'}")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    with torch.serialization.safe_globals([Namespace]):
        torch.save(change(torch.load(path)), path)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and keep its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


@attack("mc")
def pickle_in_arguments(folder: Path) -> None:
    edit(folder / RANK, lambda state: state | {"args": shell(folder)})


@attack("mc")
def pickle_for_a_weight(folder: Path) -> None:
    edit(folder / RANK, lambda state: state | {"model": state["model"] | {"decoder.final_layernorm.weight": shell(folder)}})


@attack("hf")
def pickled_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": shell(folder)}, folder / "pytorch_model.bin")


@attack("mc")
def pickled_metadata(folder: Path) -> None:
    shutil.rmtree(folder / "iter_0000001/mp_rank_00")
    (folder / "iter_0000001/.metadata").write_bytes(pickle.dumps(shell(folder)))


@attack("hf")
def code_in_the_folder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_llama.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.Model"}}))
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch ran') }}")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@attack("hf")
def hundred_million_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10 ** 8)


@attack("hf")
def hundred_million_experts(folder: Path) -> None:
    edit_config(folder, model_type="mixtral", num_local_experts=10 ** 8, num_experts_per_tok=2)


@attack("hf")
def hundred_million_heads(folder: Path) -> None:
    edit_config(folder, num_attention_heads=10 ** 8, num_key_value_heads=10 ** 8, head_dim=2)


@attack("hf")
def layer_types_of_another_length(folder: Path) -> None:
    edit_config(folder, model_type="gemma2", query_pre_attn_scalar=8, sliding_window=4, layer_types=["full_attention"] * 99)


@attack("hf")
def index_that_leaves_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@attack("hf")
def incomplete_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@attack("hf")
def header_of_a_terabyte(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


@attack("hf")
def header_with_overlaps(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = (name for name in list(header)[-2:])
        header[second]["data_offsets"] = header[first]["data_offsets"]
    edit_header(folder / "model.safetensors", change)


@attack("hf")
def header_with_negative_offsets(folder: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header["model.norm.weight"].update(data_offsets=[-80, 0]))


@attack("hf")
def header_of_a_thousand_brackets(folder: Path) -> None:
    text = b'{"a":' + b"[" * 200_000
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


@attack("hf")
def tensor_that_nobody_knows(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["model.layers.0.backdoor.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    edit_header(folder / "model.safetensors", change)


@attack("mc")
def compressed_record(folder: Path) -> None:
    path = folder / RANK
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)


@attack("mc")
def record_beyond_its_file(folder: Path) -> None:
    path = folder / RANK
    data = path.read_bytes()
    last = data.rindex(b"PK\x01\x02")  # the directory entry of archive/version; the last tensor's is before it
    entry = data.rindex(b"PK\x01\x02", 0, last)
    path.write_bytes(data[:entry + 42] + (1 << 30).to_bytes(4, "little") + data[entry + 46:])


@attack("mc")
def strides_that_reach_elsewhere(folder: Path) -> None:
    class Lying:
        def __reduce__(self) -> Any:
            four = torch.zeros(4).untyped_storage()
            storage = torch.storage.TypedStorage(wrap_storage=four, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1 << 20, 20), (20, 1), False, {})
    edit(folder / RANK, lambda state: state | {"model": {"decoder.final_layernorm.weight": Lying()}})


@attack("mc")
def pickle_without_end(folder: Path) -> None:
    """A list nested a hundred thousand times."""
    body = io.BytesIO()
    body.write(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with zipfile.ZipFile(folder / RANK, "w") as new:
        new.writestr("archive/data.pkl", body.getvalue())


def make(name: str, sound: Path, target: Path) -> Path:
    """Make the attack as a folder in `target`, and return it."""
    start, maker = ATTACKS[name]
    folder = target / name / "checkpoint"
    shutil.copytree(sound / start, folder)
    maker(folder)
    return folder


if __name__ == "__main__":
    for name in ATTACKS:
        print(make(name, Path(sys.argv[1]), Path(sys.argv[2])))
