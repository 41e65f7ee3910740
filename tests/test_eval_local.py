# SPDX-License-Identifier: Apache-2.0
"""modellink-eval with modellink-infer: the likelihood of every choice equals that of transformers, on one rank and on two.

The model is `eval_model` of conftest.py, the questions are those of the quickstart.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from modellink.eval import EvalSettings, cli
from modellink.eval.job import prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("modellink.infer")

DATA = Path(__file__).resolve().parent.parent / "examples" / "quickstart" / "eval-data"
TASKS = ("boolq", "mmlu")
LONGEST = 475  # tokens; half of the prompts with five examples are longer


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*args: object) -> Done:
    """Run the command in this process, so that megatron is imported only once."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["modellink-eval", "run", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as leaving:
            cli.main()
    finally:
        sys.argv = before
    return Done(int(leaving.value.code or 0), out.getvalue(), err.getvalue())


def start(*args: object, **environment: str) -> Done:
    """Run the command in a new process."""
    program = Path(sys.executable).with_name("modellink-eval")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "modellink.eval.cli"]
    done = subprocess.run([*command, "run", *map(str, args)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    return Done(done.returncode, done.stdout, done.stderr)


def by_hand(model: Any, tokenizer: Any, question: Any) -> list[float]:
    """Return the log-probabilities of the choices of a question, each in its own pass over the full text."""
    context = tokenizer(question.prompt).input_ids
    assert context[0] == tokenizer.bos_token_id
    found = []
    for choice in question.choices:
        if question.alone:
            own = tokenizer(choice, add_special_tokens=False).input_ids[-1:]
        else:
            own = tokenizer(question.prompt + choice).input_ids[len(context):]
        ids = context + own
        if len(ids) - 1 > LONGEST:
            ids = [ids[0], *ids[len(ids) - LONGEST:]]
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logprobs[len(ids) - len(own) - 1 + place, token]) for place, token in enumerate(own)))
    return found


