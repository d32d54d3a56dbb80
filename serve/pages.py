"""Which pages of the KV cache are free. Plain Python: a page is its number."""

from collections.abc import Iterable

# Of the memory that is free once the weights are loaded, what the cache takes; the rest is for what
# steps need while they run, which is most for a long prompt's chunk.
MEMORY_SHARE = 0.8
# Where a device does not tell its memory, as a CPU does not.
DEFAULT_PAGES = 1024


def pages_that_fit(page_bytes: int, memory: dict[str, int] | None) -> int:
    """Pages of a cache in the memory that is free now.

    Args:
      page_bytes: of a page, keys and values of all layers.
      memory: a device's `memory_stats()`, with "bytes_limit" and "bytes_in_use".

    Raises:
      MemoryError: not one fits.
    """
    if not memory or "bytes_limit" not in memory:
        return DEFAULT_PAGES
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    pages = int(MEMORY_SHARE * free) // page_bytes
    if pages < 1:
        raise MemoryError(f"{free} bytes are free, a page of the cache takes {page_bytes}.")
    return pages


class PagePool:
    """The free list of a cache of `total` pages; whoever takes a page gives it back once."""

    def __init__(self, total: int):
        if total < 1:
            raise ValueError(f"A cache needs at least one page, got {total}.")
        self.total = total
        # Lowest numbers go out first: a page that was just given back is the warmest.
        self._free = list(range(total - 1, -1, -1))
        self._is_free = [True] * total

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, which are the caller's from now on.

        Raises:
          MemoryError: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} pages asked for, {len(self._free)} of {self.total} free.")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._is_free[page] = False
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages to the free list.

        Raises:
          ValueError: a page that is free already, or no page of this pool.
        """
        for page in pages:
            if not 0 <= page < self.total or self._is_free[page]:
                raise ValueError(f"Page {page} was given back, but it is not taken.")
            self._is_free[page] = True
            self._free.append(page)
