"""The shapes that steps are compiled for, and all padding to them.

Letters: B rows, T tokens in a prefill, P pages a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxcodec.models.cache import PageTable

# Below these a smaller program saves less time than its compilation costs.
MIN_TOKENS = 16
MIN_PAGES = 4


class Row(NamedTuple):
    """One sequence's share of a device call.

    Attributes:
      tokens: to be fed, one for a decode step.
      length: tokens of the sequence that are in the cache already.
      pages: its pages, at least those that this call reads and writes.
      slot: its adapter.
    """

    tokens: Sequence[int]
    length: int
    pages: Sequence[int]
    slot: int


class Batch(NamedTuple):
    """Padded arguments of a step, on the device.

    Attributes:
      table: pages int32 [B, P] and length int32 [B]; a row of padding has no page.
      tokens: int32 [B, T].
      counts: int32 [B], real tokens of each row; 0 for a row of padding.
      slots: int32 [B]; 0, the zero adapter, for a row of padding.
    """

    table: PageTable
    tokens: jax.Array
    counts: jax.Array
    slots: jax.Array


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending sizes; a batch is padded to the least that holds it.

    Attributes:
      rows: of a decode step (a prefill has one row).
      tokens: of a prefill.
      pages: of a row's page table.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def powers_of_two(cls, max_rows: int, max_tokens: int, max_pages: int) -> "Buckets":
        """Powers of two up to the given sizes, which are the last bucket each."""
        return cls(
            _powers(1, max_rows), _powers(MIN_TOKENS, max_tokens), _powers(MIN_PAGES, max_pages)
        )

    def check_holds(self, rows: int, tokens: int, pages: int) -> None:
        """Refuse buckets that are too small.

        Raises:
          ValueError: a step of so many rows, tokens of a prefill or pages a row fits none.
        """
        for name, needed in (("rows", rows), ("tokens", tokens), ("pages", pages)):
            sizes = getattr(self, name)
            if not sizes or sorted(sizes) != list(sizes) or sizes[-1] < needed:
                raise ValueError(f"Buckets of {name} must ascend to {needed} or more, got {sizes}.")

    def decode(self, rows: Sequence[Row], no_page: int) -> Batch:
        """A decode step of `rows`.

        Args:
          no_page: the cache's number of pages, which is no page.
        """
        width = max((len(row.pages) for row in rows), default=1)
        return pad(rows, no_page, _least(self.rows, len(rows)), 1, _least(self.pages, width))

    def prefill(self, row: Row, no_page: int) -> Batch:
        """A prefill of one row."""
        T, P = _least(self.tokens, len(row.tokens)), _least(self.pages, len(row.pages))
        return pad([row], no_page, 1, T, P)

    def decode_shapes(self) -> list[tuple[int, int]]:
        """Every (B, P) that `decode` can give."""
        return [(B, P) for B in self.rows for P in self.pages]

    def prefill_shapes(self, page_size: int) -> list[tuple[int, int]]:
        """Every (T, P) that `prefill` can give: T is no bucket too large for tokens in P pages."""
        return [
            (T, P)
            for P in self.pages
            for T in self.tokens
            if T <= _least(self.tokens, min(P * page_size, self.tokens[-1]))
        ]


def pad(rows: Sequence[Row], no_page: int, B: int, T: int, P: int) -> Batch:
    """Rows as arrays of [B, T] tokens and [B, P] pages."""
    pages = np.full((B, P), no_page, np.int32)
    tokens = np.zeros((B, T), np.int32)
    length, counts, slots = (np.zeros(B, np.int32) for _ in range(3))
    for b, row in enumerate(rows):
        pages[b, : len(row.pages)] = row.pages
        tokens[b, : len(row.tokens)] = row.tokens
        length[b], counts[b], slots[b] = row.length, len(row.tokens), row.slot
    pages, length, tokens, counts, slots = jax.device_put((pages, length, tokens, counts, slots))
    return Batch(PageTable(pages, length), tokens, counts, slots)


def _least(sizes: tuple[int, ...], needed: int) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise ValueError(f"No bucket holds {needed}; the sizes are {sizes}.")


def _powers(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)
