# SPDX-License-Identifier: Apache-2.0
"""The tests of the NPU path: `nox -s npu` runs them, with the torch_npu wheel in a separate folder.

The pytest process never imports torch_npu, which would modify torch for every other test: code that needs it runs in processes
started by these fixtures. Without MODELLINK_NPU this folder has no tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, beside

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "packages" / "core" / "tests"
collect_ignore_glob = [] if "MODELLINK_NPU" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[..., Ranks]]:
    """`pools(n)`: n ranks on the simulated device; `pools(n, "cpu")`: on the CPU."""
    made: dict[tuple[int, str], Ranks] = {}

    def make(size: int, kind: str = "npu") -> Ranks:
        if (size, kind) not in made:
            made[size, kind] = Ranks(size, [str(HERE / "rank.py")]) if kind == "npu" else Ranks(size)
        return made[size, kind]

    yield make
    for ranks in made.values():
        ranks.stop()


@pytest.fixture(scope="session")
def layers(pools: Callable[..., Ranks]) -> dict[str, Any]:
    """What layers.py finds, kept for table.py."""
    found: dict[str, Any] = beside(str(HERE / "layers.py"), "layers").measure(pools)
    (Path(os.environ["MODELLINK_NPU"]) / "layers.json").write_text(json.dumps(found))
    return found


tiny, corpus, write_documents = (getattr(beside(str(CORE / "conftest.py"), "conftest"), name)
                                 for name in ("tiny", "corpus", "write_documents"))
