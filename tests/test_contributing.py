# SPDX-License-Identifier: Apache-2.0
"""The examples of CONTRIBUTING.md run as written, each as a module of another distribution, and are as short as it says.

A tiny SmolLM3 goes through the family and the format, and is trained by the method from the format's folder; its loss is that of
transformers. The task and the backend score small sets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modellink.data_prep import IndexedWriter
from modellink.eval import Likelihood, evaluate
from modellink.eval.job import prepare
from modellink.eval.prompts import EvalSettings
from modellink.kernels.errors import ModelLinkError

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FILES = dict(re.findall(r"^`([\w./-]+)`:\n\n```(?:python|yaml)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
RECIPES = ("families/smollm3.py", "formats/raw.py", "tasks/cb/task.yaml", "methods/truncated.py", "backends/llama_cpp.py")
LENGTH, VOCABULARY = 24, 131


def example(name: str) -> str:
    """Return the text of the example whose path ends with `name`."""
    (text,) = (text for path, text in FILES.items() if path.endswith(name))
    return text


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution with the family, the format and the method, named by entry points."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("families/smollm3.py", "formats/raw.py", "methods/truncated.py"):
        (folder / f"their_{Path(name).name}").write_text(example(name), "utf-8")
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[modellink.families]\nsmollm3 = their_smollm3\n[modellink.formats]\nraw = their_raw\n"
        "[modellink.methods]\ntruncated = their_truncated:Truncated\n")
    return folder


@pytest.fixture(scope="module")
def command(site: Path) -> Callable[..., str]:
    """`command(module, *words)`: run a command that finds the distribution; its output."""
    def run(module: str, *words: object) -> str:
        done = subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, timeout=300,
                              env=os.environ | {"PYTHONPATH": str(site)})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return run


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny SmolLM3 as a Hugging Face folder, and the model of transformers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SmolLM3Config(
        hidden_size=48, intermediate_size=112, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=20,
        vocab_size=VOCABULARY, max_position_embeddings=64, no_rope_layers=[1, 0, 1, 1], bos_token_id=1, eos_token_id=2,
        pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that positions matter
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("smollm3") / "hf"
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def raw(smollm3: tuple[Path, Any], command: Callable[..., str]) -> Path:
    """The model in the example's format."""
    target = smollm3[0].with_name("raw")
    command("modellink.ckpt_convert", smollm3[0], target, "--to", "raw")
    return target


def test_the_family_and_the_format(smollm3: tuple[Path, Any], raw: Path, command: Callable[..., str], tmp_path: Path) -> None:
    command("modellink.ckpt_convert", raw, tmp_path / "mc", "--to", "megatron-core", "--tp", 2, "--pp", 2)
    command("modellink.ckpt_convert", tmp_path / "mc", tmp_path / "back", "--to", "hf")
    before, after = load_file(smollm3[0] / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    facts = json.loads(command("modellink.ckpt_convert", "inspect", raw, "--json"))
    assert (facts["format"], facts["family"]) == ("raw files", "smollm3")
    assert facts["spec"]["layer_rotary_bases"][1] == 0 and facts["spec"]["layer_rotary_bases"][0] > 0


def test_the_method(smollm3: tuple[Path, Any], raw: Path, command: Callable[..., str], tmp_path: Path) -> None:
    """All samples are alike, so the loss of the first step is that of one sequence."""
    period = torch.randint(3, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(4))
    row = torch.cat([period, period[:1]])
    with IndexedWriter(tmp_path / "same_text_document", np.dtype("u2")) as writer:
        for _ in range(40):
            writer.add_document(period.numpy())
    losses = torch.nn.functional.cross_entropy(smollm3[1](row[None, :-1]).logits[0], row[1:], reduction="none").detach()
    limit = losses.median().item() + 1e-3
    command("modellink.core.cli", "truncated", "--max-token-loss", limit, "--load", raw, "--save", tmp_path / "save",
            "--data-path", tmp_path / "same_text_document", "--split", "100,0,0", "--seq-length", LENGTH, "--eval-iters", 0,
            "--micro-batch-size", 2, "--global-batch-size", 4, "--lr", 1e-3, "--train-iters", 2, "--device", "cpu")
    first, second = map(json.loads, (tmp_path / "save" / "metrics.jsonl").read_text().splitlines())
    kept = losses <= limit
    assert 0 < kept.float().mean() < 1
    assert first["loss"] == pytest.approx((losses * kept).mean().item(), rel=1e-5)
    assert first["metrics"]["kept"] == pytest.approx(kept.float().mean().item())
    assert second["loss"] != first["loss"]


class Sure:
    """A backend that always finds the same word the most likely."""

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": "sure"}

    def loglikelihood(self, requests: Any) -> list[Likelihood]:
        return [Likelihood(-1.0 if request.continuation == " False" else -2.0, False) for request in requests]

    def generate(self, requests: Any) -> Any:
        raise NotImplementedError


def test_the_task(tmp_path: Path) -> None:
    (tmp_path / "cb.yaml").write_text(example("tasks/cb/task.yaml"), "utf-8")
    rows = [{"premise": "It rains.", "hypothesis": "the sun shines", "label": "contradiction", "idx": 0},
            {"premise": "It rains.", "hypothesis": "it is wet", "label": "entailment", "idx": 1}]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job,) = prepare(tmp_path / "cb.yaml", tmp_path, EvalSettings("lm-eval"))
    assert job.questions[0].prompt == "It rains.\nQuestion: the sun shines. True, False, or Neither?\nAnswer:"
    assert [job.questions[0].choices[gold] for question in job.questions for gold in question.golds] == [" False", " True"]
    found = evaluate(tmp_path / "cb.yaml", tmp_path, Sure())["tasks"]["cb"]
    assert (found["accuracy"], found["micro"]["questions"]) == (0.5, 2)


class Completions(BaseHTTPRequestHandler):
    """The completion endpoint of a llama.cpp server, as far as its documentation says: it answers every sum with 5."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/completion" and body["n_predict"] > 0 and body["stop"] and body["prompt"].endswith(" + 3?")
        content = json.dumps({"content": " The answer is 5.", "stop": True}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_the_backend(server: str, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(example("backends/llama_cpp.py"), "utf-8")
    backend = load(tmp_path / "llama_cpp.py").LlamaCpp(server)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(
        json.dumps({"question": f"What is {number} + 3?", "answer": f"A sum.\n#### {number + 3}"}) + "\n" for number in (1, 2)))
    found = evaluate("gsm8k", tmp_path / "data", backend, tmp_path / "out")["tasks"]["gsm8k"]
    assert (found["accuracy"], found["micro"]["unparsed"]) == (0.5, 0)
    with pytest.raises(ModelLinkError, match="returns no likelihoods"):
        backend.loglikelihood([])


def test_the_table_counts_the_lines() -> None:
    rows = re.findall(r"^\| (?:a|an) [\w ]+ \| one[^|]* \| (\d+) \|", TEXT, re.MULTILINE)
    assert list(map(int, rows)) == [example(name).count("\n") for name in RECIPES]
