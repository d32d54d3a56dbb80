"""Every launch is padded to a shape that was foreseen."""

import numpy as np
import pytest

from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.rows import WIDTH, Columns, PrefillRow, RowTable, pad_prefill

BUCKETS = Buckets.powers_of_two(max_rows=6, max_tokens=40, max_pages=10)
NO_PAGE = 99


def test_sizes_are_powers_of_two_and_the_largest_asked_for() -> None:
    assert BUCKETS == Buckets(rows=(1, 2, 4, 6), tokens=(16, 32, 40), pages=(4, 8, 10))


def test_every_shape_is_foreseen() -> None:
    page_size = 4
    decodes = {BUCKETS.decode(count, pages) for count in range(1, 7) for pages in range(1, 11)}
    prefills = {
        BUCKETS.prefill(rows, tokens, pages)
        for rows in range(1, 5)
        for tokens in range(1, 41)
        for pages in range(-(-tokens // page_size), 11)
    }
    assert decodes == set(BUCKETS.decode_shapes())
    assert prefills - {None} == set(BUCKETS.prefill_shapes(page_size))


def test_rows_of_a_prefill_make_up_its_tokens() -> None:
    assert BUCKETS.prefill(1, 16, 4) == (1, 16, 4)
    assert BUCKETS.prefill(2, 16, 4) == (2, 16, 4)
    assert BUCKETS.prefill(3, 16, 4) is None
    assert BUCKETS.prefill(2, 17, 5) is None


@pytest.mark.parametrize("sizes", [(1, 2), (), (6, 2)])
def test_buckets_that_are_too_small_or_unordered_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows must ascend to 3"):
        Buckets(sizes, (16,), (4,)).check_holds(3, 16, 4)


def test_a_launch_takes_rows_and_pads_them() -> None:
    table = RowTable(rows=5, pages=10, no_page=NO_PAGE)
    table.enter(3, token=7, length=9, slot=2, encoder_slot=1)
    table.set_pages(3, [4, 5, 6])
    table.enter(0, token=8, length=0, slot=0, encoder_slot=0)
    table.set_pages(0, [1])
    numbers = table.launch([3, 0], [2, 1], B=4, P=4)
    assert numbers.shape == (4, WIDTH + 4)
    first, second, *padding = (Columns(*row[:WIDTH].tolist()) for row in numbers)
    assert first == Columns(3, 1, 7, 9, 2, 2, 1)
    assert second == Columns(0, 1, 8, 0, 1, 0, 0)
    assert all((p.row, p.budget, p.slot) == (5, 0, 0) for p in padding)
    np.testing.assert_array_equal(numbers[0, WIDTH:], [4, 5, 6, NO_PAGE])
    np.testing.assert_array_equal(numbers[2:, WIDTH:], NO_PAGE)


def test_a_row_is_fresh_once() -> None:
    table = RowTable(rows=2, pages=4, no_page=NO_PAGE)
    table.enter(1, token=7, length=9, slot=0, encoder_slot=0)
    fresh = [Columns(*table.launch([1], [1], 1, 4)[0, :WIDTH]).fresh for _ in range(2)]
    table.enter(1, token=7, length=9, slot=0, encoder_slot=0)
    again = Columns(*table.launch([1], [1], 1, 4)[0, :WIDTH]).fresh
    assert (*fresh, again) == (1, 0, 1)


def test_fewer_pages_than_before_leave_none_of_the_old() -> None:
    table = RowTable(rows=1, pages=4, no_page=NO_PAGE)
    table.set_pages(0, [1, 2, 3])
    table.set_pages(0, [5])
    np.testing.assert_array_equal(table.launch([0], [1], 1, 4)[0, WIDTH:], [5, *[NO_PAGE] * 3])


def test_chunks_are_padded_with_rows_that_write_nothing() -> None:
    rows = [PrefillRow([5, 6], 3, [7], 2), PrefillRow([4], 0, [8, 9], 0)]
    tokens, numbers = pad_prefill(rows, B=3, T=4, P=2, no_page=NO_PAGE)
    np.testing.assert_array_equal(tokens, [[5, 6, 0, 0], [4, 0, 0, 0], [0] * 4])
    expected = [[3, 2, 2, 7, NO_PAGE], [0, 1, 0, 8, 9], [0, 0, 0, NO_PAGE, NO_PAGE]]
    np.testing.assert_array_equal(numbers, expected)
