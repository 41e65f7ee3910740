"""Benchmark scores for language models: a benchmark is a YAML file, every answered question goes to a journal."""

from modellink.eval.backends.backend import Backend, Likelihood, Request
from modellink.eval.runner import evaluate
from modellink.eval.task import Task, load_task, task_names

__all__ = ["Backend", "Likelihood", "Request", "Task", "evaluate", "load_task", "task_names"]

__version__ = "0.1.0"
