"""What the device is told of the running sequences, on the host: a row each, padded to buckets.

Letters: R rows of running sequences, B rows of a launch, T tokens, P pages a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Columns[T](NamedTuple):
    """The numbers of a row of a launch; its pages follow them."""

    row: T  # its place among the running ones, R for padding
    fresh: T  # it was not in a launch before: `token` and `length` tell where it starts
    token: T  # the last that is known
    length: T  # tokens of it that are in the cache
    budget: T  # most tokens to make
    slot: T  # its adapter
    encoder_slot: T  # the adapter that writes its cache


WIDTH = len(Columns._fields)
_AT = Columns(*range(WIDTH))


class RowTable:
    """The rows of all running sequences; a launch takes some of them.

    Args:
      rows: R; a further row is padding's.
      pages: most pages of a sequence.
      no_page: a number that is no page, for where there is none.
    """

    def __init__(self, rows: int, pages: int, no_page: int):
        self.padding = rows
        self._no_page = no_page
        self._numbers = np.zeros((rows + 1, WIDTH + pages), np.int32)
        self._numbers[:, _AT.row] = np.arange(rows + 1)
        self._numbers[:, WIDTH:] = no_page
        self._fresh = np.ones(rows + 1, np.int32)

    def enter(self, row: int, token: int, length: int, slot: int, encoder_slot: int) -> None:
        """Write a sequence into a row, which it enters with its next launch."""
        self._numbers[row, :WIDTH] = Columns(row, 1, token, length, 0, slot, encoder_slot)
        self._fresh[row] = 1

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """Write the pages of a sequence."""
        self._numbers[row, WIDTH : WIDTH + len(pages)] = pages
        self._numbers[row, WIDTH + len(pages) :] = self._no_page

    def launch(self, rows: Sequence[int], budgets: Sequence[int], B: int, P: int) -> np.ndarray:
        """int32 [B, WIDTH + P] for a decode launch of `rows`; they are not fresh any more."""
        chosen = np.full(B, self.padding)
        chosen[: len(rows)] = rows
        numbers = self._numbers[chosen, : WIDTH + P]
        numbers[:, _AT.fresh] = self._fresh[chosen]
        numbers[: len(rows), _AT.budget] = budgets
        self._fresh[rows] = 0
        return numbers


class PrefillRow(NamedTuple):
    """One sequence's share of a prefill.

    Attributes:
      tokens: to be written.
      start: position of the first.
      pages: of the sequence, those of `tokens` and what is before them.
      slot: the adapter that writes.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int


class PrefillNumbers[T](NamedTuple):
    """A prefill's rows, padded.

    Attributes:
      tokens: int32 [B, T].
      numbers: int32 [B, 3 + P], start, count and slot of each row, then its pages.
    """

    tokens: T
    numbers: T


def pad_prefill(
    rows: Sequence[PrefillRow], B: int, T: int, P: int, no_page: int
) -> PrefillNumbers[np.ndarray]:
    """Rows of a prefill; those of padding have no page and no tokens."""
    tokens, numbers = np.zeros((B, T), np.int32), np.zeros((B, 3 + P), np.int32)
    numbers[:, 3:] = no_page
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        numbers[b, :3] = row.start, len(row.tokens), row.slot
        numbers[b, 3 : 3 + len(row.pages)] = row.pages
    return PrefillNumbers(tokens, numbers)
