# SPDX-License-Identifier: Apache-2.0
"""The command `modellink-eval`: options for `evaluate`.

Options and data are validated before weights are read. With `--tp N` this process starts N ranks and waits for them; under
torchrun each process is a rank. The first rank sends the requests and writes and prints the results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import click

from modellink.eval.backends.backend import Backend
from modellink.eval.job import Job, prepare
from modellink.eval.journal import check_output
from modellink.eval.options import RunOptions
from modellink.eval.report.compare import print_comparison
from modellink.eval.report.terminal import print_results, print_tasks, read_results
from modellink.eval.runner import check_sandbox, run
from modellink.eval.sandbox import Sandbox
from modellink.kernels.command import command, group
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.general_options import ConfigFileOptions, DryRun, print_plan, with_file
from modellink.kernels.messages import note
from modellink.kernels.options import Layer, resolve
from modellink.kernels.original import original_flags, translate

MODULE = "modellink.eval.cli"


EXAMPLE = """modellink-eval run --task mmlu --task-data-path ./mmlu \\
    --load ./Qwen2.5-7B --output ./scores"""


@group(example=EXAMPLE)
def evaluation() -> None:
    """Score language models on benchmarks."""


@command(RunOptions, ConfigFileOptions, name="run", example=EXAMPLE, starts=True)
def run_tasks(given: Layer, dry_run: DryRun | None) -> None:
    """Run one or several benchmarks and print the scores."""
    options = resolve([RunOptions], *with_file(given))[RunOptions]
    options.check()
    settings = options.settings()
    jobs = prepare(options.task, options.task_data_path, settings, options.max_eval_samples)
    rank = os.environ.get("RANK")
    first = rank in (None, "0")
    starts = rank is None and options.layout().world_size > 1  # this process only starts the ranks
    if first and not starts and settings.chat and not (options.prompt_type or options.hf_chat_template):
        note(f"prompts use the chat template {settings.chat}, with which the checkpoint was trained; --no-chat-template uses "
             "plain text")
    wanted = options.allow_code_execution and first and any(job.runs_code for job in jobs)
    sandbox = Sandbox(options.isolation) if wanted else None
    if first:
        check_sandbox(jobs, sandbox)
    if options.endpoint is not None:
        from modellink.eval.backends.endpoint import Endpoint
        with Endpoint(options.endpoint, options.endpoint_model, workers=options.evaluation_batch_size) as server:
            description = server.describe()
            check_output(jobs, description, options.output)
            if dry_run:
                print_plan(_plan_rows(options, jobs, description))
                return
            _run(options, jobs, server, sandbox)
        return
    from modellink.eval.backends.local import LocalBackend
    assert options.load is not None
    backend = LocalBackend(options.load, layout=options.layout(), device=options.device, dtype=options.dtype,
                           tokenizer=options.tokenizer_name_or_path, family=options.model_type_hf, chat=settings.chat,
                           batch_size=min(options.evaluation_batch_size, 32))
    if not first:
        backend.follow()
        return
    description = backend.describe()
    check_output(jobs, description, options.output)
    if dry_run:
        dry_run.check_devices(options.layout())
        print_plan(_plan_rows(options, jobs, description))
        return
    if starts:
        from modellink.core.launch import spawn
        sys.exit(spawn(options.layout().world_size, MODULE, sys.argv[1:]))
    backend.load()
    _run(options, jobs, backend, sandbox)
    backend.close()


def _plan_rows(options: RunOptions, jobs: list[Job], model: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield what a run would do, for --dry-run."""
    yield "model", options.endpoint or f"{options.load}, {model['stored as']}, {model['dtype']}"
    if options.endpoint is None:
        yield "layout", f"{options.layout()} on {options.device}"
    for job in jobs:
        yield job.task.name, f"{len(job.questions):,} questions in {len(job.subjects)} subjects, {job.style}"
    yield "output", options.output


def _run(options: RunOptions, jobs: list[Job], backend: Backend, sandbox: Sandbox | None) -> None:
    results = run(jobs, backend, options.output, batch_size=options.evaluation_batch_size, sandbox=sandbox, show=True)
    print_results(results | {"tasks": {job.task.name: results["tasks"][job.task.name] for job in jobs}})


@command(name="list", example="modellink-eval list")
def list_tasks() -> None:
    """List the benchmarks."""
    print_tasks()


@command(name="report", example="modellink-eval report ./scores ./scores-after-tuning", starts=True)
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
def report(results: tuple[Path, ...]) -> None:
    """Print the results of a run, or compare two runs. RESULTS is the --output folder of a run or a results.json."""
    if len(results) > 2:
        raise ModelLinkError(f"{len(results)} runs are given, at most two can be compared", where="RESULTS")
    found = [read_results(path) for path in results]
    if len(found) == 1:
        print_results(found[0])
    else:
        print_comparison(results[0], results[1], found[0], found[1])


for each in (run_tasks, list_tasks, report):
    evaluation.add_command(each)


def main() -> None:
    run_command(_run_command)


def _run_command() -> None:
    if sys.argv[1:2] == ["run"]:
        sys.argv[2:] = translate_original(sys.argv[2:])  # also for the ranks started with this command line
    evaluation(standalone_mode=False)


def translate_original(args: list[str]) -> list[str]:
    """Translate the arguments of the original's evaluation.py, whose scripts repeat the flags of training, to those of `run`."""
    own = {"--help"} | {name for option in run_tasks.params for name in (*option.opts, *option.secondary_opts)}
    table = original_flags("modellink.eval")
    known = own | set(table)
    if any(arg.partition("=")[0] not in known for arg in args if arg.startswith("--")) and find_spec("modellink.infer"):
        from modellink.infer.original import training_flags  # a local model needs modellink-infer anyway
        table = training_flags() | table
    return translate(args, {flag: about for flag, about in table.items() if flag not in own})


if __name__ == "__main__":
    main()
