"""The shapes that steps are compiled for: whatever has to be done is padded to one of them.

Letters: B rows, T tokens a row of a prefill, P pages a row.
"""

import bisect
import dataclasses

# Below these a smaller program saves less time than its compilation costs.
MIN_TOKENS = 16
MIN_PAGES = 4


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending sizes; what is less is padded to the next.

    Attributes:
      rows: B of a decode launch.
      tokens: T of a prefill. A prefill has one row, or as many as make up the largest T together.
      pages: P of a page table.
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

    def decode(self, rows: int, pages: int) -> tuple[int, int]:
        """(B, P) of a decode launch of so many rows, the longest of so many pages."""
        return _least(self.rows, rows), _least(self.pages, pages)

    def prefill(self, rows: int, tokens: int, pages: int) -> tuple[int, int, int] | None:
        """(B, T, P) of a prefill of so many rows, the longest of so many tokens and pages.

        None if the rows are more than one prefill takes.
        """
        T, P = _least(self.tokens, tokens), _least(self.pages, pages)
        most = self.tokens[-1] // T
        return None if rows > most else (1 if rows == 1 else most, T, P)

    def decode_shapes(self) -> list[tuple[int, int]]:
        """Every (B, P) that `decode` can give."""
        return [(B, P) for B in self.rows for P in self.pages]

    def prefill_shapes(self, page_size: int) -> list[tuple[int, int, int]]:
        """Every (B, T, P) that `prefill` can give; T tokens take their pages."""
        return [
            (B, T, P)
            for P in self.pages
            for T in self.tokens
            if T <= _least(self.tokens, min(P * page_size, self.tokens[-1]))
            for B in sorted({1, self.tokens[-1] // T})
        ]


def _least(sizes: tuple[int, ...], needed: int) -> int:
    if needed > sizes[-1]:
        raise ValueError(f"No bucket holds {needed}; the sizes are {sizes}.")
    return sizes[bisect.bisect_left(sizes, needed)]


def _powers(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)
