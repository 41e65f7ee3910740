# SPDX-License-Identifier: Apache-2.0
"""The properties of a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from modellink.kernels.device import _left_by_limit, find


@pytest.mark.parametrize(("limit", "left"), [("4000", 4000 - 3000 + 500), ("max", None), ("2000", 0)])
def test_the_limit_of_a_container(tmp_path: Path, limit: str, left: int | None) -> None:
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/other\n0::/a/b\n")
    for name, value in (("max", limit), ("current", "3000"), ("stat", "anon 1\ninactive_file 500\n")):
        (folder / f"memory.{name}").write_text(value)
    assert _left_by_limit(tmp_path, tmp_path / "own") == left


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert _left_by_limit(tmp_path, tmp_path / "own") is None
    assert find("cpu").available() > 0
