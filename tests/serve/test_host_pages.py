"""Pages in host memory: bounded, the oldest goes, and contents come back as they were."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.models.cache import KVCache
from jaxcodec.serve.host_pages import COPIED, Copies, HostNames, HostPages

A, B, C = b"a", b"b", b"c"


def test_no_room_keeps_nothing() -> None:
    names = HostNames(0)
    names.keep(A, 1)
    assert names.copies() == Copies([], [], [])


def test_the_least_recently_used_is_dropped() -> None:
    names = HostNames(2)
    names.keep(A, 1)
    names.keep(B, 2)
    assert names.copies() == Copies([(A, 1), (B, 2)], [], [])
    names.restore(A, 7)
    names.keep(C, 3)
    assert names.copies() == Copies([(C, 3)], [(A, 7)], [B])
    assert (A in names, B in names, len(names)) == (True, False, 2)
    assert (names.offloaded, names.restored) == (3, 1)


def test_what_is_there_is_not_copied_again() -> None:
    names = HostNames(2)
    names.keep(A, 1)
    names.copies()
    names.keep(A, 5)
    assert names.copies() == Copies([], [], [])


def test_what_is_dropped_under_way_is_still_restored() -> None:
    names = HostNames(1)
    names.keep(A, 1)
    names.restore(A, 4)
    names.keep(B, 2)
    assert names.copies() == Copies([(A, 1), (B, 2)], [(A, 4)], [A])


def test_what_is_kept_again_is_not_dropped() -> None:
    names = HostNames(1)
    names.keep(A, 1)
    names.keep(B, 2)
    names.keep(A, 1)
    assert names.copies() == Copies([(A, 1)], [], [B])


def random_cache(pages: int) -> KVCache:
    k, v = jax.random.normal(jax.random.key(0), (2, 2, pages, 4, 1, 3), jnp.bfloat16)
    return KVCache(k, v)


def test_contents_come_back_bit_for_bit_and_others_stay() -> None:
    pages = 2 * COPIED + 3
    cache = random_cache(2 * pages)
    before = jax.tree.map(np.asarray, cache)
    names = [bytes([i]) for i in range(pages)]
    host = HostPages()
    there = [(name, page) for page, name in enumerate(names)]
    cache = host.copy(cache, Copies(there, [], []))
    back = [(name, 2 * pages - 1 - i) for i, name in enumerate(names)]
    cache = host.copy(cache, Copies([], back, names))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(new[:, :pages], old[:, :pages])
        np.testing.assert_array_equal(new[:, : -pages - 1 : -1], old[:, :pages])
    assert not host._pages


def test_what_leaves_can_come_back_in_the_same_plan() -> None:
    cache, host = random_cache(4), HostPages()
    first = np.asarray(cache.k[:, 0])
    cache = host.copy(cache, Copies([(A, 0)], [(A, 3)], [A]))
    np.testing.assert_array_equal(cache.k[:, 3], first)


def test_warming_up_changes_nothing() -> None:
    cache = random_cache(4)
    before = jax.tree.map(np.asarray, cache)
    jax.tree.map(np.testing.assert_array_equal, HostPages().warm_up(cache), before)
