"""`modellink-infer`: a thin reading of options over the engine.

Everything that can be wrong is looked at before the model is built. With `--tp N` this process starts N ranks of itself and
waits; under torchrun, on one machine or several, each process does its part. The first rank reads prompts and prints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modellink.infer.options import AnswerOptions, ChatOptions, ModelOptions, PromptOptions, ServeOptions
from modellink.infer.original import in_our_words
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.options import Layer, command, resolve

if TYPE_CHECKING:
    from modellink.infer.engine import Engine
    from modellink.infer.request import Generation, Request

MODULE = "modellink.infer.cli"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def infer() -> None:
    """Generate text and chat, from any checkpoint, on Ascend NPUs, CUDA GPUs and CPUs."""


@command(ModelOptions, PromptOptions, AnswerOptions, name="generate")
def generate(given: Layer) -> None:
    """Continue a prompt, or answer it with --chat. The prompt is --prompt, --prompt-file, or stdin."""
    resolved = resolve([ModelOptions, PromptOptions, AnswerOptions], given)
    model, asked = resolved[ModelOptions], resolved[PromptOptions]
    asked = replace(asked, chat=asked.chat or bool(model.prompt_type or model.hf_chat_template))
    decoding, first = resolved[AnswerOptions], _first()
    if asked.stream and max(decoding.num_beams, decoding.num_return_sequences) > 1:
        raise ModelLinkError("a stream is one answer, as its tokens come", where="--stream",
                             fix="leave out --num-beams and --num-return-sequences")
    arguments = decoding.arguments(set(given.values), draws=False) if first else {}
    from_stdin = not asked.prompt and asked.prompt_file is None
    prompts = _prompts(asked) if first else []
    plan = model.plan(_local_rank())
    arguments |= {"prompt_type": plan.prompt_type, "logprobs": asked.logprobs}
    from modellink.infer.prompts import make_requests
    requests = [request for prompt in prompts for request in make_requests(prompt, plan.spec, plan.tokenizer, **arguments)]
    if plan.tokenizer is None:
        raise ModelLinkError("the checkpoint carries no tokenizer", where=plan.source.folder,
                             fix="give the Hugging Face folder of the model with --tokenizer-name-or-path")
    if _to_start(model):
        with _handed_over(prompts) if from_stdin else _nothing() as more:
            _start(model, more)
    engine = _engine(model, asked.batch_size)
    prompts, requests = engine.network.share((prompts, requests))  # of several machines one has the files and the terminal
    start = time.monotonic()
    tokens = _streamed(engine, requests, first) if asked.stream else _answered(engine, prompts, requests, first, asked.json)
    if first:
        seconds = time.monotonic() - start
        print(f"{tokens} tokens, {seconds:.1f} s, {tokens / seconds:.1f} tokens a second", file=sys.stderr)


@command(ModelOptions, ChatOptions, AnswerOptions, name="chat")
def chat(given: Layer) -> None:
    """Talk with a model. A line that says /clear, clear or new forgets what was said; /quit, /exit, quit, exit or q leaves;
    Ctrl-C stops an answer."""
    resolved = resolve([ModelOptions, ChatOptions, AnswerOptions], given)
    model, options = resolved[ModelOptions], resolved[ChatOptions]
    arguments = resolved[AnswerOptions].arguments(set(given.values), draws=True)
    plan = model.plan(_local_rank())
    arguments["prompt_type"] = plan.prompt_type
    from modellink.infer.chat import Conversation, talk
    from modellink.infer.prompts import make_requests
    template = model.hf_chat_template is not False
    hello = Conversation(template=template).ask("hello")
    make_requests(hello, plan.spec, plan.tokenizer, **arguments)  # whether there is a template, and it takes a user
    if _to_start(model):
        signal.signal(signal.SIGINT, lambda *_: None)  # the ranks take care of it
        _start(model, [])
    if not _first():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank says when an answer stops
    conversation = Conversation(options.system, options.history_turns, template)
    talk(_engine(model, 1), conversation, first_rank=_first(), **arguments)


@command(ModelOptions, ServeOptions, name="serve")
def serve(given: Layer) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to chat with."""
    if "replica_url" in given.values:
        return _serve_elsewhere(given)
    resolved = resolve([ModelOptions, ServeOptions], given)
    model, options = resolved[ModelOptions], resolved[ServeOptions]
    from modellink.core import launch
    from modellink.infer.server import run
    run.check_installed()
    if options.replicas > 1 and launch.under_launcher():
        raise ModelLinkError("replicas are processes of their own, started by the one in front", where="--replicas",
                             fix="run the command without torchrun")
    plan = model.plan(_local_rank())
    sockets = run.bind(options.host, options.port) if _first() else []
    if options.replicas > 1:
        from modellink.infer.server.replicas import device_shares, make_replicas
        device = plan.device
        shares = device_shares(device.kind, device.module.device_count() if device.module else 0, options.replicas,
                               model.layout().world_size)
        return run.serve_replicas(make_replicas(options.replicas, sys.argv[1:], shares), sockets,
                                  most_waiting=options.max_waiting, largest_body=options.max_body)
    if _to_start(model):
        for one in sockets:
            one.close()  # the first rank takes the port
        _start(model, [], forward=(signal.SIGINT, signal.SIGTERM))
    engine = _engine(model, options.batch_size)
    if not _first():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the first rank says when it ends
    run.serve(engine, sockets, name=options.served_model_name or plan.source.folder.resolve().name, api_key=options.key,
              most_waiting=options.max_waiting, largest_body=options.max_body)


