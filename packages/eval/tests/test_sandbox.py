# SPDX-License-Identifier: Apache-2.0
"""The sandbox: right programs pass, wrong ones fail, and escapes fail, started as root and as nobody.

The attempts are in attempts.yaml.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template

import pytest
import yaml

from modellink.eval import Sandbox, load_task
from modellink.eval.sandbox import Limits
from modellink.kernels.errors import ModelLinkError

SOURCES = [path for path in sys.path if path and Path(path).is_dir()]
TEST = "assert f({argument!r}) == 'escaped'"

ATTEMPTS = yaml.safe_load((Path(__file__).parent / "attempts.yaml").read_text(encoding="utf-8"))
# What limits and two processes are enough for.
HELD_WITHOUT = ("memory bomb", "early end", "patched builtins", "an equal text", "endless loop", "large file",
                "environment secrets", "forged verdict", "verdict of the other process")


def attempts(folder: Path, port: int, tool: str = "unshare") -> dict[str, str]:
    """Return the result of each attempt; also run as a script by another user."""
    limits = Limits(seconds=2.5, cpu_seconds=2, memory=256 << 20)
    sandbox = Sandbox("none", limits) if tool == "none" else Sandbox(limits=limits, tools=(tool,))
    values = {"home": folder, "port": port, "pid": os.getpid()}
    test = "mark = 'hidden-' + 'test'\n" + TEST.format(argument=1)
    with ThreadPoolExecutor(3) as pool:
        names = HELD_WITHOUT if tool == "none" else tuple(ATTEMPTS)
        found = pool.map(lambda name: sandbox.passes("", Template(ATTEMPTS[name]).substitute(values), test, "f"), names)
        return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(limits=Limits(seconds=20))
    except ModelLinkError as error:
        pytest.skip(str(error))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A secret in a folder, one in the environment, and a server that counts who calls."""
    (tmp_path / "secret").write_text("hidden-token")
    monkeypatch.setenv("SECRET", "hidden-token")
    server, unix, calls = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), []
    unix.bind(f"\0modellink-{server.getsockname()[1]}")
    unix.listen()

    def listen(listening: socket.socket) -> None:
        while True:
            try:
                calls.append(listening.accept())
            except OSError:
                return
    for listening in (server, unix):
        threading.Thread(target=listen, args=(listening,), daemon=True).start()
    yield tmp_path, server.getsockname()[1], calls
    server.close()
    unix.close()


