"""Generation against transformers on random models, and what an answer is made of."""

from __future__ import annotations

import numpy
import pytest
import torch

from modellink.infer import load
from modellink.kernels.errors import ModelLinkError


def greedy(model, ids: list[int], count: int) -> list[int]:
    """transformers' answer to one prompt; it ends with an end token of the generation config."""
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_greedy_tokens_are_those_of_transformers(folder, family, prompts):
    import transformers
    engine, model = load(folder(family), device="cpu"), transformers.AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    found = engine.generate(prompts, max_new_tokens=40)
    expected = [greedy(model, engine.tokenizer.encode(prompt), 40) for prompt in prompts]
    assert [answer.token_ids for answer in found] == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts)  # or nothing would be proven


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_gives_each_request_what_it_gets_alone(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (5,), generator=generator).tolist()
    rows = [torch.randint(3, 379, (length,), generator=generator).tolist() for length in lengths]
    together = engine.generate(rows, max_new_tokens=25)
    assert [answer.token_ids for answer in together] == [engine.generate(row, max_new_tokens=25)[0].token_ids for row in rows]


def test_rows_that_end_early_leave_the_others_alone(engine, prompts):
    alone = [engine.generate(prompt, max_new_tokens=30, ignore_eos=True)[0].token_ids for prompt in prompts]
    stop = alone[1][4]
    found = engine.generate(prompts, max_new_tokens=30, ignore_eos=True, stop=stop)
    expected = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    assert [answer.token_ids for answer in found] == expected
    assert len(found[1].token_ids) <= 5 and max(len(answer.token_ids) for answer in found) == 30


def test_draws_in_a_batch_are_those_alone(engine, prompts):
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "seed": 11}
    together = [answer.token_ids for answer in engine.generate(prompts, **options)]
    assert together == [engine.generate(prompt, **options)[0].token_ids for prompt in prompts]
    assert together == [answer.token_ids for answer in engine.generate(prompts, **options)]
    assert together != [answer.token_ids for answer in engine.generate(prompts, **options | {"seed": 12})]


def test_more_prompts_than_fit_into_a_batch(engine, prompts, monkeypatch):
    expected = engine.generate(prompts, max_new_tokens=5)
    monkeypatch.setattr(engine, "batch_size", 4)
    assert engine.generate(prompts, max_new_tokens=5) == expected


def test_with_a_cache_as_without(engine):
    ids = [5, 300, 17, 42]
    for token in engine.generate(ids, max_new_tokens=20, ignore_eos=True)[0].token_ids:
        with torch.inference_mode():
            assert int(engine.network.run_model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_logprobs_are_those_of_a_pass_over_the_whole(engine, prompts, full_logits):
    for answer, prompt in zip(engine.generate(prompts, max_new_tokens=15, logprobs=True), prompts, strict=True):
        ids = engine.tokenizer.encode(prompt)
        whole = full_logits(ids + answer.token_ids)[len(ids) - 1:-1]
        assert answer.logprobs == pytest.approx(whole[range(len(whole)), answer.token_ids].tolist(), abs=1e-4)
    assert engine.generate("The", max_new_tokens=1)[0].logprobs is None


def test_logprobs_of_draws_are_the_models_own(engine, full_logits):
    (answer,) = engine.generate([7, 8, 9], max_new_tokens=6, temperature=2.0, top_k=5, seed=1, logprobs=True, ignore_eos=True)
    whole = full_logits([7, 8, 9, *answer.token_ids])[2:-1]
    assert answer.logprobs == pytest.approx(whole[range(6), answer.token_ids].tolist(), abs=1e-4)


def test_logprobs_of_prompts_are_those_of_a_pass_over_the_whole(engine, prompts, full_logits):
    asked = [*prompts, prompts[-1], [5] * 256]  # one of them twice: what others computed is no help; and one as long as may be
    engine.generate(prompts, max_new_tokens=1)
    found = engine.generate(asked, max_new_tokens=0, prompt_logprobs=True, top_logprobs=2)
    for answer, prompt in zip(found, asked, strict=True):
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        whole = full_logits(ids)[:-1]
        assert answer.prompt_logprobs == pytest.approx(whole[range(len(whole)), ids[1:]].tolist(), abs=1e-4)
        assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "length")


