# SPDX-License-Identifier: Apache-2.0
"""Internal errors: one in a completion ends only that one, one of the model ends the process, and no request
waits forever."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from modellink.kernels.errors import ModelLinkError

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
BODY = {"prompt": "The quick", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
# The command, in a process whose model fails once as soon as the file that BREAKS names exists; the process
# removes it.
BROKEN = """
import os, sys
from modellink.core import engine
from modellink.kernels.device import find
engine.start(find("cpu"))
from modellink.infer import cli
from modellink.infer.batch import ContinuousBatch
step = ContinuousBatch.step
def breaks(batch):
    try:
        os.unlink(os.environ["BREAKS"])
    except FileNotFoundError:
        return step(batch)
    raise MemoryError("no page is left")
ContinuousBatch.step = breaks
sys.argv[0] = "modellink-infer"
cli.main()
"""


@pytest.fixture
def service(engine) -> Iterator[Any]:
    from modellink.infer.server.service import Service
    made = Service(engine, max_waiting=16)
    yield made
    if made.usable:
        made.stop()


@pytest.fixture
def client(service) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from modellink.infer.server.app import make_app
    with TestClient(make_app(service, name="tiny", api_key=None, max_body=10_000)) as client:
        yield client


class FailingSampler:
    """Calls another sampler a number of times, then fails."""

    is_argmax = False
    constraint = None

    def __init__(self, sampler: Callable[[Any], int], good: int) -> None:
        self.sampler, self.good = sampler, good

    def __call__(self, logits: Any) -> int:
        self.good -= 1
        if self.good < 0:
            raise IndexError("a token that is not there")
        return self.sampler(logits)


@pytest.fixture
def breaks(service, monkeypatch) -> None:
    """Completions with sampling fail at their fourth token."""
    add = service.batch.add

    def broken(completion: Any) -> None:
        add(completion)
        entry = service.batch.waiting[-1]
        if not completion.request.sampling.greedy:
            entry.sampler = FailingSampler(entry.sampler, 3)
    monkeypatch.setattr(service.batch, "add", broken)


def test_an_error_in_one_completion_ends_only_that_one(engine, client, service, breaks):
    (expected,) = engine.generate("The quick", max_new_tokens=12, ignore_eos=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda temperature: client.post("/v1/completions",
                                                              json=BODY | {"temperature": temperature}),
                              (0, 1, 0, 1)))
    assert [response.status_code for response in found] == [200, 500, 200, 500]
    assert {response.json()["choices"][0]["text"] for response in found[::2]} == {expected.text}
    message = found[1].json()["error"]["message"]
    assert message == "the completion failed: IndexError: a token that is not there"
    with client.stream("POST", "/v1/completions", json=BODY | {"temperature": 1, "stream": True}) as response:
        last = [line for line in response.iter_lines() if line][-1]
    assert "the completion failed" in last
    assert client.post("/v1/completions",
                       json=BODY).status_code == 200 and client.get("/health").status_code == 200
    assert service.unfinished == 0 and all(pool.used == 0 for pool in service.batch.cache.pools)


def test_a_completion_that_cannot_start_affects_no_other(engine, client, service, monkeypatch):
    monkeypatch.setattr(service.batch, "add", lambda completion: 1 / 0)
    assert client.post("/v1/completions", json=BODY).status_code == 500
    monkeypatch.undo()
    assert client.post("/v1/completions", json=BODY).status_code == 200 and service.unfinished == 0


def test_the_library_raises_the_error(engine, monkeypatch):
    from modellink.infer.sampler import Sampler
    monkeypatch.setattr(Sampler, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate("The quick", max_new_tokens=4, do_sample=True)
    assert all(pool.used == 0 for pool in engine.cache.pools)


@pytest.mark.parametrize("token", [-1_000_000_000, -1, 379, 1 << 40])
def test_a_stop_id_outside_the_vocabulary_is_refused(engine, client, token):
    for more in ({}, {"response_format": {"type": "json_object"}}):
        response = client.post("/v1/completions", json=BODY | {"stop_token_ids": [token]} | more)
        assert response.status_code == 400 and response.json()["error"]["param"] == "stop_token_ids"
    for option in ("stop", "eos_token_id"):
        with pytest.raises(ModelLinkError, match=f"the token id {token}"):
            engine.generate("The", **{option: [token]})
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_end_tokens_outside_the_vocabulary_are_ignored(engine):
    pytest.importorskip("llguidance")
    import torch

    from modellink.infer.constraint import Constraint
    from modellink.infer.grammar import make_grammar
    grammar = make_grammar(engine.tokenizer, regex="a*")
    left = Constraint(engine.tokenizer, grammar, frozenset({2, -7, 5000})).mask(torch.zeros(379))
    assert left[2] == 0 and left.isfinite().sum() < 20


def test_a_failed_model_refuses_requests(client, service, monkeypatch):
    left = threading.Event()
    service.on_failure = left.set

    def fails() -> None:
        raise MemoryError("no page is left")
    monkeypatch.setattr(service.batch, "step", fails)
    assert client.post("/v1/completions", json=BODY).status_code == 503
    assert left.wait(10) and client.get("/health").status_code == 503
    response = client.post("/v1/completions", json=BODY)
    assert response.status_code == 503 and "no page is left" in response.json()["error"]["message"]


def test_a_request_that_arrives_as_the_thread_ends_is_refused(engine, service):
    """The thread ends between the check of the request and its submission."""
    from modellink.infer.server.service import Stopped
    service.start()
    check = service.batch.check

    def slow(request: Any) -> None:
        check(request)
        service.stop()
    service.batch.check = slow
    with pytest.raises(Stopped, match="the server is stopping"):
        service.submit(engine.requests("The"), lambda event: None)
    assert service.unfinished == 0


def wait_for(url: str, ready: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if ready(httpx.get(f"{url}/health").json()):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server never became ready")


@pytest.fixture
def broken(llama, tmp_path) -> SimpleNamespace:
    (tmp_path / "broken.py").write_text(BROKEN)
    arguments = [str(tmp_path / "broken.py"), "serve", "--load", str(llama), "--device", "cpu",
                 "--served-model-name", "tiny"]
    return SimpleNamespace(command=[sys.executable, *arguments], file=tmp_path / "breaks",
                           environment=os.environ | {"OMP_NUM_THREADS": "1",
                                                     "BREAKS": str(tmp_path / "breaks")})


def test_a_server_exits_if_its_model_fails(broken):
    from modellink.core.launch import free_port
    port = free_port()
    process = subprocess.Popen([*broken.command, "--port", str(port)], env=broken.environment,
                               stderr=subprocess.PIPE, text=True)
    try:
        wait_for(url := f"http://127.0.0.1:{port}", lambda state: state["status"] == "ok")
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200
        broken.file.touch()
        response = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
        assert response.status_code == 503 and "no page is left" in response.json()["error"]["message"]
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and "MemoryError: no page is left" in errors
    finally:
        process.kill()


def test_a_replica_is_restarted_if_its_model_fails(broken, engine):
    from modellink.core.launch import free_port
    from modellink.infer.server.front import make_front
    from modellink.infer.server.replicas import LocalReplica
    replicas = [LocalReplica(index, broken.command, broken.environment) for index in range(2)]
    server = uvicorn.Server(uvicorn.Config(make_front(replicas, max_body=10_000), port=(port := free_port()),
                                           log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(url := f"http://127.0.0.1:{port}", lambda state: state["ready"] == 2)
        before = {replica.process.pid for replica in replicas}
        broken.file.touch()
        (expected,) = engine.generate("The quick", max_new_tokens=12, ignore_eos=True)
        for _ in range(6):  # the first one is retried on the other replica
            response = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
            assert response.status_code == 200 and response.json()["choices"][0]["text"] == expected.text
        deadline = time.monotonic() + 60
        while before <= {replica.process.pid for replica in replicas} and time.monotonic() < deadline:
            time.sleep(0.1)
        wait_for(url, lambda state: state["ready"] == 2)
        assert len(before - {replica.process.pid for replica in replicas}) == 1
    finally:
        server.should_exit = True
        thread.join(60)


def test_a_port_in_use_is_reported_before_the_weights_are_read(broken):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = subprocess.run([*broken.command, "--port", str(port)], env=broken.environment,
                               capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and f"the server cannot listen on 127.0.0.1:{port}" in found.stderr
    assert not [text for text in ("serving at", "Traceback", "weights") if text in found.stderr]


def test_an_address_of_another_machine_is_refused(llama, command):
    found = command("serve", "--load", llama, "--host", "192.0.2.1", "--device", "cpu", "--api-key", "k")
    assert found.status == 2 and "cannot listen on 192.0.2.1:8000" in found.err


def test_requests_are_forwarded_to_two_running_servers(llama, engine, tmp_path):
    from modellink.core.launch import free_port
    ports = [free_port() for _ in range(3)]
    serve = [sys.executable, "-m", "modellink.infer.cli", "serve", "--port"]
    more = ["--load", str(llama), "--device", "cpu", "--served-model-name", "tiny"]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*serve, str(port), *more], env=environment) for port in ports[:2]]
    processes.append(subprocess.Popen([*serve, str(ports[2]), "--replica-url", urls[0], "--replica-url",
                                       urls[1] + "/"],
                                      env=environment))
    try:
        wait_for(urls[2], lambda state: state.get("ready") == 2)
        (expected,) = engine.generate("The quick", max_new_tokens=12, ignore_eos=True)

        def ask(_: int) -> str:
            return httpx.post(f"{urls[2]}/v1/completions", json=BODY, timeout=60).json()["choices"][0]["text"]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert set(pool.map(ask, range(6))) == {expected.text}
        text = httpx.get(f"{urls[2]}/metrics").text
        assert all(f'modellink_answers_total{{replica="{index}"}}' in text for index in (0, 1))
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(60) == 0
        assert {ask(0) for _ in range(3)} == {expected.text}
        wait_for(urls[2], lambda state: state.get("ready") == 1)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("args", "message"), [
    (["--replica-url", "localhost:8000"], "is not the address of a server"),
    (["--replica-url", "http://a:1", "--load", "x"], "--load must be set for the servers"),
    (["--replica-url", "http://a:1", "--api-key", "k"], "--api-key must be set for the servers")])
def test_wrong_options_of_a_forwarding_server(command, args, message):
    found = command("serve", *args)
    assert found.status == 2 and message in found.err


def test_each_replica_gets_its_accelerators(monkeypatch):
    from modellink.infer.server.replicas import device_shares, make_replicas
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_shares("cuda", 4, 2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"},
                                              {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,7")
    shares = device_shares("npu", 3, 3, 1)
    assert shares == [{"ASCEND_RT_VISIBLE_DEVICES": each} for each in ("4", "5", "7")]
    assert [replica._environment["ASCEND_RT_VISIBLE_DEVICES"]
            for replica in make_replicas(3, [], shares)] == ["4", "5", "7"]
    assert device_shares("cpu", 0, 8, 2) is None
    with pytest.raises(ModelLinkError, match="need 4 devices, 3 are available"):
        device_shares("npu", 3, 2, 2)
