# SPDX-License-Identifier: Apache-2.0
"""The command: wrong input ends with status 2, one message and nothing written; the original's spellings; what it prints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file
from states import load_state

from modellink.ckpt_convert import open_checkpoint
from modellink.ckpt_convert.cli import modellink_convert
from modellink.kernels.original import original_flags

Make = Callable[..., Path]
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """refused(source, *arguments): the message of a conversion that must not write anything."""

    def call(source: Path, *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = run([source, tmp_path / "made" / "out", *arguments])
        assert done.returncode == 2, done.stderr
        assert done.stdout == "" and "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr

    return call


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"where: {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere", "--to", "megatron-core")


def test_truncated_safetensors(refused: Callable[..., str], make_model: Make) -> None:
    path = make_model("llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refused(path.parent, "--to", "megatron-core")
    assert "not a complete safetensors file" in message and str(path) in message


@pytest.mark.parametrize("damage", ["missing shard", "escaping index", "ghost entry", "no map", "not json"])
def test_damaged_index(damage: str, refused: Callable[..., str], run: Run, make_model: Make, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    assert run([make_model("llama"), folder, "--to", "hf", "--max-shard-size", "0.00003"]).returncode == 0
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if damage == "missing shard":
        next(folder.glob("model-00002-*")).unlink()
        assert "model-00002-of-" in refused(folder, "--to", "megatron-core")
        return
    if damage == "escaping index":
        shutil.copy(folder / index["weight_map"]["model.norm.weight"], tmp_path / "elsewhere.safetensors")
        index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    elif damage == "ghost entry":
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    index = {} if damage == "no map" else index
    path.write_text("{" if damage == "not json" else json.dumps(index))
    expected = {"escaping index": "not a file name of this folder", "ghost entry": "model.norm.weight is not in",
                "no map": "no weight_map", "not json": "not a JSON file"}[damage]
    assert expected in refused(folder, "--to", "megatron-core")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--to", "megatron-core", "--tp", "2"], "does not divide the 3 query groups (of 6 attention heads)"),
    (["--to", "megatron-core", "--pp", "3"], "4 layers cannot be split evenly into 3 pipeline stages"),
    (["--to", "megatron-core", "--pp", "2", "--num-layer-list", "1,2"], "the layer list 1,2"),
    (["--to", "megatron-core", "--pp", "2", "--num-layers-per-virtual-pipeline-stage", "3"],
     "into chunks of 3 layers for 2 stages"),
    (["--to", "hf", "--tp", "3"], "has no parallel layout"),
    (["--to", "gguf"], "--to is 'gguf', it must be one of hf, megatron-core"),
    (["--to", "mcore"], "did you mean megatron-core?"),
    (["--to", "huggingface"], "did you mean hf?"),
    (["--to", "megatron-cor"], "did you mean megatron-core"),
    (["--to", "hf", "--params-dtype", "bfloat16"], "did you mean bf16?"),
    (["--to", "hf", "--itertion", "3"], "did you mean --iteration?"),
    (["--to", "hf", "--tp"], "--tp needs a value"),
    (["--to", "megatron-core", "--tp", "two"], "--tensor-model-parallel-size is 'two', it must be a whole number"),
    (["a", "b", "--to", "hf"], "unexpected argument"),
    (["--to", "hf", "--tensor-parallel", "2"], "unknown option"),
    (["--to", "hf", "--params-dtype", "int8"], "--params-dtype"),
    (["--tp", "1"], "the format of the output must be given"),
    (["--to", "hf", "--load-model-type", "mg"], "the source is a Hugging Face checkpoint"),
    (["--to", "hf", "--model-type-hf", "qwen2"], "of the family llama, not qwen2"),
    (["--to", "hf", "--save-dir", "x"], "DST is given twice"),
])
def test_wrong_options(arguments: list[str], message: str, refused: Callable[..., str], make_model: Make) -> None:
    assert message in refused(make_model("llama"), *arguments)


def test_values_too_large_for_half_precision(run: Run, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.tensor(1e6)
    save_file(tensors, source / "model.safetensors")
    done = run([source, tmp_path / "out", "--to", "hf", "--params-dtype", "fp16"])
    assert done.returncode == 2 and "decoder.final_layernorm.weight has values too large for torch.float16" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 65504.0, 65519.0])
def test_values_that_half_precision_has(value: float, run: Run, make_model: Make, tmp_path: Path) -> None:
    """Infinities are kept, and rounding to the largest number is not an overflow."""
    source = make_model("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, source / "model.safetensors")
    assert run([source, tmp_path / "out", "--to", "hf", "--params-dtype", "fp16"]).returncode == 0
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].nan_to_num(nan=7),
                       tensors["model.norm.weight"].half().nan_to_num(nan=7))
    tensors["model.norm.weight"][4] = 65520.0
    save_file(tensors, source / "model.safetensors")
    assert run([source, tmp_path / "again", "--to", "hf", "--params-dtype", "fp16"]).returncode == 2


def test_an_output_that_exists(run: Run, make_model: Make, content: Callable[[Path], dict[str, bytes]], tmp_path: Path) -> None:
    source = make_model("llama")
    assert run([source, tmp_path / "out", "--to", "megatron-core"]).returncode == 0
    before = content(tmp_path)
    done = run([source, tmp_path / "out", "--to", "hf"])
    assert done.returncode == 2 and "the output exists" in done.stderr and "--overwrite" in done.stderr
    inside = run([source, source / "out", "--to", "megatron-core"])
    assert inside.returncode == 2 and "inside the other" in inside.stderr
    over = run([source, source, "--to", "megatron-core", "--overwrite"])
    assert over.returncode == 2 and "inside the other" in over.stderr
    assert content(tmp_path) == before
    assert run([source, tmp_path / "out", "--to", "hf", "--overwrite"]).returncode == 0
    assert (tmp_path / "out/model.safetensors").exists() and not (tmp_path / "out/modellink.json").exists()


def test_a_half_written_checkpoint_is_passed_over(run: Run, make_model: Make, tmp_path: Path) -> None:
    run([make_model("llama"), tmp_path / "mc", "--to", "megatron-core"])
    (tmp_path / "mc/iter_0000009").mkdir()
    (tmp_path / "mc/latest_checkpointed_iteration.txt").write_text("9")
    done = run([tmp_path / "mc", tmp_path / "back", "--to", "hf", "--verify", "--no-verify-model"])
    assert done.returncode == 0 and "skipped iter_0000009" in done.stderr
    assert "verified 27 tensors, all bit-equal" in done.stdout


def test_dry_run_writes_nothing(run: Run, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    done = run([source, tmp_path / "out", "--to", "megatron-core", "--tp", "3", "--pp", "2", "--dry-run"])
    assert done.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert "iter_0000001/mp_rank_02_001/model_optim_rng.pt" in done.stdout
    assert "6 files, 81 tensors, " in done.stdout and "free on the disk; peak memory about" in done.stdout


def test_inspect(run: Run, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "mc", "--to", "megatron-core", "--tp", "3", "--pp", "2"])
    text = run([tmp_path / "mc", "--inspect"])
    assert text.returncode == 0 and "Megatron-Core, TP 3 x PP 2, iteration 1" in text.stdout
    facts = json.loads(run([tmp_path / "mc", "--inspect", "--json"]).stdout)
    assert facts["spec"]["num_query_groups"] == 3 and len(facts["files"]) == 6
    assert facts["tensors"]["decoder.layers.3.mlp.linear_fc1.weight"] == {"shape": [72, 20], "dtype": "float32", "bytes": 5760}
    assert facts["tensors"] == json.loads(run([source, "--inspect", "--json"]).stdout)["tensors"]


def test_a_script_of_the_original(run: Run, make_model: Make, tmp_path: Path) -> None:
    """The option set of the original's example scripts, in both directions; the way back writes SAVE_DIR/mg2hf."""
    source = make_model("qwen2")
    there = run(["--use-mcore-models", "--model-type", "GPT", "--load-model-type", "hf", "--save-model-type", "mg",
                 "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "3", "--num-layer-list", "1,1,2",
                 "--add-qkv-bias", "--load-dir", source, "--save-dir", tmp_path / "mg", "--model-type-hf", "llama2",
                 "--tokenizer-model", source / "tokenizer.json", "--params-dtype", "bf16"])
    assert there.returncode == 0, there.stderr
    assert "note: --tokenizer-model is ignored" in there.stderr
    checkpoint = open_checkpoint(tmp_path / "mg")
    assert checkpoint.describe() == "Megatron-Core, TP 2 x PP 3, bfloat16, iteration 1"
    assert checkpoint.layout.num_layer_list == (1, 1, 2)
    back = run(["--model-type", "GPT", "--load-model-type", "mg", "--save-model-type", "hf", "--target-tensor-parallel-size", "1",
                "--target-pipeline-parallel-size", "1", "--add-qkv-bias", "--load-dir", tmp_path / "mg", "--save-dir", source])
    assert back.returncode == 0, back.stderr
    assert open_checkpoint(source / "mg2hf").spec == open_checkpoint(source).spec


