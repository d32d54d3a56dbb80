"""A page is free or taken, never both."""

import pytest

from jaxcodec.serve.pages import DEFAULT_PAGES, PagePool, pages_that_fit


def test_pages_are_taken_once_and_come_back() -> None:
    pool = PagePool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == list(range(5))
    assert pool.free == 0
    pool.give_back(second)
    assert pool.free == 3
    assert set(pool.take(3)) == set(second)


def test_too_many_pages_are_refused_and_none_is_lost() -> None:
    pool = PagePool(2)
    with pytest.raises(MemoryError, match=r"3 pages asked for, 2 of 2 free"):
        pool.take(3)
    assert pool.free == 2


@pytest.mark.parametrize("page", [0, 1, -1, 2])
def test_a_page_that_is_not_taken_cannot_come_back(page: int) -> None:
    pool = PagePool(2)
    pool.give_back(pool.take(1))
    with pytest.raises(ValueError, match="not taken"):
        pool.give_back([page])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


def test_the_pool_takes_a_share_of_the_free_memory() -> None:
    memory = {"bytes_limit": 1100, "bytes_in_use": 100}
    assert pages_that_fit(10, memory) == 80
    assert pages_that_fit(10, None) == DEFAULT_PAGES
    with pytest.raises(MemoryError, match="1000 bytes are free, a page of the cache takes 2000"):
        pages_that_fit(2000, memory)
