# SPDX-License-Identifier: Apache-2.0
"""Generation against transformers on random models; stops, streams, log-probabilities and arguments."""

from __future__ import annotations

import numpy
import pytest
import torch

from modellink.infer import load
from modellink.kernels.errors import ModelLinkError


def greedy(model, ids: list[int], count: int) -> list[int]:
    """Return the completion of transformers, which ends at an end token of the generation config."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_greedy_tokens_equal_transformers(folder, family, prompts):
    import transformers
    engine = load(folder(family), device="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    found = engine.generate(prompts, max_new_tokens=40)
    expected = [greedy(model, engine.tokenizer.encode(prompt), 40) for prompt in prompts]
    assert [one.token_ids for one in found] == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts)  # else the test would prove little


def test_sequences_that_end_early_do_not_affect_others(engine, prompts):
    single = [engine.generate(prompt, max_new_tokens=30, ignore_eos=True)[0].token_ids for prompt in prompts]
    stop = single[1][4]
    found = engine.generate(prompts, max_new_tokens=30, ignore_eos=True, stop=stop)
    expected = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in single]
    assert [one.token_ids for one in found] == expected
    assert len(found[1].token_ids) <= 5 and max(len(completion.token_ids) for completion in found) == 30


def test_samples_do_not_depend_on_the_batch(engine, prompts):
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "seed": 11}
    batched = [one.token_ids for one in engine.generate(prompts, **options)]
    assert batched == [engine.generate(prompt, **options)[0].token_ids for prompt in prompts]
    assert batched == [one.token_ids for one in engine.generate(prompts, **options)]
    assert batched != [one.token_ids for one in engine.generate(prompts, **options | {"seed": 12})]


def test_more_prompts_than_fit_into_a_batch(engine, prompts, monkeypatch):
    expected = engine.generate(prompts, max_new_tokens=5)
    monkeypatch.setattr(engine, "batch_size", 4)
    assert engine.generate(prompts, max_new_tokens=5) == expected


def test_logprobs_equal_one_pass_over_the_full_sequence(engine, prompts, full_logits):
    for completion, prompt in zip(engine.generate(prompts, max_new_tokens=15, logprobs=True), prompts,
                                  strict=True):
        ids = engine.tokenizer.encode(prompt)
        reference = full_logits(ids + completion.token_ids)[len(ids) - 1:-1]
        of_tokens = reference[range(len(reference)), completion.token_ids].tolist()
        assert completion.logprobs == pytest.approx(of_tokens, abs=1e-4)
    assert engine.generate("The", max_new_tokens=1)[0].logprobs is None


def test_logprobs_of_samples_are_unfiltered(engine, full_logits):
    (completion,) = engine.generate([7, 8, 9], max_new_tokens=6, temperature=2.0, top_k=5, seed=1,
                                    logprobs=True, ignore_eos=True)
    reference = full_logits([7, 8, 9, *completion.token_ids])[2:-1]
    assert completion.logprobs == pytest.approx(reference[range(6), completion.token_ids].tolist(), abs=1e-4)


def test_prompt_logprobs_equal_one_pass_over_the_full_sequence(engine, prompts, full_logits):
    # one twice, which must not use the shared prefix, and one of the maximum length
    asked = [*prompts, prompts[-1], [5] * 256]
    engine.generate(prompts, max_new_tokens=1)
    found = engine.generate(asked, max_new_tokens=0, prompt_logprobs=True, top_logprobs=2)
    for completion, prompt in zip(found, asked, strict=True):
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        reference = full_logits(ids)[:-1]
        assert completion.prompt_logprobs == pytest.approx(reference[range(len(reference)), ids[1:]].tolist(),
                                                           abs=1e-4)
        assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "length")


def test_prompt_logprobs_with_chunked_prefill_and_preemption(engine, full_logits):
    """The cache does not hold three sequences: the last one is recomputed, and none of its log-probabilities
    is added twice."""
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.request import Completion, GenerationRequest
    cache = engine.network.make_cache(max_sequences=3, max_chunk=16, tokens=160)
    batch = ContinuousBatch(engine.network, cache, max_sequences=3, token_budget=16)
    sequences = [[7 + index % 30 + number for index in range(40 + 13 * number)] for number in range(3)]
    completions = [Completion.start(GenerationRequest(sequence, 20, prompt_logprobs=True, top_logprobs=1),
                                    None)
                   for sequence in sequences]
    for completion in completions:
        batch.add(completion)
    waited = False
    while not batch.idle:
        batch.step()
        waited = waited or any(entry.completion.prompt_logprobs for entry in batch.waiting)
    assert waited and all(pool.used == 0 for pool in cache.pools)
    for completion, sequence in zip(completions, sequences, strict=True):
        reference = full_logits(sequence)[:-1]
        of_prompt = reference[range(len(reference)), sequence[1:]].tolist()
        assert completion.prompt_logprobs == pytest.approx(of_prompt, abs=1e-4)
        best = [step[0][1] for step in completion.prompt_top_logprobs]
        assert best == pytest.approx(reference.max(-1).values.tolist(), abs=1e-4)
        assert completion.token_ids == engine.generate([sequence], max_new_tokens=20,
                                                       ignore_eos=True)[0].token_ids


def test_the_cache_has_the_requested_size_or_is_refused(llama, engine, monkeypatch):
    from modellink.infer.cache import cache_bytes
    cache = engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96)
    sizes = {"tokens": 96, "max_sequences": 2, "max_chunk": 64, "tp": 1, "dtype": torch.float32}
    needed = cache_bytes(engine.spec, range(3), **sizes)
    assert needed == 96 * 3 * 2 * 2 * 20 * 4 and 0 < cache.bytes - needed < 5000  # one more slot per layer
    with pytest.raises(ModelLinkError,
                       match=r"a cache of 10,000,000,000,000 tokens needs 9,600,000.0 GB, and [\d.,]+ GB"):
        load(llama, device="cpu", cache_tokens=10**13).generate("The", max_new_tokens=2)
    monkeypatch.setattr(type(engine.network._memory), "available", lambda self: needed - 1)
    with pytest.raises(ModelLinkError, match="use at most 64"):
        engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96)
    half = engine.network.make_cache(max_sequences=2, max_chunk=64, most=96)
    assert half.max_sequence_tokens == 32  # half of the free memory, in full pages


def test_forget_drops_the_cached_prefixes(llama, computed):
    engine = load(llama, device="cpu")
    text = [7] * 100

    def run() -> tuple[object, int]:
        computed.clear()
        return (engine.generate([text], max_new_tokens=1), engine.score([text])), sum(computed)
    (first, tokens), (second, fewer) = run(), run()
    engine.forget()
    third, again = run()
    assert first == second == third
    assert tokens == again == 199 > fewer


def test_a_stream_without_free_pages_is_an_error(engine, monkeypatch):
    monkeypatch.setitem(engine.__dict__, "cache",
                        engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96))
    first = engine.stream([5] * 60, max_new_tokens=30, ignore_eos=True)
    next(first)
    with pytest.raises(ModelLinkError, match="other batches occupy the cache"):
        next(engine.stream([6] * 60, max_new_tokens=30, ignore_eos=True))
    assert len(list(first)) > 3 and len(first.generation.token_ids) == 30


def first_occurrence(engine) -> tuple[list[int], int]:
    """Return the greedy tokens of a prompt, and the index of one, at least 5, that occurs there first."""
    ids = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)[0].token_ids
    index = next(index for index in range(5, 30) if ids[index] not in ids[:index])
    return ids, index


def test_an_end_token_of_the_generation_config_ends_a_completion(engine, monkeypatch):
    ids, index = first_occurrence(engine)
    assert set(engine.tokenizer.eos_token_ids) == {0, 2}
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", (2, ids[index]))
    (completion,) = engine.generate("The quick", max_new_tokens=30)
    assert (completion.token_ids, completion.finish_reason) == (ids[:index + 1], "stop")


def test_a_stop_id_ends_a_completion(engine):
    ids, index = first_occurrence(engine)
    (completion,) = engine.generate("The quick", max_new_tokens=30, stop=[ids[index]], ignore_eos=True)
    assert (completion.token_ids, completion.finish_reason) == (ids[:index + 1], "stop")


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(engine):
    reference = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)[0].text
    stop = reference[12:15]
    (completion,) = engine.generate("The quick", max_new_tokens=30, stop=stop, ignore_eos=True)
    assert (completion.text, completion.finish_reason) == (reference[:reference.index(stop)], "stop")
    assert len(completion.token_ids) < 30


def test_max_new_tokens_ends_a_completion(engine):
    (completion,) = engine.generate("The quick", max_new_tokens=3, ignore_eos=True)
    assert (len(completion.token_ids), completion.finish_reason, completion.prompt_tokens) == (
        3, "length", len(engine.tokenizer.encode("The quick")))


def test_a_chat_is_rendered_with_the_template(engine):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊"}]
    text = ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nGrüße 🦊<|im_end|>\n"
            "<|im_start|>assistant\n")
    expected = engine.generate(engine.tokenizer.encode(text), max_new_tokens=8)
    assert engine.generate(chat, max_new_tokens=8) == expected == engine.generate([chat, chat],
                                                                                  max_new_tokens=8)[1:]


def test_the_pieces_of_a_stream_join_to_the_text(engine, prompts):
    for prompt in prompts:
        # samples incomplete characters too
        options = {"max_new_tokens": 40, "temperature": 1.3, "top_k": 0, "seed": 5}
        stream = engine.stream(prompt, **options)
        pieces = list(stream)
        (completion,) = engine.generate(prompt, **options)
        assert stream.generation == completion
        assert "".join(pieces) == completion.text == engine.tokenizer.decode(completion.token_ids)
        assert len(pieces) > 5


def test_a_cancelled_stream_ends(engine):
    stream = engine.stream("The quick", max_new_tokens=100, ignore_eos=True)
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    assert stream.generation.finish_reason == "cancelled"
    assert len(stream.generation.token_ids) < 100 and first + "".join(rest) == stream.generation.text


def test_a_stream_can_be_cancelled_during_prefill(engine, monkeypatch):
    passes, logits = [], engine.network.logits

    def cancelling(*args):
        passes.append(args)
        stream.cancel()
        return logits(*args)
    monkeypatch.setattr(engine.network, "logits", cancelling)
    monkeypatch.setattr(engine.cache, "max_chunk", 32)
    stream = engine.stream(list(range(3, 203)), max_new_tokens=40)
    assert "".join(stream) == "" and len(passes) == 1
    assert stream.generation.finish_reason == "cancelled" and not stream.generation.token_ids


def test_an_unfinished_stream_has_no_generation(engine):
    stream = engine.stream("The", max_new_tokens=50)
    next(stream)
    with pytest.raises(ModelLinkError, match="not finished"):
        _ = stream.generation


def test_the_maximum_length_can_be_used_fully(engine):
    (completion,) = engine.generate([5] * 200, max_new_tokens=56, ignore_eos=True)
    assert len(completion.token_ids) == 56
    assert len(engine.generate([5] * 250, ignore_eos=True)[0].token_ids) == 6  # default: what fits


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ([5] * 200, {"max_new_tokens": 57}, "exceed the model"), ([5] * 256, {}, "maximum length is 256"),
    ("", {}, "no tokens"), ([], {}, "no tokens"), ([379], {}, "token id 379"), ([-1], {}, "token id -1"),
    ("a", {"max_new_tokens": 0}, "at least 1"), ("a", {"stop": ""}, "stop string is empty"),
    ("a", {"temperature": float("nan")}, "nan is out of range")])
def test_invalid_prompts_and_arguments_are_refused(engine, prompt, options, message):
    with pytest.raises(ModelLinkError, match=message):
        engine.generate([prompt], **options)


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([]) == []


def test_half_precision_runs(llama, engine):
    half = load(llama, device="cpu", dtype="bfloat16")
    (completion,) = half.generate("The quick", max_new_tokens=4, logprobs=True, ignore_eos=True)
    expected = half.loglikelihood([(engine.tokenizer.encode("The quick"), completion.token_ids)])
    assert sum(completion.logprobs) == pytest.approx(expected[0][0], abs=0.5)


def test_uninitialized_memory_does_not_change_the_tokens(engine):
    """The slots with which a short sequence is padded to a long one were never written."""
    sequences = [[5] * 30, [300, 7]]
    expected = [engine.generate(sequence, max_new_tokens=25)[0].token_ids for sequence in sequences]
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory with NaN
    try:
        assert [one.token_ids for one in engine.generate(sequences, max_new_tokens=25)] == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_penalties_work_in_a_batch(engine, theirs):
    sequences = [[7] * 30, [300, 7, 8]]
    found = engine.generate(sequences, max_new_tokens=20, repetition_penalty=1.4, ignore_eos=True)
    for sequence, completion in zip(sequences, found, strict=True):
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([sequence]), max_new_tokens=20, min_new_tokens=20,
                                  do_sample=False, pad_token_id=0, repetition_penalty=1.4)
        assert completion.token_ids == out[0, len(sequence):].tolist()


def test_several_samples_per_prompt(engine):
    options = {"temperature": 1.5, "max_new_tokens": 8, "ignore_eos": True}
    found = engine.generate(["The", "Köln"], num_return_sequences=3, seed=4, **options)
    assert found == [engine.generate(prompt, seed=seed, **options)[0] for prompt in ("The", "Köln")
                     for seed in (4, 5, 6)]


def test_argument_names_of_the_original(engine):
    ids = engine.tokenizer.encode("The quick")
    reference = engine.generate("The quick", max_new_tokens=6, ignore_eos=True, logprobs=True)
    assert engine.generate("The quick", max_length=len(ids) + 6, max_new_tokens=0, ignore_eos=True,
                           return_output_log_probs=True) == reference
    (completion,) = engine.generate("The quick", max_new_tokens=6, ignore_eos=True, include_input=True)
    assert completion.text == "The quick" + reference[0].text
    assert engine.generate("The quick", max_new_tokens=6, ignore_eos=True, detokenize=False)[0].text == ""
    stopped = engine.generate("The quick", max_new_tokens=6, eos_token_id=reference[0].token_ids[2])[0]
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 3


def test_ignored_arguments_of_the_original(engine, capsys, monkeypatch):
    from modellink.infer import arguments
    monkeypatch.setattr(arguments, "_noted", set())
    expected = engine.generate("The quick", max_new_tokens=6)
    told = {"pad_token_id": 0, "bos_token_id": 1, "tokenizer": object(), "recompute": True}
    assert engine.generate(input_ids="The quick", max_new_tokens=6, **told) == expected
    assert engine.generate("The quick", max_new_tokens=6, **told) == expected
    notes = capsys.readouterr().err
    assert [notes.count(f"note: {name} has no effect") for name in told] == [1] * 4  # once, not per call
    stream = engine.generate("The quick", stream=True, max_new_tokens=6)
    assert "".join(stream) == expected[0].text and [stream.generation] == expected
    with pytest.raises(ModelLinkError, match="there is no prompt"):
        engine.generate()
    with pytest.raises(ModelLinkError, match="both prompts and input_ids"):
        engine.generate("a", input_ids=[5])


@pytest.mark.parametrize("make", [torch.tensor, numpy.array,
                                  lambda sequences: [torch.tensor(sequence) for sequence in sequences],
                                  lambda sequences: [[numpy.int64(item) for item in sequence]
                                                     for sequence in sequences]])
def test_tensors_and_arrays_are_token_ids(engine, make):
    sequences = [[5, 6, 7], [8, 9, 10]]
    assert engine.generate(make(sequences), max_new_tokens=4) == engine.generate(sequences, max_new_tokens=4)
    assert engine.generate(make(sequences)[0], max_new_tokens=4) == engine.generate(sequences[0],
                                                                                    max_new_tokens=4)


@pytest.mark.parametrize("prompt", [torch.tensor(5), torch.tensor([0.5, 2.0]), torch.zeros(1, 1, 2).long(),
                                    [5.5], 7.5])
def test_other_tensors_are_refused(engine, prompt):
    with pytest.raises(ModelLinkError, match="prompt"):
        engine.generate(prompt)


def test_top_logprobs_are_the_most_likely_tokens(engine, full_logits):
    (completion,) = engine.generate([7, 8, 9], max_new_tokens=5, top_logprobs=3, ignore_eos=True)
    reference = full_logits([7, 8, 9, *completion.token_ids])[2:-1]
    for step, expected in zip(completion.top_logprobs, reference, strict=True):
        values, ids = expected.topk(3)
        assert [token for token, _ in step] == ids.tolist()
        assert [value for _, value in step] == pytest.approx(values.tolist(), abs=1e-4)
    assert completion.logprobs == pytest.approx([step[0][1] for step in completion.top_logprobs])
