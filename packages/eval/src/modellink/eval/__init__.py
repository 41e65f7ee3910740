"""Benchmark scores for language models: a benchmark is a YAML file, every answered question goes to a journal."""

from modellink.eval.backends.backend import Backend, Likelihood, Request, Turn, Writing, Written
from modellink.eval.prompts import Asking
from modellink.eval.runner import evaluate
from modellink.eval.sandbox import Sandbox
from modellink.eval.task import Task
from modellink.eval.taskfile import load_task, task_names

__all__ = ["Asking", "Backend", "Likelihood", "Request", "Sandbox", "Task", "Turn", "Writing", "Written", "evaluate", "load_task",
           "task_names"]

__version__ = "0.1.0"