def strangers() -> set[str]:
    """Processes that run the sandbox's script."""
    found = set()
    for pid in (path.name for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "confine.py" in words and str(os.getpid()) != pid:
            found.add(pid)
    return found


@pytest.mark.parametrize("tool", ["unshare", "bwrap"])
def test_every_attempt_is_contained_and_wrong(sandbox, world, tool):
    folder, port, calls = world
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = attempts(folder, port, tool)
    assert len(found) >= 15
    assert {name: verdict for name, verdict in found.items() if not verdict.startswith("failed: ")} == {}
    assert not calls and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "seconds" in found["endless sleep"]
    patient = Sandbox(limits=Limits(seconds=40), tools=(tool,))  # so that on a busy machine too it is memory that ends it
    assert "seconds" not in patient.passes("", ATTEMPTS["memory bomb of many processes"], TEST.format(argument=1), "f")
    assert sandbox.passes("", "def f(x):\n    return x + 1", "assert f(1) == 2", "f") == "passed"  # the runner is alive
    time.sleep(0.2)
    assert strangers() == set()


AS_NOBODY = """
set -e
n=0
for tree in {trees}; do n=$((n + 1)); mkdir -p {apart}/$n; mount --bind $tree {apart}/$n; done
for top in {hidden}; do mount -t tmpfs -o mode=755 cover $top; done
n=0
for tree in {trees}; do n=$((n + 1)); mkdir -p $tree; mount --bind {apart}/$n $tree; done
exec setpriv --reuid=65534 --regid=65534 --clear-groups {python} {script} {folder} {port} {tool}
"""


def closed(path: Path) -> list[Path]:
    """The folders above `path` that only their owner may enter, the outermost first."""
    return [parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start something as nobody; this run is not root's")
@pytest.mark.parametrize("tool", ["unshare", "bwrap", "none"])
def test_every_attempt_is_contained_where_the_runner_is_nobody(sandbox, world, tmp_path_factory, tool):
    """An interpreter and packages in folders only root may enter are visible to nobody in its mount namespace."""
    folder, port, calls = world
    if tool != "none" and shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    place = tmp_path_factory.mktemp("nobody")
    for path in (place, *place.parents):
        if path.stat().st_uid == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    folder.chmod(0o755)
    needed = {Path(path) for path in (sys.base_prefix, sys.prefix, *SOURCES, Path(__file__).parent)}
    trees = sorted(path for path in needed if closed(path) and not needed & set(path.parents))
    script = place / "attempts.py"
    script.write_text(f"import json, sys\nfrom pathlib import Path\nsys.path[:0] = {[*SOURCES, str(Path(__file__).parent)]!r}\n"
                      "import test_sandbox\nprint(json.dumps(test_sandbox.attempts(Path(sys.argv[1]), int(sys.argv[2]), "
                      "sys.argv[3])))\n")
    text = AS_NOBODY.format(apart=place / "apart", trees=" ".join(map(str, trees)), python=sys.executable, script=script,
                            hidden=" ".join(sorted({str(closed(path)[0]) for path in trees})), folder=folder, port=port,
                            tool=tool)
    done = subprocess.run(["unshare", "--mount", "sh", "-c", text], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == set(HELD_WITHOUT if tool == "none" else ATTEMPTS)
    assert {name: verdict for name, verdict in found.items() if not verdict.startswith("failed: ")} == {}
    assert not calls


def test_without_namespaces_limits_and_the_verdict_hold():
    sandbox = Sandbox("none", Limits(seconds=2, cpu_seconds=1, memory=256 << 20))
    for name in HELD_WITHOUT:
        verdict = sandbox.passes("", Template(ATTEMPTS[name]).safe_substitute(home="/nowhere"), TEST.format(argument=1), "f")
        assert verdict.startswith("failed: "), (name, verdict)
    assert sandbox.passes("", "def f(x):\n    return x", "assert f(3) == 3", "f") == "passed"


def test_a_short_clock_is_no_reason_to_refuse():
    try:
        sandbox = Sandbox(limits=Limits(seconds=0.01))
    except ModelLinkError as error:
        assert "seconds" not in str(error), error
        pytest.skip(str(error))
    assert sandbox.passes("", "def f():\n    return 1", "assert f() == 1", "f") == "failed: timeout after 0.01 seconds"


def test_where_isolation_is_not_to_be_had_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelLinkError, match="unshare") as caught:
        Sandbox()
    assert "--isolation none" in str(caught.value)
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    with pytest.raises(ModelLinkError, match="cannot be isolated"):
        Sandbox()


def test_bubblewrap_is_taken_where_unshare_does_not_work(monkeypatch, tmp_path):
    if (bubblewrap := shutil.which("bwrap")) is None:
        pytest.skip("bwrap is not installed")
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Sandbox().tool == bubblewrap


@pytest.mark.parametrize("value", [1, True, None, -2.5, float("inf"), "é\n", b"\xff", [1, (2, {3})], {"a": [None], 2: ()}, 1 + 2j,
                                   10**40, frozenset({1}), ""])
def test_plain_values_cross_over_as_they_are(sandbox, value):
    names = f"inf = float('inf')\nvalue = {value!r}\n"
    test = f"{names}found = f(value, key=value)\nassert found == (value, value) and type(found[0]) is type(value)"
    assert sandbox.passes("", "def f(x, key):\n    return x, key", test, "f") == "passed"


def test_helpers_of_the_prompt_are_there_for_the_test(sandbox):
    prompt = "def double(x):\n    return 2 * x\n\ndef half(x):\n    \"\"\"Half.\"\"\"\n"
    program = prompt + "    return x / 2\n"
    assert sandbox.passes(prompt, program, "assert half(double(4)) == 4.0", "half") == "passed"
    assert sandbox.passes(prompt, program + "\ndef double(x):\n    return 0\n", "assert double(4) == 8", "half") == "passed"


def problems(real_data: Path, count: int | None) -> list[dict[str, str]]:
    path = real_data / "humaneval" / "HumanEval.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no HumanEval in {real_data}")
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")][:count]


@pytest.mark.parametrize(("body", "passing"), [("canonical_solution", 164), (None, 0)])
def test_canonical_solutions_of_humaneval_pass_and_broken_ones_do_not(sandbox, real_data, body, passing):
    assert load_task("humaneval").runs_code
    rows = problems(real_data, None)

    def passes(row):
        program = row["prompt"] + (row[body] if body else "    return None\n")
        return sandbox.passes(row["prompt"], program, f"{row['test']}\ncheck({row['entry_point']})", row["entry_point"])
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(passes, rows))
    assert len(verdicts) == 164 and verdicts.count("passed") == passing
