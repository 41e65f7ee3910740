# SPDX-License-Identifier: Apache-2.0
"""`modellink-infer`: reads options, checks them, and calls the engine.

Everything that can be checked without the model is checked before torch is imported, everything else before
the model is built.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from modellink.core.launch import under_launcher
from modellink.infer import launch
from modellink.infer.options import ChatOptions, GenerationOptions, ModelOptions, PromptOptions, ServeOptions
from modellink.infer.original import translate_original
from modellink.infer.prompt_input import read_prompts
from modellink.kernels.command import command, group
from modellink.kernels.errors import ModelLinkError, run_command
from modellink.kernels.general_options import DryRun, print_plan
from modellink.kernels.options import Layer, resolve

if TYPE_CHECKING:
    from modellink.infer.plan import LoadPlan

GENERATE = """modellink-infer generate --load ./Qwen2.5-7B \\
    --prompt "The capital of France is\""""


@group(example=GENERATE)
def infer() -> None:
    """Generate text, chat and serve, from any checkpoint, on Ascend NPUs, CUDA GPUs and CPUs."""


@command(ModelOptions, PromptOptions, GenerationOptions, name="generate", example=GENERATE, starts=True)
def generate(given: Layer, dry_run: DryRun | None) -> None:
    """Complete prompts, or answer them with --chat. Prompts come from --prompt, --prompt-file or stdin."""
    resolved = resolve([ModelOptions, PromptOptions, GenerationOptions], given)
    model, options, generation = resolved[ModelOptions], resolved[PromptOptions], resolved[GenerationOptions]
    options = replace(options, chat=options.chat or model.template is not None)
    if options.stream and max(generation.num_beams, generation.num_return_sequences) > 1:
        raise ModelLinkError("only a single completion per prompt can be streamed", where="--stream",
                             fix="remove --stream, or --num-beams and --num-return-sequences")
    first_rank = launch.is_first_rank()
    arguments = generation.arguments(set(given.values), sample=False)
    from_stdin = not options.prompt and options.prompt_file is None
    prompts = read_prompts(options) if first_rank and not (dry_run and from_stdin) else []
    plan = launch.open_model(model)
    arguments |= {"prompt_type": plan.prompt_type, "logprobs": options.logprobs}
    from modellink.infer.prompts import make_requests
    requests = [request for prompt in prompts
                for request in make_requests(prompt, plan.spec, plan.tokenizer, **arguments)]
    if plan.tokenizer is None:
        raise ModelLinkError("the checkpoint has no tokenizer", where=plan.source.folder,
                             fix="set --tokenizer-name-or-path to the model's Hugging Face folder")
    if dry_run:
        _print_plan(dry_run, model, plan, ("prompts", "read from stdin" if from_stdin else f"{len(prompts):,}"))
        return
    if launch.must_start_ranks(model):
        with launch.prompts_as_file(prompts if from_stdin else None) as more:
            launch.start_ranks(model, more)
    engine = launch.build_engine(model, plan, options.batch_size)
    # on several machines only one has the files and terminal
    prompts, requests = engine.network.broadcast((prompts, requests))
    from modellink.infer.printing import print_completions, print_streams
    start = time.monotonic()
    if options.stream:
        tokens = print_streams(engine, requests, first_rank=first_rank)
    else:
        tokens = print_completions(engine, prompts, requests, first_rank=first_rank, as_json=options.json)
    if first_rank:
        seconds = time.monotonic() - start
        print(f"{tokens} tokens, {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


@command(ModelOptions, ChatOptions, GenerationOptions, name="chat", starts=True,
         example="modellink-infer chat --load ./Qwen2.5-7B-Instruct")
def chat(given: Layer, dry_run: DryRun | None) -> None:
    """Chat with a model. /clear (or clear, new) forgets the conversation; /quit (or /exit, quit, exit, q)
    exits; Ctrl-C stops the current answer."""
    resolved = resolve([ModelOptions, ChatOptions, GenerationOptions], given)
    model, options = resolved[ModelOptions], resolved[ChatOptions]
    arguments = resolved[GenerationOptions].arguments(set(given.values), sample=True)
    plan = launch.open_model(model)
    arguments["prompt_type"] = plan.prompt_type
    from modellink.infer.chat import Conversation, chat_loop
    from modellink.infer.prompts import make_requests
    conversation = Conversation(options.system, options.history_turns,
                                use_template=model.hf_chat_template is not False)
    first_prompt = Conversation(use_template=conversation.use_template).prompt("hello")
    # check that there is a template for a user message
    make_requests(first_prompt, plan.spec, plan.tokenizer, **arguments)
    if dry_run:
        _print_plan(dry_run, model, plan, ("template", plan.prompt_type or "the tokenizer's own"))
        return
    if launch.must_start_ranks(model):
        signal.signal(signal.SIGINT, lambda *_: None)  # the ranks handle it
        launch.start_ranks(model)
    first_rank = launch.is_first_rank()
    if not first_rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first rank decides when an answer stops
    chat_loop(launch.build_engine(model, plan, 1), conversation, first_rank=first_rank, **arguments)


@command(ModelOptions, ServeOptions, name="serve", starts=True,
         example="modellink-infer serve --load ./Qwen2.5-7B-Instruct --port 8000")
def serve(given: Layer, dry_run: DryRun | None) -> None:
    """Serve a model over HTTP, with OpenAI's API and a chat page."""
    if "replica_url" in given.values:
        _forward(given, dry_run)
        return
    resolved = resolve([ModelOptions, ServeOptions], given)
    model, options = resolved[ModelOptions], resolved[ServeOptions]
    from modellink.infer.server import run
    run.check_installed()
    if options.replicas > 1 and under_launcher():
        raise ModelLinkError("replicas cannot be started under torchrun", where="--replicas",
                             fix="run the command without torchrun")
    plan = launch.open_model(model)
    if dry_run:
        _print_plan(dry_run, model, plan, ("address", f"http://{options.host}:{options.port}"), replicas=options.replicas)
        return
    first_rank = launch.is_first_rank()
    sockets = run.bind(options.host, options.port) if first_rank else []
    if options.replicas > 1:
        from modellink.infer.server.replicas import device_shares, make_replicas
        device = plan.device
        devices = device.module.device_count() if device.module else 0
        shares = device_shares(device.kind, devices, options.replicas, model.layout().world_size)
        run.serve_replicas(make_replicas(options.replicas, sys.argv[1:], shares), sockets,
                           max_waiting=options.max_waiting, max_body=options.max_body)
        return
    if launch.must_start_ranks(model):
        for socket in sockets:
            socket.close()  # the first rank binds the port
        launch.start_ranks(model, forward=(signal.SIGINT, signal.SIGTERM))
    engine = launch.build_engine(model, plan, options.batch_size)
    if not first_rank:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the first rank decides when to stop
    name = options.served_model_name or plan.source.folder.resolve().name
    run.serve(engine, sockets, name=name, api_key=options.key, max_waiting=options.max_waiting,
              max_body=options.max_body)


def _forward(given: Layer, dry_run: DryRun | None) -> None:
    """Forward requests to running servers."""
    if wrong := set(given.values) - {"replica_url", "host", "port", "max_waiting", "max_body"}:
        name = "--" + min(wrong).replace("_", "-")
        raise ModelLinkError(f"{name} must be set for the servers that --replica-url names", where=name,
                             fix=f"start each of them with {name}, and remove it here")
    options = resolve([ServeOptions], given)[ServeOptions]
    from modellink.infer.server import run
    run.check_installed()
    if dry_run:
        print_plan([("address", f"http://{options.host}:{options.port}"), ("servers", ", ".join(options.replica_url))])
        return
    from modellink.infer.server.replicas import Replica
    replicas = [Replica(index, url.rstrip("/")) for index, url in enumerate(options.replica_url)]
    run.serve_replicas(replicas, run.bind(options.host, options.port), max_waiting=options.max_waiting,
                       max_body=options.max_body)


def _print_plan(dry_run: DryRun, model: ModelOptions, plan: LoadPlan, row: tuple[str, object], *, replicas: int = 1) -> None:
    """Print what a command would do, for --dry-run."""
    dry_run.check_devices(replace(plan.layout, dp=plan.layout.dp * replicas))
    print_plan([
        ("checkpoint", f"{plan.source.folder}, {plan.source.describe()}"), ("family", plan.source.family),
        ("precision", str(plan.dtype).removeprefix("torch.")), ("layout", f"{plan.layout} on {plan.device.kind}"),
        ("replicas", replicas if replicas > 1 else None), ("longest sequence", f"{plan.spec.max_position_embeddings:,} tokens"),
        row])


for each in (generate, chat, serve):
    infer.add_command(each)


def main() -> None:
    run_command(_run)


def _run() -> None:
    command = infer.commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is not None:
        # also for the ranks that run this command line
        sys.argv[2:] = translate_original(sys.argv[2:], command)
    infer(standalone_mode=False)


if __name__ == "__main__":
    main()
