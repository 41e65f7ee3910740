# SPDX-License-Identifier: Apache-2.0
"""Prints what the NPU path is proven by: every use of every op, layer by layer (layers.py), and the operators by version.

    python table.py            MODELLINK_NPU names the folder with the wheel and the stand-ins, which `nox -s npu` makes
    python table.py --last     prints what the tests found, without running anything
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import schemas
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "support"))

from layers import TYPES, measure  # noqa: E402
from ranks import Ranks  # noqa: E402


def results() -> Path:
    return Path(os.environ["MODELLINK_NPU"]) / "layers.json"


def fits(of_case: dict[str, Any], known: dict[str, dict[str, str]]) -> str:
    """The versions whose schemas take the calls of a case."""
    if not of_case["calls"]:
        return "torch"
    good = []
    for version, of_version in known.items():
        if all(name in of_version and schemas.problem(of_version[name], positional, named) is None
               for name, positional, named in of_case["calls"]):
            good.append(version)
    return "all" if len(good) == len(known) else f"from {good[0]}" if good and good == [*known][-len(good):] else ", ".join(good)


def number(value: object) -> str:
    return f"{value:.0e}" if isinstance(value, float) else "failed"


def print_ops(console: Console, found: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table("op", "use", "A schema", "B shapes", "C kernels of CANN, forward and backward",
                  f"D difference {' '.join(TYPES)}", title_justify="left",
                  title="NPU forms: names, arguments, shapes, host checks, control flow; not what a kernel computes")
    known = schemas.known()
    for name in found[TYPES[0]]:
        op, _, use = name.partition(": ")
        rows = [found[dtype][name] for dtype in TYPES]
        fake = {row.get("fake", "-") for row in rows}
        kernels = " ".join(rows[0]["kernels"]) or "torch's own"
        table.add_row(op, use, fits(rows[0], known), "ok" if fake == {"as plain"} else ", ".join(sorted(fake)),
                      kernels.replace("aclnn", ""), " ".join(number(row["difference"]) for row in rows))
    console.print(table)


def print_versions(console: Console) -> None:
    known = schemas.known()
    table = Table("operator", *known, title="operators by version of torch_npu: a letter is a schema", title_justify="left")
    for name, by_schema in json.loads(schemas.FILE.read_text("utf-8")).items():
        letter = {version: chr(ord("a") + at) for at, versions in enumerate(by_schema.values()) for version in versions}
        table.add_row(name, *(letter.get(version, "none") for version in known))
    console.print(table)


def main() -> None:
    if "--last" in sys.argv:
        found = json.loads(results().read_text("utf-8"))
    else:
        made: dict[int, Ranks] = {}
        try:
            found = measure(lambda size: made.setdefault(size, Ranks(size, [str(HERE / "rank.py")])))
        finally:
            for ranks in made.values():
                ranks.stop()
    console = Console(width=200)
    print_ops(console, found)
    print_versions(console)


if __name__ == "__main__":
    main()
