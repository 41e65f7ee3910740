"""`modellink-eval`: a thin reading of options over `evaluate`.

Everything that can be wrong is looked at before a weight is read. With `--tp N` this process starts N ranks of itself and waits;
under torchrun each process does its part. The first rank asks, writes and prints.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from modellink.eval.options import RunOptions
from modellink.eval.report import print_results, print_tasks, read_results
from modellink.eval.runner import check_output, prepare, run
from modellink.kernels.errors import run_command
from modellink.kernels.options import Layer, command, resolve, yaml_layer

MODULE = "modellink.eval.cli"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def evaluation() -> None:
    """Score language models on benchmarks."""


@command(RunOptions, name="run")
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these options; the command line wins over it.")
def run_tasks(config: Path | None, given: Layer) -> None:
    """Answer the questions of one benchmark or several and print the scores."""
    options = resolve([RunOptions], *([yaml_layer(config)] if config else []), given)[RunOptions]
    jobs = prepare(options.task, options.task_data_path, options.prompt_style, options.max_eval_samples)
    from modellink.eval.backends.local import LocalBackend
    backend = LocalBackend(options.load, tp=options.tensor_model_parallel_size, device=options.device, dtype=options.dtype,
                           tokenizer=options.tokenizer_name_or_path, family=options.model_type_hf)
    rank = os.environ.get("RANK")
    if rank not in (None, "0"):
        backend.follow()
        return
    check_output(jobs, backend.describe(), options.output)
    if rank is None and options.tensor_model_parallel_size > 1:
        from modellink.core.processes import spawn
        sys.exit(spawn(options.tensor_model_parallel_size, MODULE, sys.argv[1:]))
    backend.load()
    results = run(jobs, backend, options.output, batch_size=options.evaluation_batch_size, show=True)
    backend.close()
    print_results(results | {"tasks": {job.task.name: results["tasks"][job.task.name] for job in jobs}})


@evaluation.command("list")
def list_tasks() -> None:
    """Show the benchmarks there are."""
    print_tasks()


@evaluation.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Print the results in FOLDER, the --output of a run, again."""
    print_results(read_results(folder))


evaluation.add_command(run_tasks)


def main() -> None:
    run_command(lambda: evaluation(standalone_mode=False))


if __name__ == "__main__":
    main()