def test_logprobs_of_prompts_in_pieces_and_after_a_row_had_to_wait(engine, full_logits):
    """A cache in which three rows do not fit together: the last one is computed anew, and none of its numbers twice."""
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.request import Completion, GenerationRequest
    cache = engine.network.make_cache(max_sequences=3, max_chunk=16, tokens=160)
    batch = ContinuousBatch(engine.network, cache, max_sequences=3, token_budget=16)
    rows = [[7 + place % 30 + row for place in range(40 + 13 * row)] for row in range(3)]
    answers = [Completion.start(GenerationRequest(row, 20, prompt_logprobs=True, top_logprobs=1), None) for row in rows]
    for answer in answers:
        batch.add(answer)
    waited = False
    while not batch.idle:
        batch.step()
        waited = waited or any(entry.completion.prompt_logprobs for entry in batch.waiting)
    assert waited and all(pool.used == 0 for pool in cache.pools)
    for answer, row in zip(answers, rows, strict=True):
        whole = full_logits(row)[:-1]
        assert answer.prompt_logprobs == pytest.approx(whole[range(len(whole)), row[1:]].tolist(), abs=1e-4)
        assert [step[0][1] for step in answer.prompt_top_logprobs] == pytest.approx(whole.max(-1).values.tolist(), abs=1e-4)
        assert answer.token_ids == engine.generate([row], max_new_tokens=20, ignore_eos=True)[0].token_ids


def test_a_cache_is_as_large_as_was_asked_for_or_refused(llama, engine, monkeypatch):
    from modellink.infer.cache import cache_bytes
    cache = engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96)
    sizes = {"tokens": 96, "max_sequences": 2, "max_chunk": 64, "tp": 1, "dtype": torch.float32}
    needed = cache_bytes(engine.spec, range(3), **sizes)
    assert needed == 96 * 3 * 2 * 2 * 20 * 4 and 0 < cache.bytes - needed < 5000  # a slot of each layer is nobody's
    with pytest.raises(ModelLinkError, match=r"a cache of 10,000,000,000,000 tokens needs 9,600,000.0 GB, and [\d.,]+ GB"):
        load(llama, device="cpu", cache_tokens=10**13).generate("The", max_new_tokens=2)
    monkeypatch.setattr(type(engine.network._memory), "available", lambda self: needed - 1)
    with pytest.raises(ModelLinkError, match="use at most 64"):
        engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96)
    assert engine.network.make_cache(max_sequences=2, max_chunk=64, most=96).tokens == 32  # half of what is there, in whole pages


def test_what_is_forgotten_is_computed_again(llama, monkeypatch):
    engine = load(llama, device="cpu")
    counted = []
    whole = engine.network.logits
    monkeypatch.setattr(engine.network, "logits", lambda work: (counted.append(work.token_ids.numel()), whole(work))[1])
    text = [7] * 100
    found = [(engine.generate([text], max_new_tokens=1), engine.score([text])) for _ in range(2)]
    again = sum(counted[2:])
    engine.forget()
    assert [(engine.generate([text], max_new_tokens=1), engine.score([text])), *found] == [found[0]] * 3
    assert (sum(counted[:2]), again, sum(counted[4:])) == (199, again, 199) and again < 199


def test_streams_that_hold_all_pages_are_named(engine, monkeypatch):
    monkeypatch.setitem(engine.__dict__, "cache", engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=96))
    first = engine.stream([5] * 60, max_new_tokens=30, ignore_eos=True)
    next(first)
    with pytest.raises(ModelLinkError, match="other batches occupy the cache"):
        next(engine.stream([6] * 60, max_new_tokens=30, ignore_eos=True))
    assert len(list(first)) > 3 and len(first.generation.token_ids) == 30


def first_occurrence(engine) -> tuple[list[int], int]:
    """Greedy tokens of a prompt, and one that did not come before the fifth."""
    ids = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)[0].token_ids
    place = next(place for place in range(5, 30) if ids[place] not in ids[:place])
    return ids, place


def test_an_end_token_of_the_generation_config_ends_an_answer(engine, monkeypatch):
    ids, place = first_occurrence(engine)
    assert set(engine.tokenizer.eos_token_ids) == {0, 2}
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", (2, ids[place]))
    (answer,) = engine.generate("The quick", max_new_tokens=30)
    assert (answer.token_ids, answer.finish_reason) == (ids[:place + 1], "stop")


