# SPDX-License-Identifier: Apache-2.0
"""Bookkeeping of a paged cache: which page holds which tokens, which pages are free, and which can be shared.

A page holds PAGE_SIZE consecutive tokens of a sequence. A full page is identified by a digest of all tokens
up to its end, so sequences with a common prefix share its pages; a page without users keeps its contents
until the memory is needed. Layers with a sliding window have a pool of their own and release pages that the
window has passed. Plain Python: the tensors are in cache.py.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE_SIZE = 32  # tokens
RELEASED = -1  # page table entry of a page that the window has passed


class PagePool:
    """The pages of all layers with the same window (None: full attention).

    Attributes:
        pages: number of pages.
        window: in tokens.
    """

    def __init__(self, pages: int, window: int | None) -> None:
        self.pages, self.window = pages, window
        # lowest first, so that a sequence tends to get neighboring pages
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        # full pages without users, least recently used first
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Number of pages that can be allocated."""
        return len(self._free) + len(self._reusable)

    @property
    def used(self) -> int:
        return self.pages - self.available

    def allocate(self) -> int:
        """Return a page with one user; the least recently used reusable page is overwritten if no page is
        free."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._reusable.popitem(last=False)
            del self._by_digest[self._digests.pop(page)]
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """Add a user to a page and return the page."""
        if page != RELEASED:
            self._users[page] += 1
            self._reusable.pop(page, None)
        return page

    def release(self, page: int) -> None:
        """Remove a user from a page."""
        if page == RELEASED:
            return
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._digests:
                self._reusable[page] = None
            else:
                self._free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Record the digest of a full page, so that other sequences can find it."""
        if page != RELEASED and digest not in self._by_digest and page not in self._digests:
            self._by_digest[digest], self._digests[page] = page, digest

    def find(self, digest: bytes) -> int | None:
        return self._by_digest.get(digest)

    def first_visible(self, position: int) -> int:
        """Return the first position that the token at `position` attends to."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(eq=False)
class CachedSequence:
    """A sequence in the cache.

    Attributes:
        tokens: all token ids.
        computed: how many of them have been computed; the cache holds those that a window has not passed.
        tables: page numbers in order, one list per pool.
        digests: of the full pages, computed as needed.
    """

    tokens: list[int]
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def digest(self, page: int) -> bytes:
        """Return the digest of all tokens up to the end of a full page."""
        while len(self.digests) <= page:
            number = len(self.digests)
            previous = self.digests[-1] if self.digests else b""
            tokens = array("q", self.tokens[number * PAGE_SIZE:(number + 1) * PAGE_SIZE])
            self.digests.append(hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest())
        return self.digests[page]


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, computed in one pass: one token to decode, more to
    prefill."""

    sequence: CachedSequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.tokens[self.start:self.end]


class PageTables:
    """The page tables of all sequences over the pools of a cache."""

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self.pools = pools

    def admit(self, sequence: CachedSequence, *, shared: bool = True) -> None:
        """Give a sequence the pages that already hold its prefix. At least its last token is left to compute.
        """
        sequence.computed = PAGE_SIZE * self._known_pages(sequence) if shared else 0
        sequence.tables = []
        for pool in self.pools:
            first = pool.first_visible(sequence.computed) // PAGE_SIZE
            found = [pool.find(sequence.digest(page))
                     for page in range(first, sequence.computed // PAGE_SIZE)]
            sequence.tables.append([RELEASED] * first + [pool.share(page) for page in found
                                                         if page is not None])

    def _known_pages(self, sequence: CachedSequence) -> int:
        """Count the leading pages that are cached, as far as the token after them can attend to all it needs.
        """
        limit = (len(sequence.tokens) - 1) // PAGE_SIZE
        for pool in self.pools:
            if pool.window is None:
                limit = next((page for page in range(limit) if pool.find(sequence.digest(page)) is None),
                             limit)
        windows = [pool for pool in self.pools if pool.window is not None]
        for count in range(limit, 0, -1):
            if all(pool.find(sequence.digest(page)) is not None for pool in windows
                   for page in range(pool.first_visible(count * PAGE_SIZE) // PAGE_SIZE, count)):
                return count
        return 0

    def grow(self, sequence: CachedSequence, length: int) -> bool:
        """Allocate pages for the first `length` tokens. Return False and allocate nothing if there are too
        few pages."""
        wanted = [-(-length // PAGE_SIZE) - len(table) for table in sequence.tables]
        if any(count > pool.available for count, pool in zip(wanted, self.pools, strict=True)):
            return False
        for count, pool, table in zip(wanted, self.pools, sequence.tables, strict=True):
            table += [pool.allocate() for _ in range(count)]
        return True

    def advance(self, sequence: CachedSequence, count: int, *, shared: bool = True) -> None:
        """Record that `count` more tokens are computed: register full pages and release those that a window
        has passed."""
        before, sequence.computed = sequence.computed, sequence.computed + count
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            if shared:
                for page in range(before // PAGE_SIZE, sequence.computed // PAGE_SIZE):
                    pool.register(table[page], sequence.digest(page))
            page = pool.first_visible(sequence.computed) // PAGE_SIZE - 1
            while page >= 0 and table[page] != RELEASED:
                pool.release(table[page])
                table[page] = RELEASED
                page -= 1

    def release(self, sequence: CachedSequence) -> None:
        """Release all pages of a sequence; full ones stay available to others as a prefix."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            for page in reversed(table):  # the end of a prompt is overwritten before its beginning
                pool.release(page)
        sequence.tables, sequence.computed = [], 0
