# SPDX-License-Identifier: Apache-2.0
"""Pages are allocated, shared, released and found again; a batch works with too few of them."""

from __future__ import annotations

import random

import pytest
import torch

from modellink.infer.pages import PAGE_SIZE, RELEASED, CachedSequence, PagePool, PageTables
from modellink.kernels.errors import ModelLinkError


def filled(tables: PageTables, tokens: list[int]) -> CachedSequence:
    """Return a sequence whose tokens are all computed."""
    sequence = CachedSequence(list(tokens))
    tables.admit(sequence)
    assert tables.grow(sequence, len(tokens))
    tables.advance(sequence, len(tokens) - sequence.computed)
    return sequence


def test_a_common_prefix_shares_its_pages():
    tables = PageTables([PagePool(8, None)])
    first = filled(tables, list(range(2 * PAGE_SIZE + 5)))
    second = CachedSequence([*range(2 * PAGE_SIZE), 7, 7])
    tables.admit(second)
    assert second.computed == 2 * PAGE_SIZE and second.tables[0] == first.tables[0][:2]
    other = CachedSequence([1, *range(1, 2 * PAGE_SIZE), 7])  # the first token differs, so no page is equal
    tables.admit(other)
    assert other.computed == 0
    again = CachedSequence(list(range(2 * PAGE_SIZE)))  # the last token is always computed
    tables.admit(again)
    assert again.computed == PAGE_SIZE


def test_released_pages_are_found_until_their_memory_is_needed():
    tables = PageTables([pool := PagePool(3, None)])
    tables.release(filled(tables, list(range(2 * PAGE_SIZE))))
    assert pool.available == 3
    found = CachedSequence(list(range(2 * PAGE_SIZE + 1)))
    tables.admit(found)
    assert found.computed == 2 * PAGE_SIZE and pool.available == 1
    tables.release(found)
    filled(tables, [5] * (3 * PAGE_SIZE))
    evicted = CachedSequence(list(range(2 * PAGE_SIZE + 1)))
    tables.admit(evicted)
    assert evicted.computed == 0


def test_growing_beyond_the_pool_allocates_nothing():
    tables = PageTables([pool := PagePool(3, None)])
    sequence = filled(tables, [1] * PAGE_SIZE)
    assert not tables.grow(sequence, 4 * PAGE_SIZE) and pool.available == 2
    assert tables.grow(sequence, 3 * PAGE_SIZE) and pool.available == 0


def test_a_window_releases_pages_that_can_still_be_shared():
    window = PAGE_SIZE + 3
    tables = PageTables([full := PagePool(20, None), pool := PagePool(8, window)])
    sequence = filled(tables, list(range(5 * PAGE_SIZE)))
    assert (full.used, pool.used) == (5, 2) and sequence.tables[1] == [RELEASED] * 3 + sequence.tables[1][3:]
    second = CachedSequence([*range(5 * PAGE_SIZE), 9])
    tables.admit(second)
    assert second.computed == 5 * PAGE_SIZE and second.tables[1][:3] == [RELEASED] * 3
    shorter = CachedSequence([*range(2 * PAGE_SIZE), 9])
    tables.admit(shorter)
    assert shorter.computed == 2 * PAGE_SIZE  # released pages keep their contents


@pytest.mark.parametrize("seed", range(5))
def test_no_page_is_used_twice_or_lost(seed):
    chance = random.Random(seed)
    tables = PageTables([PagePool(24, None), PagePool(16, PAGE_SIZE + 1)])
    sequences: list[CachedSequence] = []
    for _ in range(300):
        if sequences and chance.random() < 0.4:
            tables.release(sequences.pop(chance.randrange(len(sequences))))
        else:
            tokens = [chance.randrange(2)] * chance.randrange(1, PAGE_SIZE)
            tokens += [3] * chance.randrange(1, 3 * PAGE_SIZE)
            sequence = CachedSequence(tokens)
            tables.admit(sequence)
            if tables.grow(sequence, len(tokens)):
                tables.advance(sequence, len(tokens) - sequence.computed)
                sequences.append(sequence)
            else:
                tables.release(sequence)
        check_users(tables, sequences)
    for sequence in sequences:
        tables.release(sequence)
    assert all(pool.used == 0 for pool in tables.pools)


def check_users(tables: PageTables, sequences: list[CachedSequence]) -> None:
    """Check that sequences which share a page have the same tokens up to its end, and that no other page is
    used."""
    for number, pool in enumerate(tables.pools):
        pages = {page for sequence in sequences for page in sequence.tables[number]} - {RELEASED}
        assert pool.used == len(pages)
        for page in pages:
            users = [sequence for sequence in sequences if page in sequence.tables[number]]
            index = users[0].tables[number].index(page)
            assert len({tuple(user.tokens[:(index + 1) * PAGE_SIZE]) for user in users}) == 1
            assert all(user.tables[number].index(page) == index for user in users)


@pytest.fixture
def batch(engine):
    """`batch(tokens, max_sequences, token_budget)`: an empty batch with its own cache."""
    from modellink.infer.batch import ContinuousBatch

    def make(tokens: int, max_sequences: int = 8, token_budget: int = 64) -> ContinuousBatch:
        cache = engine.network.make_cache(max_sequences=max_sequences, max_chunk=token_budget, tokens=tokens)
        return ContinuousBatch(engine.network, cache, max_sequences=max_sequences, token_budget=token_budget)
    return make


