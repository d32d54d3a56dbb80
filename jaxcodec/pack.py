"""Codes packed into 32-bit words along K, the first code in the lowest bits.

For b = 8 this is the byte order of the official packed CodeGEMM checkpoints.
Letters: m codebooks, J code positions along K (K // v), W words along K, N output features.
"""

import jax
import jax.numpy as jnp

from jaxcodec.spec import CODE_BITS, WORD_BITS


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Pack integer codes [m, J, N] into uint32 words [m, J * bits // 32, N].

    Args:
      codes: integers in [0, 2**bits), any integer dtype. Not checked here, since the check would
        have to wait for the device: `CodebookTensor.check` does it once on loading.
      bits: bits of one code: 2, 4, 8 or 16.

    Raises:
      ValueError: J is not a multiple of the codes in a word.
    """
    per_word = _codes_per_word(bits)
    m, J, N = codes.shape
    if J % per_word:
        raise ValueError(f"{J} codes along K do not fill words of {per_word} codes ({bits} bits).")
    parts = codes.astype(jnp.uint32).reshape(m, J // per_word, per_word, N)
    shifted = parts << _shifts(bits)
    # The fields do not overlap, so adding them is or-ing them.
    return shifted.sum(axis=2, dtype=jnp.uint32)


def unpack_codes(words: jax.Array, bits: int) -> jax.Array:
    """Unpack uint32 words [m, W, N] into int32 codes [m, W * 32 // bits, N]."""
    per_word = _codes_per_word(bits)
    m, W, N = words.shape
    fields = (words[:, :, None, :] >> _shifts(bits)) & jnp.uint32(2**bits - 1)
    return fields.astype(jnp.int32).reshape(m, W * per_word, N)


def _codes_per_word(bits: int) -> int:
    if bits not in CODE_BITS:
        raise ValueError(f"bits must be one of {CODE_BITS}, got {bits}.")
    return WORD_BITS // bits


def _shifts(bits: int) -> jax.Array:
    return jnp.arange(0, WORD_BITS, bits, dtype=jnp.uint32)[None, None, :, None]