@pytest.fixture(scope="module", params=["original", "lm-eval"])
def evaluated(request: pytest.FixtureRequest, eval_model: Path,
              tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """Prompt style, output folder and printed text of a run at one rank."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    done = run("--task", *TASKS, "--task-data-path", DATA, "--load", eval_model, "--output", out, "--prompt-style", request.param,
               "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return request.param, out, done.stdout


def lines(out: Path, task: str) -> list[dict[str, Any]]:
    """Of a journal, without the first one."""
    return [json.loads(line) for line in (out / f"{task}.journal.jsonl").read_text().splitlines()][1:]


def journal(out: Path, task: str) -> dict[str, list[float]]:
    return {line["key"]: line["logprobs"] for line in lines(out, task)}


def results(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    del found["run"]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_likelihoods_are_those_of_transformers(eval_model: Path, evaluated: tuple[str, Path, str], task: str) -> None:
    style, out, _ = evaluated
    model = transformers.AutoModelForCausalLM.from_pretrained(eval_model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(eval_model)
    (job,) = prepare(task, DATA, EvalSettings(style))
    found = journal(out, task)
    assert len(found) == 20
    right = 0
    for number, question in enumerate(job.questions):
        mine = found[question.key(job.task)]
        if number % 2 == 0:  # ten of the twenty
            assert mine == pytest.approx(by_hand(model, tokenizer, question), abs=2e-4)
        right += mine.index(max(mine)) in question.golds
    assert results(out)["tasks"][task]["micro"]["correct"] == right


def test_prompts_too_long_are_counted(evaluated: tuple[str, Path, str]) -> None:
    _, out, printed = evaluated
    tasks = results(out)["tasks"]
    assert tasks["boolq"]["prompts_cut"] == 0 < tasks["mmlu"]["prompts_cut"] <= 20
    assert f"{tasks['mmlu']['prompts_cut']} prompts were too long" in printed


def test_the_originals_line_is_printed(evaluated: tuple[str, Path, str]) -> None:
    _, out, printed = evaluated
    micro = results(out)["tasks"]["mmlu"]["micro"]
    assert f"mmlu acc = {micro['correct']}/20={micro['accuracy']}" in printed.splitlines()


def test_a_killed_run_continues_on_two_ranks(eval_model: Path, tmp_path: Path) -> None:
    words = ("--task", "mmlu", "--task-data-path", DATA, "--load", eval_model, "--device", "cpu")
    assert run(*words, "--output", tmp_path / "whole").returncode == 0
    words = (*words, "--output", tmp_path / "out")
    assert start(*words, "--evaluation-batch-size", 6, MODELLINK_KILL_AT="after-batch").returncode < 0
    assert len(journal(tmp_path / "out", "mmlu")) == 6
    done = start(*words, "--tp", 2, "--evaluation-batch-size", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mmlu acc = ") == 1 and "6 answered by an earlier run" in done.stdout
    one, two = journal(tmp_path / "whole", "mmlu"), journal(tmp_path / "out", "mmlu")
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(one[key], abs=2e-4) for key in one)
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_written_answers_go_on_on_two_ranks_and_are_noted_one_by_one(eval_model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    words = ("--task", tmp_path / "own.yaml", "--task-data-path", DATA, "--load", eval_model, "--device", "cpu", "--prompt-style",
             "lm-eval")
    assert run(*words, "--output", tmp_path / "whole").returncode == 0
    words = (*words, "--output", tmp_path / "out", "--evaluation-batch-size", 3)
    assert start(*words, MODELLINK_KILL_AT="after-batch").returncode < 0
    assert len(lines(tmp_path / "out", "own")) == 1
    done = start(*words, "--tp", 2)
    assert done.returncode == 0 and "1 answered by an earlier run" in done.stdout, done.stderr
    texts = [{line["key"]: line["texts"] for line in lines(tmp_path / place, "own")} for place in ("whole", "out")]
    assert texts[0] == texts[1] and len(lines(tmp_path / "out", "own")) == len(texts[0])
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_two_stages_give_the_same(eval_model: Path, evaluated: tuple[str, Path, str], tmp_path: Path) -> None:
    style, out, _ = evaluated
    if style == "original":
        pytest.skip("one style is enough")
    done = start("--task", "boolq", "--task-data-path", DATA, "--load", eval_model, "--device", "cpu", "--pp", 2, "--output",
                 tmp_path / "out", "--prompt-style", style)
    assert done.returncode == 0, done.stderr
    one, two = journal(out, "boolq"), journal(tmp_path / "out", "boolq")
    assert one.keys() == two.keys() and all(two[key] == pytest.approx(one[key], abs=2e-4) for key in one)


@pytest.fixture(scope="module")
def served(eval_model: Path) -> Iterator[str]:
    """The address of our own server with the model."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    from modellink.core.launch import free_port
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "modellink.infer.cli", "serve", "--load", str(eval_model),
                                "--device", "cpu", "--port", str(port)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()


OWN = """name: own
version: 1
summary: texts
data: {reader: jsonl, files: [dev.jsonl], columns: {question: text, answer: bool}}
styles:
  lm-eval:
    question: "{{ question }}?"
    generate: {until: ["th"], max_tokens: 12, target: "{{ answer }}", extract: {any: {regex: ".+"}}}
"""


def test_our_server_gives_what_the_model_gives_here(eval_model: Path, served: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    words = ("--task", "boolq", tmp_path / "own.yaml", "--task-data-path", DATA, "--prompt-style", "lm-eval")
    for place, model in (("here", ("--load", eval_model, "--device", "cpu")), ("there", ("--endpoint", served))):
        done = run(*words, *model, "--output", tmp_path / place)
        assert done.returncode == 0, done.stderr
    here, there = (journal(tmp_path / place, "boolq") for place in ("here", "there"))
    assert here.keys() == there.keys() and len(here) == 20
    assert all(there[key] == pytest.approx(here[key], abs=2e-4) for key in here)
    texts = [{line["key"]: line["texts"] for line in lines(tmp_path / place, "own")} for place in ("here", "there")]
    assert texts[0] == texts[1] and len({text for (text,) in texts[0].values()}) > 10
    scores = [results(tmp_path / place)["tasks"] for place in ("here", "there")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_are_written_by_the_compiled_step_where_it_is_the_model(eval_model: Path, dtype: Any) -> None:
    from modellink.eval import GenerationRequest
    from modellink.eval.backends.local import LocalBackend
    from modellink.infer.native import compiled
    backend = LocalBackend(eval_model, device="cpu", dtype=dtype, batch_size=2)
    backend.load()
    network = backend._engine.network
    assert bool(network.fast_paths) == (dtype == "float32" and compiled.step() is not None)
    asked = [GenerationRequest(f"word {number} " * (number + 1), (), 6 + number) for number in range(5)]
    found = dict(backend.generate(asked))
    assert sorted(found) == list(range(5)) and next(iter(backend.generate(asked)))[0] == 0  # the shortest, before the others
    network.fast_paths = []
    assert dict(backend.generate(asked)) == found and len({text.text for text in found.values()}) > 3


def test_another_precision_is_another_model(eval_model: Path, evaluated: tuple[str, Path, str]) -> None:
    style, out, _ = evaluated
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run("--task", "boolq", "--task-data-path", DATA, "--load", eval_model, "--output", out, "--prompt-style", style,
               "--device", "cpu", "--dtype", "bfloat16")
    assert done.returncode == 2 and "answers of another model" in done.stderr and "dtype bfloat16" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(("words", "message"), [
    (("--tp", 4), "tensor parallel size 4 does not divide the 2 query groups"), (("--load", "nothing"), "nothing"),
    (("--tokenizer-name-or-path", "nothing"), "nothing"),
])
def test_a_mistake_about_the_model(eval_model: Path, tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    base = {"--task": "boolq", "--task-data-path": DATA, "--load": eval_model, "--output": tmp_path / "out", "--device": "cpu"}
    given = base | {words[0]: words[1]}
    done = run(*(word for pair in given.items() for word in pair))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