FLAGS = [
    "--model-type", "--loader", "--load-model-type", "--saver", "--load-dir", "--save-dir", "--max-queue-size",
    "--no-checking", "--model-type-hf", "--true-vocab-size", "--vocab-file", "--tokenizer-model", "--megatron-path",
    "--w-pack", "--add-qkv-bias", "--add-dense-bias", "--params-dtype", "--make-vocab-size-divisible-by",
    "--use-mcore-models", "--post-norm", "--moe-grouped-gemm", "--embed-layernorm", "--lora-target-modules",
    "--lora-load", "--lora-r", "--lora-alpha", "--load-from-legacy", "--target-tensor-parallel-size",
    "--target-pipeline-parallel-size", "--save-model-type", "--num-layers-per-virtual-pipeline-stage",
    "--target-expert-parallel-size", "--num-layer-list", "--save-to-legacy", "--target-expert-model-parallel-size",
    "--expert-model-parallel-size"]


def test_every_flag_of_the_original_is_known() -> None:
    ours = {name for parameter in modellink_convert.params for name in parameter.opts}
    table = original_flags("modellink.ckpt_convert")
    assert not set(FLAGS) - ours - table.keys()
    assert not ours & table.keys()


def test_a_script_of_the_originals_old_loader(run: Run, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    there = run(["--model-type", "GPT", "--loader", "llama2_hf", "--saver", "megatron", "--target-tensor-parallel-size", "3",
                 "--w-pack", "True", "--load-dir", source, "--save-dir", tmp_path / "mg", "--save-model-type", "megatron",
                 "--tokenizer-model", source / "tokenizer.model", "--true-vocab-size", "131"])
    assert there.returncode == 0, there.stderr
    assert open_checkpoint(tmp_path / "mg").describe() == "Megatron-Legacy, TP 3, float32, iteration 1"
    back = run(["--model-type", "GPT", "--loader", "megatron", "--saver", "megatron", "--save-model-type",
                "save_huggingface_llama", "--load-dir", tmp_path / "mg", "--save-dir", source])
    assert back.returncode == 0 and "note: the output is" in back.stderr
    assert run(["diff", source, source / "mg2hf"]).stdout == "27 tensors, all bit-equal\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model-type", "BERT", "--save-model-type", "hf"], "--model-type is 'BERT'"),
    (["--save-model-type", "ggml"], "--save-model-type is 'ggml'"),
    (["--to", "hf", "--lora-load", "adapter"], "the adapter's folder is missing"),
    (["--to", "hf", "--true-vocab-size", "130"], "the vocabulary size of the model is 131"),
])
def test_what_a_script_may_not_ask_for(arguments: list[str], message: str, refused: Callable[..., str], make_model: Make) -> None:
    assert message in refused(make_model("llama"), *arguments)


