# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks give the same results as one. Run as a script, this file is a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROMPTS = ["The", "The quick brown fox jumps over the lazy dog", "Köln: 机器学习", "🦊"]


def results(engine) -> dict[str, Any]:
    """Return the results of a rank."""
    stream = engine.stream("The quick", max_new_tokens=100, ignore_eos=True)
    first = next(stream)
    if os.environ.get("RANK", "0") == "0":
        stream.cancel()  # the first rank's call counts for all
    sampled = engine.generate(PROMPTS, max_new_tokens=20, temperature=1.4, seed=3, logprobs=True)
    return {"greedy": [one.token_ids for one in engine.generate(PROMPTS, max_new_tokens=40)],
            "sampled": [one.token_ids for one in sampled],
            "logprobs": [value for completion in sampled for value in completion.logprobs or ()],
            "likelihoods": engine.loglikelihood([([5, 6, 7], [8, 9]), ([300, 11], [378]), ([1] * 40, [5])]),
            "unseeded": engine.generate("The", max_new_tokens=20, temperature=2.0)[0].token_ids,
            "shared": engine.network.broadcast("from rank " + os.environ.get("RANK", "0")),
            "bound": [one.token_ids for one in engine.generate(PROMPTS[:2], max_new_tokens=60,
                                                               temperature=1.5, seed=1,
                                                                     regex="[a-f]+, [0-9]{3}!")],
            "cancelled": [first + "".join(stream), stream.generation.finish_reason]}


def messages_while_silent(engine) -> int:
    """Return how many messages a rank gets in a chat whose user is silent until the first rank has sent five,
    then quits."""
    from modellink.infer import chat
    chat.IDLE_SECONDS = 0.01
    messages, broadcast = [], engine.network.broadcast
    reading, writing = os.pipe()
    with open(reading) as sys.stdin, open(writing, "w") as user:
        def record(value: Any) -> Any:
            messages.append(broadcast(value))
            if len(messages) == 5:
                print("/quit", file=user, flush=True)
            return messages[-1]
        engine.network.broadcast = record
        chat.chat_loop(engine, chat.Conversation(), first_rank=os.environ.get("RANK", "0") == "0")
    return len(messages)


@pytest.fixture(scope="module")
def one(engine) -> dict[str, Any]:
    return json.loads(json.dumps(results(engine)))


@pytest.fixture(scope="module")
def two(llama, tmp_path_factory) -> list[dict[str, Any]]:
    from modellink.core.launch import free_port
    out = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(llama), str(out / f"{rank}.json")],
                              env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("what", ["greedy", "sampled", "bound"])
def test_tokens_equal_those_of_one_rank(one, two, what):
    assert two[0][what] == two[1][what] == one[what]


def test_likelihoods_equal_those_of_one_rank(one, two):
    for found in two:
        assert found["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
        assert [value for value, _ in found["likelihoods"]] == pytest.approx([value for value,
                                                                              _ in one["likelihoods"]],
                                                                             abs=1e-4)
        assert [greedy for _, greedy in found["likelihoods"]] == [greedy for _, greedy in one["likelihoods"]]


def test_ranks_agree_on_random_choices_and_objects(two):
    assert two[0]["unseeded"] == two[1]["unseeded"]
    assert two[0]["shared"] == two[1]["shared"] == "from rank 0"


def test_ranks_are_kept_alive_while_the_user_is_silent(two):
    assert two[0]["heard"] == two[1]["heard"] > 5


def test_the_first_rank_cancels_for_all(two):
    assert two[0]["cancelled"] == two[1]["cancelled"]
    assert two[0]["cancelled"][1] == "cancelled"


def on_two_machines(folder: Path, *words: object) -> list[subprocess.Popen[str]]:
    """Start torchrun for each of two nodes, which are both this machine; the second one has no stdin."""
    from modellink.core.launch import free_port
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    command = ["-m", "modellink.infer.cli", words[0], "--load", folder, "--device", "cpu", "--tp", 2,
               *words[1:]]
    return [subprocess.Popen([*start, str(node), *map(str, command)], text=True, stdin=stdin,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
            for node, stdin in enumerate((subprocess.PIPE, subprocess.DEVNULL))]


def test_two_machines_generate(llama, engine):
    first, second = on_two_machines(llama, "generate", "--max-new-tokens", 12)
    try:
        out, errors = first.communicate("Köln: 机器\n", timeout=120)
        ended = first.returncode, second.wait(60), second.stdout.read()
        assert ended == (0, 0, ""), errors + second.stderr.read()
        assert out == engine.generate("Köln: 机器", max_new_tokens=12)[0].text + "\n"
    finally:
        for agent in (first, second):
            agent.kill()


def test_two_machines_serve(llama, engine):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from modellink.core.launch import free_port
    port = free_port()
    agents = on_two_machines(llama, "serve", "--port", port)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                assert [agent.poll() for agent in agents] == [None, None]
                time.sleep(0.1)
        body = {"prompt": PROMPTS, "max_tokens": 12, "temperature": 0}
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert [choice["text"] for choice in found] == [one.text
                                                        for one in engine.generate(PROMPTS,
                                                                                   max_new_tokens=12)]
        for agent in agents:
            agent.terminate()  # torchrun forwards it; the second node's rank waits for the first one's
        errors = [agent.communicate(timeout=90)[1] for agent in agents]
        assert not any("SIGKILL" in text or "unexpected" in text for text in errors), errors
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    finally:
        for agent in agents:
            agent.kill()


def be_a_rank(folder: str, out: str) -> None:
    from modellink.infer import load
    from modellink.kernels.parallel import ParallelLayout
    engine = load(folder, layout=ParallelLayout(tp=int(os.environ["WORLD_SIZE"])), device="cpu")
    found = results(engine) | {"heard": messages_while_silent(engine)}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    be_a_rank(*sys.argv[1:])
