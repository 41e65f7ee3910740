# SPDX-License-Identifier: Apache-2.0
"""`modellink-train digests A B`: where the digests of two runs (`--log-digest`) diverge.

    FOLDER/rank_00000.jsonl    a line of names, then a line per iteration: loss, digests of gradients and updated parameters

Not here: computing and writing digests (train/digest.py).
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from modellink.kernels.command import command
from modellink.kernels.errors import ModelLinkError


def read(path: Path) -> tuple[list[str], dict[int, dict[str, Any]]]:
    """The names, and the entries by iteration; an incomplete last line is ignored."""
    try:
        names, *entries = [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        return names["names"], {entry["iteration"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise ModelLinkError("this is not a file of digests", where=path, fix="give folders that --log-digest wrote") from None


@dataclass(frozen=True)
class Divergence:
    """The first difference of two runs.

    Attributes:
        what: loss, gradient or parameter.
        others: how many more of these differ in the iteration, on all ranks.
    """

    iteration: int
    rank: int
    what: str
    name: str
    others: int

    def __str__(self) -> str:
        which = f"{self.what} of {self.name}" if self.name else self.what
        more = f" (and {self.others} more)" if self.others else ""
        return f"iteration {self.iteration}, rank {self.rank}: {which}{more}"


def compare(first: Path, second: Path) -> tuple[int, int, Divergence | None]:
    """(number of common iterations, number of ranks, first difference).

    Differences within an iteration are ordered as they are computed: loss, gradients from the output layer backward, parameters.

    Raises:
        ModelLinkError: the folders differ in ranks or parameters, or have no common iteration.
    """
    files = [{path.name: path for path in folder.glob("rank_*.jsonl")} for folder in (first, second)]
    if not files[0] or files[0].keys() != files[1].keys():
        raise ModelLinkError(f"{len(files[0])} and {len(files[1])} ranks have digests", where=f"{first}, {second}",
                             fix="compare runs with --log-digest on the same number of ranks")
    ranks = [(read(files[0][name]), read(files[1][name])) for name in sorted(files[0])]
    for (names, _), (others, _) in ranks:
        if names != others:
            raise ModelLinkError(f"ranks hold different parameters, e.g. {sorted(set(names) ^ set(others))[:2] or names[:2]}",
                                 where=f"{first}, {second}", fix="compare runs of the same model at the same layout")
    common = sorted(set.intersection(*(set(entries) for pair in ranks for _, entries in pair)))
    if not common:
        raise ModelLinkError("the runs have no iteration in common", where=f"{first}, {second}")
    for iteration in common:
        entries = [(names, one[iteration], two[iteration]) for (names, one), (_, two) in ranks]
        if (divergence := _divergence(iteration, entries)) is not None:
            return len(common), len(ranks), divergence
    return len(common), len(ranks), None


def _divergence(iteration: int,
                ranks: list[tuple[list[str], dict[str, Any], dict[str, Any]]]) -> Divergence | None:
    losses = [rank for rank, (_, one, two) in enumerate(ranks) if one["loss"] != two["loss"]]
    if losses:
        return Divergence(iteration, losses[0], "loss", "", len(losses) - 1)
    for what in ("gradient", "parameter"):
        found = [((*_place(name), number), rank, name) for rank, (names, one, two) in enumerate(ranks)
                 for number, name in enumerate(names) if one[what + "s"][number] != two[what + "s"][number]]
        if found:
            earliest = max(found)[0] if what == "gradient" else min(found)[0]
            _, rank, name = min(item for item in found if item[0] == earliest)
            return Divergence(iteration, rank, what, name, len(found) - 1)
    return None


def _place(name: str) -> tuple[int, int]:
    """Position of a parameter in the model, from the embedding to the output layer."""
    if found := re.search(r"layers\.(\d+)\.", name):
        return 1, int(found[1])
    return (0, 0) if "embedding." in name else (2, 0)


@command(name="digests", example="modellink-train digests ./run-one/digests ./run-two/digests", starts=True)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def digests(first: Path, second: Path) -> None:
    """Compare the digests of two runs in their --log-digest folders FIRST and SECOND. Exit status 1 if they differ."""
    iterations, ranks, divergence = compare(first, second)
    if divergence is None:
        print(f"bit-equal: {iterations} iterations on {ranks} ranks, loss, gradients and parameters")
        return
    print(f"the runs diverge at {divergence}")
    sys.exit(1)