def _serve_elsewhere(given: Layer) -> None:
    """In front of servers that have the model."""
    if wrong := set(given.values) - {"replica_url", "host", "port", "max_waiting", "max_body"}:
        raise ModelLinkError(f"--{min(wrong).replace('_', '-')} is for the servers that have the model", where="--replica-url",
                             fix="give it to each of them, and leave it out here")
    options = resolve([ServeOptions], given)[ServeOptions]
    from modellink.infer.server import run
    run.check_installed()
    from modellink.infer.server.replicas import Replica
    replicas = [Replica(index, url.rstrip("/")) for index, url in enumerate(options.replica_url)]
    run.serve_replicas(replicas, run.bind(options.host, options.port), most_waiting=options.max_waiting,
                       largest_body=options.max_body)


for each in (generate, chat, serve):
    infer.add_command(each)


def _prompts(asked: PromptOptions) -> list[Any]:
    """Texts, or with --chat lists of messages."""
    if asked.prompt_file is not None:
        texts = _from_file(asked.prompt_file)
    elif asked.prompt:
        texts = list(asked.prompt)
    else:
        texts = [sys.stdin.read().removesuffix("\n")]
    if not texts or not all(texts):
        raise ModelLinkError("there is no prompt", where=asked.prompt_file or ("--prompt" if asked.prompt else "stdin"),
                             fix="give one with --prompt, --prompt-file, or on stdin")
    if not asked.chat:
        if asked.system is not None:
            raise ModelLinkError("a system message belongs to a chat", where="--system", fix="add --chat")
        return texts
    head = [{"role": "system", "content": asked.system}] if asked.system is not None else []
    return [[*head, {"role": "user", "content": text}] if isinstance(text, str) else [*head, *text] for text in texts]


def _from_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLinkError(f"the prompts cannot be read: {error}", where=f"--prompt-file {path}") from None
    if path.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 and others may stand in a text of JSON
        if line.strip():
            prompts.append(_from_line(line, f"{path}, line {number}"))
    return prompts


def _from_line(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ModelLinkError(f"not JSON: {error}", where=where) from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return value
    raise ModelLinkError('a line is a text, or an object with "prompt" (a text) or "messages" (a list of objects)', where=where)


def _first() -> bool:
    """Whether this is the first rank, or the process that starts them."""
    return os.environ.get("RANK", "0") == "0"


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _to_start(model: ModelOptions) -> bool:
    """Whether the ranks are still to be started."""
    from modellink.core import launch
    return model.layout().world_size > 1 and not launch.under_launcher()


def _start(model: ModelOptions, more: list[str], forward: tuple[signal.Signals, ...] = ()) -> None:
    """Run this very command on every rank, and leave with their status."""
    from modellink.core import launch
    sys.exit(launch.spawn(model.layout().world_size, MODULE, [*sys.argv[1:], *more], forward=forward))


@contextmanager
def _handed_over(prompts: list[Any]) -> Iterator[list[str]]:
    """Arguments that give the ranks what was read from stdin, which only one process can read."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for prompt in prompts:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            file.write(json.dumps(text) + "\n")
        file.flush()
        yield ["--prompt-file", file.name]


@contextmanager
def _nothing() -> Iterator[list[str]]:
    yield []


def _engine(model: ModelOptions, batch_size: int) -> Engine:
    from modellink.infer.engine import Engine
    return Engine(model.plan(_local_rank()), batch_size=batch_size, cache_tokens=model.cache_tokens, native=model.native,
                  int8=model.int8, graphs=model.graphs, show=True)


def _streamed(engine: Engine, requests: list[Request], first: bool) -> int:
    """Print each answer as it is made; how many tokens they have."""
    from modellink.infer.engine import Stream
    tokens = 0
    for number, request in enumerate(requests, 1):
        stream = Stream(engine, request)
        if first:
            _heading(number, len(requests))
        for piece in stream:
            if first:
                print(piece, end="", flush=True)
        if first:
            print(flush=True)
        tokens += len(stream.generation.token_ids)
    return tokens


def _answered(engine: Engine, prompts: list[Any], requests: list[Request], first: bool, as_json: bool) -> int:
    """Print each answer when it and those before it are there; how many tokens they have."""
    from modellink.kernels.progress import Work
    count = sum(request.beams.count if request.beams else 1 for request in requests)
    each, number, tokens = count // len(prompts), 0, 0
    # on a terminal the answers show themselves how far it is
    with Work("answering", len(requests), unit="answers",
              show=first and len(requests) > 1 and not sys.stdout.isatty()) as work:
        for answers in engine.each(requests, work.advance):
            for answer in answers:
                number, tokens = number + 1, tokens + len(answer.token_ids)
                if first and as_json:
                    print(_json(prompts[(number - 1) // each], answer), flush=True)
                elif first:
                    _heading(number, count, "answer" if each > 1 else "prompt")
                    print(answer.text, flush=True)
    return tokens


def _json(prompt: Any, answer: Generation) -> str:
    values = {"prompt": prompt, "text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
    return json.dumps(values | ({} if answer.logprobs is None else {"logprobs": answer.logprobs}), ensure_ascii=False)


def _heading(number: int, count: int, what: str = "prompt") -> None:
    if count > 1:
        print(f"--- {what} {number} of {count} ---")


def main() -> None:
    run_command(_run)


def _run() -> None:
    command = infer.commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        sys.argv[2:] = in_our_words(sys.argv[2:], command)  # also for the ranks that are started with it
    infer(standalone_mode=False)


if __name__ == "__main__":
    main()
