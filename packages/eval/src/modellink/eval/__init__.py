# SPDX-License-Identifier: Apache-2.0
"""Benchmark scores for language models. A benchmark is a YAML file; every answered question is recorded in a journal."""

from modellink.eval.backends.backend import Backend, Completion, GenerationRequest, Likelihood, LikelihoodRequest, Turn
from modellink.eval.prompts import EvalSettings
from modellink.eval.runner import evaluate
from modellink.eval.sandbox import Sandbox
from modellink.eval.task import Task
from modellink.eval.taskfile import load_task, task_names

__all__ = [
           "Backend",
           "Completion",
           "EvalSettings",
           "GenerationRequest",
           "Likelihood",
           "LikelihoodRequest",
           "Sandbox",
           "Task",
           "Turn",
           "evaluate",
           "load_task",
           "task_names",
]

__version__ = "0.1.0"
