# SPDX-License-Identifier: Apache-2.0
"""Console commands made from config classes: help in groups, dry runs, how to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import click
import pytest
from click.testing import CliRunner

from modellink.kernels.command import command
from modellink.kernels.errors import ModelLinkError
from modellink.kernels.general_options import ConfigFileOptions, DryRun, with_file
from modellink.kernels.options import Layer, option, resolve
from modellink.kernels.parallel import ParallelLayout
from modellink.kernels.tables import table_lines


@dataclass(frozen=True)
class Base:
    heading: ClassVar[str] = "Layout"

    tensor_size: int = option(1, "Ranks.", short="--tp")


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    heading: ClassVar[str] = "Data"

    data: str = option(doc="Files.", alias="--input-data")
    shuffle: bool = option(True, "Mix.")
    steps: int = option(3, "Steps.", heading="Optimizer")
    decay: Literal["linear", "cosine"] = option("linear", "Decay.")
    old: str | None = option(None, "Old spelling.", listed=False)


@dataclass(frozen=True)
class Architecture:
    heading: ClassVar[str] = "Architecture"
    required_note: ClassVar[str] = "required without --load"

    layers: int = option(doc="Layers.")


def invoke(*words: str, **settings):
    seen = {}

    @command(Config, name="inspect")
    def inspect(given: Layer) -> None:
        seen["inspected"] = dict(given.values)

    @command(Config, ConfigFileOptions, DryRun, Architecture, name="prog", example="prog --data x", starts=True,
             subcommands={"inspect": inspect})
    def run(given: Layer, dry_run: DryRun | None) -> None:
        """Do something."""
        seen.update(layers=with_file(given), dry_run=dry_run)

    result = CliRunner().invoke(run, words, prog_name="prog", **settings)
    return result, seen


def test_help_has_an_example_and_groups_and_no_other_spellings():
    text = invoke("--help")[0].output
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Example:", "Subcommands:", "Data:", "Optimizer:", "Layout:", "General:", "Architecture:"]
    assert "--tp, --tensor-size INTEGER" in text and "--tensor_size" not in text
    assert "--input-data" not in text and "--old" not in text
    assert "[required without --load]" in text.split("Architecture:")[1]
    data = text.split("Data:")[1].split("Optimizer:")[0]
    assert "--data" in data and "--shuffle / --no-shuffle" in data and "--steps" not in data


@pytest.mark.parametrize("words", [["--input-data", "x"], ["--old", "x"], ["--tensor_size", "2"], ["--tp", "2"]])
def test_other_spellings_still_work(words):
    result, seen = invoke(*words)
    assert result.exit_code == 0 and len(seen["layers"][0].values) == 1


def test_without_arguments_it_shows_how_to_start():
    result, seen = invoke()
    assert result.exit_code == 2 and not seen
    assert "Do something." in result.stderr and "prog --data x" in result.stderr and "--steps" not in result.stderr
    assert result.stderr.endswith("prog --help lists all options.\n")


def test_a_dry_run_reaches_the_function():
    assert invoke("--data", "x")[1]["dry_run"] is None
    assert invoke("--data", "x", "--dry-run", "--devices", "8")[1]["dry_run"] == DryRun(dry_run=True, devices=8)
    result, seen = invoke("--data", "x", "--devices", "8")
    assert isinstance(result.exception, ModelLinkError) and result.exception.option == "devices" and not seen


def test_devices_must_fit_the_layout():
    DryRun(dry_run=True, devices=4).check_devices(ParallelLayout(tp=2, pp=2))
    DryRun(dry_run=True).check_devices(ParallelLayout(tp=2, pp=2))
    with pytest.raises(ModelLinkError, match="--devices is 3"):
        DryRun(dry_run=True, devices=3).check_devices(ParallelLayout(tp=2, pp=2))


def test_a_command_that_only_reads_accepts_a_dry_run_and_does_not_list_it():
    result, seen = invoke("inspect", "--data", "x", "--dry-run")
    assert result.exit_code == 0 and seen["inspected"] == {"data": "x"}
    assert "--dry-run" not in invoke("inspect", "--help")[0].output


def test_the_file_of_options_is_the_lower_layer(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 5\ndata: y\n")
    layers = invoke("--config", str(tmp_path / "run.yaml"), "--steps", "7")[1]["layers"]
    assert resolve([Config], *layers)[Config] == Config(data="y", steps=7)


def test_a_plain_function_needs_no_options():
    @command(name="list")
    def show() -> None:
        click.echo("shown")

    assert CliRunner().invoke(show, []).output == "shown\n"


ROWS = [("mmlu", 12, "Questions of exams in many subjects"), (), ("gsm8k", 1319, "Word problems")]


def test_a_table_is_not_wrapped_in_a_pipe_and_fits_a_terminal():
    columns = ("task", "questions", "description")
    assert table_lines(columns, ROWS, right=("questions",)) == [
        "task   questions  description", "mmlu          12  Questions of exams in many subjects", "",
        "gsm8k       1319  Word problems"]
    narrow = table_lines(columns, ROWS, width=36, right=("questions",))
    assert max(map(len, narrow)) <= 36
    assert narrow[1:3] == ["mmlu          12  Questions of exams", "                  in many subjects"]
    dropped = table_lines(columns, ROWS, width=26, optional=("questions",))
    assert dropped[:2] == ["task   description", "mmlu   Questions of exams"]
    assert table_lines(("", ""), [("a", 1)]) == ["a  1"]
