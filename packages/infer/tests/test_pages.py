"""Pages: taken, shared, given back, and found again; and what a batch does when there are too few."""

from __future__ import annotations

import random

import pytest
import torch

from modellink.infer.pages import PAGE_SIZE, RELEASED, CachedSequence, PagePool, PageTables
from modellink.kernels.errors import ModelLinkError


def filled(tables: PageTables, tokens: list[int]) -> CachedSequence:
    """A row whose tokens are all computed."""
    row = CachedSequence(list(tokens))
    tables.admit(row)
    assert tables.grow(row, len(tokens))
    tables.advance(row, len(tokens) - row.computed)
    return row


def test_a_prompt_finds_the_pages_of_the_same_beginning():
    tables = PageTables([PagePool(8, None)])
    first = filled(tables, list(range(2 * PAGE_SIZE + 5)))
    second = CachedSequence([*range(2 * PAGE_SIZE), 7, 7])
    tables.admit(second)
    assert second.computed == 2 * PAGE_SIZE and second.tables[0] == first.tables[0][:2]
    other = CachedSequence([1, *range(1, 2 * PAGE_SIZE), 7])  # differs in its first token: nothing after it is the same
    tables.admit(other)
    assert other.computed == 0
    again = CachedSequence(list(range(2 * PAGE_SIZE)))  # the last token is always computed
    tables.admit(again)
    assert again.computed == PAGE_SIZE


def test_pages_outlive_their_row_until_the_room_is_needed():
    tables = PageTables([pool := PagePool(3, None)])
    tables.release(filled(tables, list(range(2 * PAGE_SIZE))))
    assert pool.available == 3
    back = CachedSequence(list(range(2 * PAGE_SIZE + 1)))
    tables.admit(back)
    assert back.computed == 2 * PAGE_SIZE and pool.available == 1
    tables.release(back)
    filled(tables, [5] * (3 * PAGE_SIZE))
    gone = CachedSequence(list(range(2 * PAGE_SIZE + 1)))
    tables.admit(gone)
    assert gone.computed == 0


def test_a_row_that_does_not_fit_takes_nothing():
    tables = PageTables([pool := PagePool(3, None)])
    row = filled(tables, [1] * PAGE_SIZE)
    assert not tables.grow(row, 4 * PAGE_SIZE) and pool.available == 2
    assert tables.grow(row, 3 * PAGE_SIZE) and pool.available == 0


def test_a_window_gives_its_pages_back_and_is_shared_all_the_same():
    window = PAGE_SIZE + 3
    tables = PageTables([whole := PagePool(20, None), pool := PagePool(8, window)])
    row = filled(tables, list(range(5 * PAGE_SIZE)))
    assert (whole.used, pool.used) == (5, 2) and row.tables[1] == [RELEASED] * 3 + row.tables[1][3:]
    second = CachedSequence([*range(5 * PAGE_SIZE), 9])
    tables.admit(second)
    assert second.computed == 5 * PAGE_SIZE and second.tables[1][:3] == [RELEASED] * 3
    shorter = CachedSequence([*range(2 * PAGE_SIZE), 9])  # what it would see of the window's pages is gone, or not
    tables.admit(shorter)
    assert shorter.computed == 2 * PAGE_SIZE  # idle pages keep their content


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_never_used_twice_and_none_is_lost(seed):
    chance = random.Random(seed)
    tables = PageTables([PagePool(24, None), PagePool(16, PAGE_SIZE + 1)])
    rows: list[CachedSequence] = []
    for _ in range(300):
        if rows and chance.random() < 0.4:
            tables.release(rows.pop(chance.randrange(len(rows))))
        else:
            row = CachedSequence([chance.randrange(2)] * chance.randrange(1, PAGE_SIZE)
                                 + [3] * chance.randrange(1, 3 * PAGE_SIZE))
            tables.admit(row)
            if tables.grow(row, len(row.tokens)):
                tables.advance(row, len(row.tokens) - row.computed)
                rows.append(row)
            else:
                tables.release(row)
        for number, pool in enumerate(tables.pools):
            held = {page: [row for row in rows if page in row.tables[number]] for row in rows for page in row.tables[number]}
            held.pop(RELEASED, None)
            assert pool.used == len(held)
            for page, users in held.items():  # who shares a page has the same tokens up to its end
                place = users[0].tables[number].index(page)
                assert len({tuple(user.tokens[:(place + 1) * PAGE_SIZE]) for user in users}) == 1
                assert all(user.tables[number].index(page) == place for user in users)
    for row in rows:
        tables.release(row)
    assert all(pool.used == 0 for pool in tables.pools)


@pytest.fixture
def batch(engine):
    """`batch(tokens, rows, budget)` over a cache of its own."""
    from modellink.infer.batch import ContinuousBatch
    return lambda tokens, rows=8, budget=64: Batch(
        engine.network, engine.network.make_cache(max_sequences=rows, max_chunk=budget, tokens=tokens), rows=rows, budget=budget)


def finish(batch, engine, requests, *, join_every: int = 0) -> list[list[int]]:
    """Tokens of requests that join at once, or one after so many steps each."""
    from modellink.infer.request import Completion
    answers = [Completion.start(request, engine.tokenizer) for request in requests]
    waiting = list(answers)
    steps = 0
    while waiting or not batch.idle:
        while waiting and (not join_every or steps % join_every == 0):
            batch.add(waiting.pop(0))
            if join_every:
                break
        batch.step()
        steps += 1
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "join_every"), [(4096, 0), (4096, 3), (256, 0), (256, 2)])
def test_any_mixture_gives_each_what_it_gets_alone(engine, batch, seed, tokens, join_every):
    """Also with so few pages that rows must leave and be computed anew, and with beginnings in common."""
    chance = random.Random(seed)
    head = [chance.randrange(3, 379) for _ in range(70)]
    prompts = [(head if chance.random() < 0.5 else []) + [chance.randrange(3, 379) for _ in range(chance.randrange(1, 60))]
               for _ in range(9)]
    requests = [engine.requests(prompt, max_new_tokens=chance.randrange(1, 40), ignore_eos=True)[0] for prompt in prompts]
    alone = [engine.complete([request])[0].token_ids for request in requests]
    crowd = batch(tokens)
    assert finish(crowd, engine, requests, join_every=join_every) == alone
    assert all(pool.used == 0 for pool in crowd.cache.pools)