def test_a_stop_id_ends_an_answer(engine):
    ids, place = first_occurrence(engine)
    (answer,) = engine.generate("The quick", max_new_tokens=30, stop=[ids[place]], ignore_eos=True)
    assert (answer.token_ids, answer.finish_reason) == (ids[:place + 1], "stop")


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(engine):
    whole = engine.generate("The quick", max_new_tokens=30, ignore_eos=True)[0].text
    stop = whole[12:15]
    (answer,) = engine.generate("The quick", max_new_tokens=30, stop=stop, ignore_eos=True)
    assert (answer.text, answer.finish_reason) == (whole[:whole.index(stop)], "stop")
    assert len(answer.token_ids) < 30


def test_length_ends_an_answer(engine):
    (answer,) = engine.generate("The quick", max_new_tokens=3, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason, answer.prompt_tokens) == (
        3, "length", len(engine.tokenizer.encode("The quick")))


def test_a_chat_goes_through_the_template(engine):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 🦊"}]
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nGrüße 🦊<|im_end|>\n<|im_start|>assistant\n"
    expected = engine.generate(engine.tokenizer.encode(text), max_new_tokens=8)
    assert engine.generate(chat, max_new_tokens=8) == expected == engine.generate([chat, chat], max_new_tokens=8)[1:]


def test_a_stream_is_the_text_in_pieces(engine, prompts):
    for prompt in prompts:
        options = {"max_new_tokens": 40, "temperature": 1.3, "top_k": 0, "seed": 5}  # odd bytes come, and whole characters
        stream = engine.stream(prompt, **options)
        pieces = list(stream)
        (answer,) = engine.generate(prompt, **options)
        assert stream.generation == answer
        assert "".join(pieces) == answer.text == engine.tokenizer.decode(answer.token_ids)
        assert len(pieces) > 5


def test_a_cancelled_stream_ends(engine):
    stream = engine.stream("The quick", max_new_tokens=100, ignore_eos=True)
    first = next(stream)
    stream.cancel()
    rest = list(stream)
    assert stream.generation.finish_reason == "cancelled"
    assert len(stream.generation.token_ids) < 100 and first + "".join(rest) == stream.generation.text


def test_a_stream_is_cancelled_while_its_prompt_is_computed(engine, monkeypatch):
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


def test_room_is_used_to_the_last_token(engine):
    (answer,) = engine.generate([5] * 200, max_new_tokens=56, ignore_eos=True)
    assert len(answer.token_ids) == 56
    assert len(engine.generate([5] * 250, ignore_eos=True)[0].token_ids) == 6  # nothing was said: what fits


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ([5] * 200, {"max_new_tokens": 57}, "exceed the model"), ([5] * 256, {}, "maximum length is 256"), ("", {}, "no tokens"),
    ([], {}, "no tokens"), ([379], {}, "token id 379"), ([-1], {}, "token id -1"), ("a", {"max_new_tokens": 0}, "at least 1"),
    ("a", {"stop": ""}, "stop string is empty"), ("a", {"temperature": float("nan")}, "nan is out of range")])
def test_what_cannot_be_answered_is_refused(engine, prompt, options, message):
    with pytest.raises(ModelLinkError, match=message):
        engine.generate([prompt], **options)


def test_no_prompts_no_answers(engine):
    assert engine.generate([]) == []


def test_half_precision_runs(llama, engine):
    half = load(llama, device="cpu", dtype="bfloat16")
    (answer,) = half.generate("The quick", max_new_tokens=4, logprobs=True, ignore_eos=True)
    expected = half.loglikelihood([(engine.tokenizer.encode("The quick"), answer.token_ids)])
    assert sum(answer.logprobs) == pytest.approx(expected[0][0], abs=0.5)


