"""Codes survive packing, and lie in their words where the official checkpoints have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcodec import pack
from jaxcodec.spec import CODE_BITS

pack_codes = jax.jit(pack.pack_codes, static_argnames="bits")
unpack_codes = jax.jit(pack.unpack_codes, static_argnames="bits")


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(CODE_BITS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.data()
)
def test_unpacking_gives_back_what_was_packed(bits: int, m: int, words: int, N: int, data) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    shape = (m, words * 32 // bits, N)
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, np.int32)
    packed = pack_codes(jnp.asarray(codes), bits)
    assert packed.shape == (m, words, N)
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_the_first_code_is_in_the_low_bits(bits: int) -> None:
    codes = np.zeros((1, 32 // bits, 1), np.int32)
    codes[0, :2, 0] = 1, 2**bits - 1
    assert int(pack_codes(jnp.asarray(codes), bits)[0, 0, 0]) == 1 + (2**bits - 1 << bits)


@pytest.mark.parametrize("bits", [8, 16])
def test_words_are_the_little_endian_bytes_of_the_codes(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (1, 64 // bits, 1))
    words = np.asarray(pack_codes(jnp.asarray(codes), bits)).ravel()
    assert words.astype("<u4").tobytes() == codes.ravel().astype(f"<u{bits // 8}").tobytes()


def test_codes_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ValueError, match="3 codes along K do not fill words of 4"):
        pack_codes(jnp.zeros((1, 3, 1), jnp.int32), 8)


def test_an_odd_number_of_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of .* got 5"):
        unpack_codes(jnp.zeros((1, 1, 1), jnp.uint32), 5)