def test_a_common_beginning_is_computed_once(engine, batch, monkeypatch):
    counted = []
    whole = engine.network.logits
    monkeypatch.setattr(engine.network, "logits", lambda work: (counted.append(work.token_ids.numel()), whole(work))[1])
    head = [7] * 100
    crowd = batch(4096)
    finish(crowd, engine, engine.requests([[*head, 8, 9]], max_new_tokens=1))
    assert sum(counted) == 102
    counted.clear()
    finish(crowd, engine, engine.requests([[*head, 10], [*head, 11]], max_new_tokens=1))
    assert sum(counted) == 2 * (101 - 96)


@pytest.mark.parametrize("rows", [3, 8])
def test_a_beginning_that_comes_several_times_at_once_is_computed_once(engine, batch, monkeypatch, rows):
    """Chats with one system prompt, questions with the same examples, several answers to one prompt."""
    counted = []
    whole = engine.network.logits
    head = [7 + place % 50 for place in range(100)]  # three whole pages
    prompts = [[*head, 8 + number] for number in range(6)] + [[9] * 20]
    alone = [engine.generate([prompt], max_new_tokens=6, ignore_eos=True)[0].token_ids for prompt in prompts]
    monkeypatch.setattr(engine.network, "logits", lambda work: (counted.append(work.token_ids.numel()), whole(work))[1])
    crowd = batch(4096, rows)
    assert finish(crowd, engine, engine.requests(prompts, max_new_tokens=6, ignore_eos=True)) == alone
    assert sum(counted) == 101 + 5 * (101 - 96) + 20 + 7 * 5
    counted.clear()
    requests = engine.requests([9, *head], max_new_tokens=6, ignore_eos=True, temperature=2.0, seed=1, num_return_sequences=8)
    found = finish(crowd, engine, requests)
    assert sum(counted) == 101 + 7 * (101 - 96) + 8 * 5
    monkeypatch.undo()
    assert found == [answer.token_ids for request in requests for answer in engine.complete([request])]
    assert all(pool.used == 0 for pool in crowd.cache.pools)


def test_who_leads_may_leave(engine, batch):
    """Rows that wait for another's pages compute them themselves when it is taken out, or has to wait for room."""
    from modellink.infer.request import Completion
    head = [7 + place % 50 for place in range(130)]
    requests = engine.requests([[*head, 8 + number] for number in range(3)], max_new_tokens=6, ignore_eos=True)
    alone = [engine.complete([request])[0].token_ids for request in requests]
    crowd = batch(4096)
    answers = [Completion.start(request, None) for request in requests]
    for answer in answers:
        crowd.add(answer)
    crowd.step()
    crowd.remove(answers[0])
    while not crowd.idle:
        crowd.step()
    assert [answer.token_ids for answer in answers[1:]] == alone[1:]


def test_a_window_in_every_layer_bounds_what_fits(folder):
    """A cache smaller than what a window and a piece need holds only its pages; a larger one any length."""
    from modellink.infer import load
    from modellink.infer.batch import ContinuousBatch
    from modellink.infer.request import Completion
    engine = load(folder("mistral"), device="cpu")
    rows = [[7 + (place * place + row) % 300 for place in range(150)] for row in range(3)]
    requests = engine.requests(rows, max_new_tokens=20, ignore_eos=True)
    small = ContinuousBatch(engine.network, engine.network.make_cache(max_sequences=3, max_chunk=64, tokens=160), max_sequences=3, token_budget=64)
    assert [pool.window for pool in small.cache.pools] == [40] and small.cache.tokens == 160
    with pytest.raises(ModelLinkError, match="170 tokens does not fit into a cache of 160"):
        small.add(Completion.start(requests[0], None))
    large = ContinuousBatch(engine.network, engine.network.make_cache(max_sequences=3, max_chunk=64, tokens=192), max_sequences=3, token_budget=64)  # for one at a time
    assert large.cache.tokens > 1 << 40
    assert finish(large, engine, requests) == [engine.complete([request])[0].token_ids for request in requests]


def test_a_request_that_will_never_fit_is_refused(engine, batch):
    from modellink.infer.request import Completion
    (request,) = engine.requests([5] * 60, max_new_tokens=10)
    with pytest.raises(ModelLinkError, match="70 tokens does not fit into a cache of 64"):
        batch(64).add(Completion.start(request, None))


def test_fork_shares_full_pages_and_copies_the_one_in_work(engine):
    cache = engine.network.make_cache(max_sequences=2, max_chunk=64, tokens=8 * PAGE_SIZE)
    cache.keys[1].normal_()  # new memory may hold what is no number, which equals nothing
    row = filled(cache.tables, list(range(PAGE_SIZE + 3)))
    other = cache.fork(row, [*row.tokens])
    assert other.tables[0][0] == row.tables[0][0] and other.tables[0][1] != row.tables[0][1]
    assert torch.equal(*(cache.keys[1][held.tables[0][1] * PAGE_SIZE:][:3] for held in (row, other)))