def test_memory_that_held_something_else_does_no_harm(engine):
    """A short row's slots beside a long row's newest tokens were never written."""
    rows = [[5] * 30, [300, 7]]
    expected = [engine.generate(row, max_new_tokens=25)[0].token_ids for row in rows]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert [answer.token_ids for answer in engine.generate(rows, max_new_tokens=25)] == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_penalties_work_in_a_batch(engine, theirs):
    rows = [[7] * 30, [300, 7, 8]]
    found = engine.generate(rows, max_new_tokens=20, repetition_penalty=1.4, ignore_eos=True)
    for row, answer in zip(rows, found, strict=True):
        with torch.inference_mode():
            out = theirs.generate(torch.tensor([row]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0,
                                  repetition_penalty=1.4)
        assert answer.token_ids == out[0, len(row):].tolist()


def test_several_answers_to_a_prompt(engine):
    options = {"temperature": 1.5, "max_new_tokens": 8, "ignore_eos": True}
    found = engine.generate(["The", "Köln"], num_return_sequences=3, seed=4, **options)
    assert found == [engine.generate(prompt, seed=seed, **options)[0] for prompt in ("The", "Köln") for seed in (4, 5, 6)]


def test_names_of_the_original(engine):
    ids = engine.tokenizer.encode("The quick")
    whole = engine.generate("The quick", max_new_tokens=6, ignore_eos=True, logprobs=True)
    assert engine.generate("The quick", max_length=len(ids) + 6, max_new_tokens=0, ignore_eos=True,
                           return_output_log_probs=True) == whole
    (answer,) = engine.generate("The quick", max_new_tokens=6, ignore_eos=True, include_input=True)
    assert answer.text == "The quick" + whole[0].text
    assert engine.generate("The quick", max_new_tokens=6, ignore_eos=True, detokenize=False)[0].text == ""
    stopped = engine.generate("The quick", max_new_tokens=6, eos_token_id=whole[0].token_ids[2])[0]
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 3


def test_names_of_the_originals_generate(engine, capsys, monkeypatch):
    from modellink.infer import prompts
    monkeypatch.setattr(prompts, "_noted", set())
    expected = engine.generate("The quick", max_new_tokens=6)
    told = {"pad_token_id": 0, "bos_token_id": 1, "tokenizer": object(), "recompute": True}
    assert engine.generate(input_ids="The quick", max_new_tokens=6, **told) == expected
    assert engine.generate("The quick", max_new_tokens=6, **told) == expected
    notes = capsys.readouterr().err
    assert [notes.count(f"note: {name} has no effect") for name in told] == [1] * 4  # once, not for each call
    stream = engine.generate("The quick", stream=True, max_new_tokens=6)
    assert "".join(stream) == expected[0].text and [stream.generation] == expected
    with pytest.raises(ModelLinkError, match="there is no prompt"):
        engine.generate()
    with pytest.raises(ModelLinkError, match="both prompts and input_ids"):
        engine.generate("a", input_ids=[5])


@pytest.mark.parametrize("make", [torch.tensor, numpy.array, lambda rows: [torch.tensor(row) for row in rows],
                                  lambda rows: [[numpy.int64(item) for item in row] for row in rows]])
def test_tensors_and_arrays_are_token_ids(engine, make):
    rows = [[5, 6, 7], [8, 9, 10]]
    assert engine.generate(make(rows), max_new_tokens=4) == engine.generate(rows, max_new_tokens=4)
    assert engine.generate(make(rows)[0], max_new_tokens=4) == engine.generate(rows[0], max_new_tokens=4)


@pytest.mark.parametrize("prompt", [torch.tensor(5), torch.tensor([0.5, 2.0]), torch.zeros(1, 1, 2).long(), [5.5], 7.5])
def test_other_tensors_are_refused(engine, prompt):
    with pytest.raises(ModelLinkError, match="prompt"):
        engine.generate(prompt)


def test_top_logprobs_are_the_best_of_the_distribution(engine, full_logits):
    (answer,) = engine.generate([7, 8, 9], max_new_tokens=5, top_logprobs=3, ignore_eos=True)
    whole = full_logits([7, 8, 9, *answer.token_ids])[2:-1]
    for step, expected in zip(answer.top_logprobs, whole, strict=True):
        values, ids = expected.topk(3)
        assert [token for token, _ in step] == ids.tolist()
        assert [value for _, value in step] == pytest.approx(values.tolist(), abs=1e-4)
    assert answer.logprobs == pytest.approx([step[0][1] for step in answer.top_logprobs])
