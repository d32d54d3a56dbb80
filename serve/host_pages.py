"""Cold pages in host memory: what the prefix tree gives up is kept there, and found by its name.

`HostNames` decides, in plain Python; `HostPages` holds the contents and moves them.

Letters: N pages of one copy, L layers.
"""

import collections
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.models.cache import KVCache

# Pages that one launch copies: one shape, so that one program is compiled each way.
COPIED = 16


class Copies(NamedTuple):
    """What a plan copies, in this order, before it launches anything.

    Attributes:
      offloads: (name, page) to host memory.
      restores: (name, page) from there.
      dropped: names that host memory gives up.
    """

    offloads: list[tuple[bytes, int]]
    restores: list[tuple[bytes, int]]
    dropped: list[bytes]


class HostNames:
    """Names of the pages in host memory; those not used for longest make room.

    Args:
      limit: most pages; 0 keeps none.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"host_pages must be at least 0, got {limit}.")
        self.limit = limit
        self.offloaded = self.restored = 0
        self._names: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self._offloads: dict[bytes, int] = {}
        self._restores: list[tuple[bytes, int]] = []
        self._dropped: set[bytes] = set()

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def keep(self, name: bytes, page: int) -> None:
        """The tree gives a page up: copy it, unless it is here already."""
        if self.limit == 0:
            return
        if name not in self._names:
            self._offloads[name] = page
        self._names[name] = None
        self._names.move_to_end(name)
        while len(self._names) > self.limit:
            oldest, _ = self._names.popitem(last=False)
            self._dropped.add(oldest)

    def restore(self, name: bytes, page: int) -> None:
        """Copy a page back into page number `page` of the cache; it stays here too."""
        self._names.move_to_end(name)
        self._restores.append((name, page))

    def clear(self) -> None:
        """Forget all names, and what was to be copied."""
        self._names.clear()
        self._offloads, self._restores, self._dropped = {}, [], set()

    def copies(self) -> Copies:
        """What has to be copied since this was last asked for."""
        needed = {name for name, _ in self._restores}
        offloads = [
            (name, page)
            for name, page in self._offloads.items()
            if name in self._names or name in needed
        ]
        dropped = [name for name in self._dropped if name not in self._names]
        copies = Copies(offloads, self._restores, dropped)
        self.offloaded += len(offloads)
        self.restored += len(self._restores)
        self._offloads, self._restores, self._dropped = {}, [], set()
        return copies


class HostPages:
    """The contents of pages in host memory, by name."""

    def __init__(self):
        self._pages: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self._coming: list[tuple[Sequence[bytes], tuple[jax.Array, jax.Array]]] = []

    def copy(self, cache: KVCache, copies: Copies) -> KVCache:
        """Do what a plan says; returns the cache with the restored pages.

        Copies to the host are under way afterwards, and taken in with the next call.
        """
        self._take_in()
        for group in itertools.batched(copies.offloads, COPIED):
            names, pages = zip(*group, strict=True)
            contents = read_pages(cache, _padded(pages, 0))
            for array in contents:
                array.copy_to_host_async()
            self._coming.append((names, contents))
        if copies.restores:
            self._take_in()
        for group in itertools.batched(copies.restores, COPIED):
            names, pages = zip(*group, strict=True)
            k, v = (_stacked([self._pages[name][i] for name in names]) for i in (0, 1))
            cache = write_pages(cache, _padded(pages, cache.num_pages), k, v)
        for name in copies.dropped:
            self._pages.pop(name, None)
        return cache

    def warm_up(self, cache: KVCache) -> KVCache:
        """Compile the copies; returns the cache as it was."""
        k, v = (np.asarray(array) for array in read_pages(cache, _padded([], 0)))
        return write_pages(cache, _padded([], cache.num_pages), k, v)

    def _take_in(self) -> None:
        for names, contents in self._coming:
            k, v = (np.asarray(array) for array in contents)
            for i, name in enumerate(names):
                self._pages[name] = k[:, i].copy(), v[:, i].copy()
        self._coming = []


@jax.jit
def read_pages(cache: KVCache, pages: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, N, ...] of pages int32 [N]."""
    places = _places(cache, pages)
    return cache.k[places], cache.v[places]


@functools.partial(jax.jit, donate_argnames=("cache",))
def write_pages(cache: KVCache, pages: np.ndarray, k: np.ndarray, v: np.ndarray) -> KVCache:
    """The cache with keys and values [L, N, ...] in pages int32 [N]; no page is not written."""
    places = _places(cache, pages)
    return KVCache(cache.k.at[places].set(k, mode="drop"), cache.v.at[places].set(v, mode="drop"))


def _places(cache: KVCache, pages: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """Indices of pages [N] in all layers.

    `k[:, pages]` would be the same, but XLA begins that with a transposed copy of the whole cache
    on a GPU, for which there is no room.
    """
    return jnp.arange(len(cache.k))[:, None], pages[None]


def _padded(pages: Sequence[int], filler: int) -> np.ndarray:
    return np.array([*pages, *[filler] * (COPIED - len(pages))], np.int32)


def _stacked(pages: list[np.ndarray]) -> np.ndarray:
    """[L, COPIED, ...]; those beyond the pages repeat the last."""
    return np.stack([*pages, *[pages[-1]] * (COPIED - len(pages))], axis=1)