def test_diff(run: Run, make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    run([source, tmp_path / "mc", "--to", "megatron-core", "--tp", "3", "--pp", "2"])
    same = run(["diff", source, tmp_path / "mc"])
    assert same.returncode == 0 and same.stdout == "27 tensors, all bit-equal\n"
    path = tmp_path / "mc/iter_0000001/mp_rank_02_001/model_optim_rng.pt"
    state = load_state(path)
    state["model"]["decoder.layers.1.mlp.linear_fc2.weight"][4, 5] += 1
    torch.save(state, path)
    (tmp_path / "mc/iter_0000001/modellink.complete").write_text('{"files": {}}')
    other = run(["diff", source, tmp_path / "mc"])
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert other.stdout == f"decoder.layers.3.mlp.linear_fc2.weight: 1 values differ, by at most 1, first at [4, 29] ({path})\n"
    larger = make_model("llama", name="larger", intermediate_size=42)
    found = run(["diff", source, larger]).stdout
    assert "ffn_hidden_size: 36 and 42" in found and "decoder.layers.0.mlp.linear_fc2.weight: [20, 36] and [20, 42]" in found
    half = make_model("llama", name="half", dtype=torch.bfloat16)
    assert "decoder.final_layernorm.weight: torch.float32 and torch.bfloat16" in run(["diff", source, half]).stdout


def test_inspect_a_checkpoint_that_does_not_name_its_model(run: Run, make_model: Make, tmp_path: Path) -> None:
    run([make_model("llama"), tmp_path / "mc", "--to", "megatron-core", "--tp", "3", "--pp", "2"])
    assert "family llama" in run(["inspect", tmp_path / "mc"]).stdout
    (tmp_path / "mc/modellink.json").unlink()
    shutil.rmtree(tmp_path / "mc/hf")
    (tmp_path / "mc/iter_0000001/modellink.complete").unlink()
    text = run(["inspect", tmp_path / "mc"])
    assert text.returncode == 0, text.stderr
    assert "of an unknown model, TP 3 x PP 2" in text.stdout and "num_query_groups = 3" in text.stdout
    facts = json.loads(run(["inspect", tmp_path / "mc", "--json"]).stdout)
    assert facts["tensors"]["decoder.layers.1.mlp.linear_fc2.weight"]["shape"] == [20, 12] and len(facts["files"]) == 6


def test_the_command_as_a_user_starts_it(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama")
    script = Path(sys.executable).with_name("modellink-convert")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "modellink.ckpt_convert"]
    arguments = [*command, source, tmp_path / "out", "--to", "hf", "--verify", "--no-verify-model"]
    good = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert good.returncode == 0 and "verified 27 tensors, all bit-equal" in good.stdout
    bad = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and bad.stderr.startswith("error: the output exists\n")
