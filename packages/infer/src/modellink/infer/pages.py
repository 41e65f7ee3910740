"""Which pages of a cache hold which tokens: free ones, shared ones, and those that a later prompt may begin with.

A page holds SIZE consecutive tokens of a sequence. Full pages are known by a digest of every token up to their end, so that
requests with the same beginning share them; a page nobody uses any more keeps its content until the room is needed. Layers
with a sliding window have a pool of their own, whose pages are given back once they are behind the window. Plain Python: the
tensors are in cache.py.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

SIZE = 32  # tokens of a page
GONE = -1  # in a table: a page behind the window


class Pool:
    """The pages of the layers that have the same window (None: all tokens are kept)."""

    def __init__(self, pages: int, window: int | None) -> None:
        self.pages, self.window = pages, window
        self._free = list(range(pages - 1, -1, -1))  # the lowest first: neighbours, while there are
        self._users = [0] * pages
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages without users that a prompt may begin with, oldest first

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.pages - self.available

    def take(self) -> int:
        """A page for one user."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._by_digest[self._digests.pop(page)]
        self._users[page] = 1
        return page

    def share(self, page: int) -> int:
        """One more user of a page."""
        if page != GONE:
            self._users[page] += 1
            self._idle.pop(page, None)
        return page

    def drop(self, page: int) -> None:
        """One user less."""
        if page == GONE:
            return
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._digests:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, digest: bytes) -> None:
        """A page is full and stays as it is: its content is that of `digest`."""
        if page != GONE and digest not in self._by_digest and page not in self._digests:
            self._by_digest[digest], self._digests[page] = page, digest

    def find(self, digest: bytes) -> int | None:
        return self._by_digest.get(digest)

    def first_seen(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(eq=False)
class Row:
    """A sequence in the cache.

    Attributes:
        tokens: all of its tokens.
        computed: how many of them the cache holds (or held, where they are behind a window).
        tables: for each pool the pages of the row in order.
        digests: of its full pages, as far as they were asked for.
    """

    tokens: list[int]
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def digest(self, page: int) -> bytes:
        """Of all tokens to the end of a full page."""
        while len(self.digests) <= page:
            number = len(self.digests)
            before = self.digests[-1] if self.digests else b""
            tokens = array("q", self.tokens[number * SIZE:(number + 1) * SIZE])
            self.digests.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return self.digests[page]


class Tables:
    """The tables of all rows over the pools of a cache."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools

    def admit(self, row: Row, *, shared: bool = True) -> None:
        """Give a row the pages that hold the beginning of its tokens already; at least its last token is left to compute."""
        row.computed = SIZE * (self._known(row) if shared else 0)
        row.tables = []
        for pool in self.pools:
            first = pool.first_seen(row.computed) // SIZE
            found = [pool.find(row.digest(page)) for page in range(first, row.computed // SIZE)]
            row.tables.append([GONE] * first + [pool.share(page) for page in found if page is not None])

    def _known(self, row: Row) -> int:
        """How many pages from the start are there, as far as a token behind them sees."""
        limit = (len(row.tokens) - 1) // SIZE
        for pool in self.pools:
            if pool.window is None:
                limit = next((page for page in range(limit) if pool.find(row.digest(page)) is None), limit)
        for count in range(limit, 0, -1):
            if all(pool.find(row.digest(page)) is not None for pool in self.pools if pool.window is not None
                   for page in range(pool.first_seen(count * SIZE) // SIZE, count)):
                return count
        return 0

    def grow(self, row: Row, length: int) -> bool:
        """Room for the first `length` tokens of a row; False, and nothing taken, where there is not enough."""
        wanted = [-(-length // SIZE) - len(table) for table in row.tables]
        if any(count > pool.available for count, pool in zip(wanted, self.pools, strict=True)):
            return False
        for count, pool, table in zip(wanted, self.pools, row.tables, strict=True):
            table += [pool.take() for _ in range(count)]
        return True

    def advance(self, row: Row, count: int, *, shared: bool = True) -> None:
        """`count` more tokens of a row are computed: full pages become known, those behind a window are given back."""
        before, row.computed = row.computed, row.computed + count
        for pool, table in zip(self.pools, row.tables, strict=True):
            if shared:
                for page in range(before // SIZE, row.computed // SIZE):
                    pool.name(table[page], row.digest(page))
            page = pool.first_seen(row.computed) // SIZE - 1
            while page >= 0 and table[page] != GONE:
                pool.drop(table[page])
                table[page] = GONE
                page -= 1

    def release(self, row: Row) -> None:
        """Forget a row; what it computed may serve others."""
        for pool, table in zip(self.pools, row.tables, strict=True):
            for page in reversed(table):  # the end of a prompt goes before its beginning
                pool.drop(page)
        row.tables, row.computed = [], 0