def finish(batch, engine, requests, *, join_every: int = 0) -> list[list[int]]:
    """Return the tokens of requests that join at once, or one every so many steps."""
    from modellink.infer.request import Completion
    completions = [Completion.start(request, engine.tokenizer) for request in requests]
    waiting = list(completions)
    steps = 0
    while waiting or not batch.idle:
        while waiting and (not join_every or steps % join_every == 0):
            batch.add(waiting.pop(0))
            if join_every:
                break
        batch.step()
        steps += 1
    return [one.token_ids for one in completions]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "join_every"), [(4096, 0), (4096, 3), (256, 0), (256, 2)])
def test_a_completion_does_not_depend_on_the_batch(engine, batch, seed, tokens, join_every):
    """Also if there are so few pages that sequences are preempted, and with common prefixes."""
    chance = random.Random(seed)
    prefix = [chance.randrange(3, 379) for _ in range(70)]
    prompts = [(prefix if chance.random() < 0.5 else []) + [chance.randrange(3, 379)
                                                            for _ in range(chance.randrange(1, 60))]
               for _ in range(9)]
    requests = [engine.requests(prompt, max_new_tokens=chance.randrange(1, 40), ignore_eos=True)[0]
                for prompt in prompts]
    expected = [engine.complete([request])[0].token_ids for request in requests]
    mixed = batch(tokens)
    assert finish(mixed, engine, requests, join_every=join_every) == expected
    assert all(pool.used == 0 for pool in mixed.cache.pools)


def test_a_cached_prefix_is_not_computed_again(engine, batch, computed):
    prefix = [7] * 100
    one = batch(4096)
    finish(one, engine, engine.requests([[*prefix, 8, 9]], max_new_tokens=1))
    assert sum(computed) == 102
    computed.clear()
    finish(one, engine, engine.requests([[*prefix, 10], [*prefix, 11]], max_new_tokens=1))
    assert sum(computed) == 2 * (101 - 96)


@pytest.mark.parametrize("max_sequences", [3, 8])
def test_a_prefix_of_concurrent_requests_is_computed_once(engine, batch, computed, max_sequences):
    """As in chats with one system message, questions with the same examples, several samples of one prompt.
    """
    prefix = [7 + position % 50 for position in range(100)]  # three full pages
    prompts = [[*prefix, 8 + number] for number in range(6)] + [[9] * 20]
    expected = [engine.generate([prompt], max_new_tokens=6, ignore_eos=True)[0].token_ids
                for prompt in prompts]
    computed.clear()
    one = batch(4096, max_sequences)
    assert finish(one, engine, engine.requests(prompts, max_new_tokens=6, ignore_eos=True)) == expected
    assert sum(computed) == 101 + 5 * (101 - 96) + 20 + 7 * 5
    computed.clear()
    requests = engine.requests([9, *prefix], max_new_tokens=6, ignore_eos=True, temperature=2.0, seed=1,
                               num_return_sequences=8)
    found = finish(one, engine, requests)
    assert sum(computed) == 101 + 7 * (101 - 96) + 8 * 5
    assert found == [completion.token_ids for request in requests
                     for completion in engine.complete([request])]
    assert all(pool.used == 0 for pool in one.cache.pools)


def test_sequences_that_wait_for_a_shared_page_continue_if_its_owner_leaves(engine, batch):
    from modellink.infer.request import Completion
    prefix = [7 + position % 50 for position in range(130)]
    requests = engine.requests([[*prefix, 8 + number] for number in range(3)], max_new_tokens=6,
                               ignore_eos=True)
    expected = [engine.complete([request])[0].token_ids for request in requests]
    one = batch(4096)
    completions = [Completion.start(request, None) for request in requests]
    for completion in completions:
        one.add(completion)
    one.step()
    one.remove(completions[0])
    while not one.idle:
        one.step()
    assert [one.token_ids for one in completions[1:]] == expected[1:]


def test_a_window_in_every_layer_limits_the_sequence_only_in_a_small_cache(folder):
    """A cache smaller than what the window and a chunk need holds that many tokens; a larger one holds any
    length."""
    from modellink.infer import load
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.request import Completion
    engine = load(folder("mistral"), device="cpu")

    def batch(tokens: int) -> ContinuousBatch:
        cache = engine.network.make_cache(max_sequences=3, max_chunk=64, tokens=tokens)
        return ContinuousBatch(engine.network, cache, max_sequences=3, token_budget=64)
    prompts = [[7 + (position * position + number) % 300 for position in range(150)] for number in range(3)]
    requests = engine.requests(prompts, max_new_tokens=20, ignore_eos=True)
    small = batch(160)
    assert [pool.window for pool in small.cache.pools] == [40] and small.cache.max_sequence_tokens == 160
    with pytest.raises(ModelLinkError, match="170 tokens does not fit into a cache of 160"):
        small.add(Completion.start(requests[0], None))
    large = batch(192)  # enough for one sequence at a time
    assert large.cache.max_sequence_tokens > 1 << 40
    assert finish(large, engine, requests) == [engine.complete([request])[0].token_ids
                                               for request in requests]


def test_a_request_that_can_never_fit_is_refused(engine, batch):
    from modellink.infer.request import Completion
    (request,) = engine.requests([5] * 60, max_new_tokens=10)
    with pytest.raises(ModelLinkError, match="70 tokens does not fit into a cache of 64"):
        batch(64).add(Completion.start(request, None))


def test_fork_shares_full_pages_and_copies_the_last_one(engine):
    cache = engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=8 * PAGE_SIZE)
    cache.keys[1].normal_()  # uninitialized memory may hold NaN, which equals nothing
    one = filled(cache.tables, list(range(PAGE_SIZE + 3)))
    other = cache.fork(one, [*one.tokens])
    assert other.tables[0][0] == one.tables[0][0] and other.tables[0][1] != one.tables[0][1]
    last = [cache.keys[1][sequence.tables[0][1] * PAGE_SIZE:][:3] for sequence in (one, other)]
    assert torch.equal(*last)
