"""Every batch is padded to a shape that was foreseen."""

import numpy as np
import pytest

from jaxcodec.serve.buckets import Buckets, Row

BUCKETS = Buckets.powers_of_two(max_rows=6, max_tokens=40, max_pages=10)
NO_PAGE = 99


def test_sizes_are_powers_of_two_and_the_largest_asked_for() -> None:
    assert BUCKETS == Buckets(rows=(1, 2, 4, 6), tokens=(16, 32, 40), pages=(4, 8, 10))


def test_rows_of_padding_have_no_page_and_no_tokens() -> None:
    rows = [Row([5], 3, [7], 2), Row([6], 8, [1, 2, 3], 1), Row([4], 0, [9], 0)]
    batch = BUCKETS.decode(rows, NO_PAGE)
    np.testing.assert_array_equal(
        batch.table.pages,
        [[7, *[NO_PAGE] * 3], [1, 2, 3, NO_PAGE], [9, *[NO_PAGE] * 3], [NO_PAGE] * 4],
    )
    np.testing.assert_array_equal(batch.table.length, [3, 8, 0, 0])
    np.testing.assert_array_equal(batch.tokens, [[5], [6], [4], [0]])
    np.testing.assert_array_equal(batch.counts, [1, 1, 1, 0])
    np.testing.assert_array_equal(batch.slots, [2, 1, 0, 0])


def test_every_shape_is_foreseen() -> None:
    page_size = 4
    decodes, prefills = set(), set()
    for count in range(1, 7):
        for pages in range(1, 11):
            batch = BUCKETS.decode([Row([1], 0, [0] * pages, 0)] * count, NO_PAGE)
            decodes.add(batch.table.pages.shape)
    for count in range(1, 41):
        for pages in range(-(-count // page_size), 11):
            batch = BUCKETS.prefill(Row([1] * count, 0, [0] * pages, 0), NO_PAGE)
            prefills.add((batch.tokens.shape[1], batch.table.pages.shape[1]))
    assert decodes == set(BUCKETS.decode_shapes())
    assert prefills == set(BUCKETS.prefill_shapes(page_size))


@pytest.mark.parametrize("sizes", [(1, 2), (), (6, 2)])
def test_buckets_that_are_too_small_or_unordered_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows must ascend to 3"):
        Buckets(sizes, (16,), (4,)).check_holds(3, 16, 4)
