"""What the per-thread primitives of `threads` mean, in plain jnp, for the interpreter.

Each function has the signature of its namesake there.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcodec.pack import unpack_codes
from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    LANE_K,
    SCALE_EXPONENT,
    TABLE_BITS,
    TABLE_ROW,
    WARPGROUP,
)
from jaxcodec.spec import CodebookSpec


def store_scalar(ref, value) -> None:
    """ref[0] = value."""
    ref[...] = jnp.full((1,), value)


def in_fragment_order(values) -> jax.Array:
    """Inputs [..., 64] as a fragment has them: the i-th pairs of the lanes' 16 side by side."""
    lanes = values.reshape(*values.shape[:-1], K_TILE // LANE_K, LANE_K // 2, 2)
    return lanes.swapaxes(-3, -2).reshape(values.shape)


def store_largest(x_ref, maxima_ref) -> None:
    """The largest |x| of a warpgroup's share of x, as if each of its 4 warps had found it."""
    largest = jnp.max(jnp.abs(x_ref[...].astype(jnp.float32)))
    maxima_ref[...] = jnp.full(maxima_ref.shape, largest)


def write_halves(x_ref, power, tiles_ref) -> None:
    """A row of x [K] times a power of two, as float16 in the order of fragments, [K / 64, 64]."""
    halves = (x_ref[...].astype(jnp.float32) * power).astype(jnp.float16)
    tiles_ref[...] = in_fragment_order(halves.reshape(-1, K_TILE))


def fill(table_ref, books_ref, warpgroups: int) -> None:
    """Repeat every codebook vector over its row of the table, in the table's dtype."""
    m, size, v = books_ref.shape
    warpgroup = jax.lax.axis_index("warpgroup")
    for block in range(0, size, WARPGROUP * warpgroups):
        start = block + WARPGROUP * warpgroup

        @pl.when(start < size)
        def _(start=start):
            own = pl.ds(start, min(WARPGROUP, size))
            for c in range(m):
                vectors = books_ref[c, own, :].astype(table_ref.dtype)
                table_ref[c // 2, own, c % 2, :] = jnp.tile(vectors, (1, TABLE_ROW // 2 // v))


def weights(spec: CodebookSpec, table, codes_mjn, scales_gn) -> jax.Array:
    """W.T of some columns, [N, 64] in the order of a fragment: f16, or f32 without scales.

    Args:
      table: of `layout.table_shape`, or codebooks [m, 2**b, v] of more than 8 bits.
      codes_mjn: u32 [m, words, N].
      scales_gn: f32 [groups, N]; None leaves them to the sums.
    """
    codes_mjn = unpack_codes(codes_mjn, spec.bits)
    if spec.bits <= TABLE_BITS:
        table = jnp.moveaxis(table, 2, 1)[..., : spec.vector_length]
        table = table.reshape(-1, spec.codebook_size, spec.vector_length)
    books = list(table[: spec.num_codebooks])
    found = [jnp.take(book, codes.T, axis=0) for book, codes in zip(books, codes_mjn, strict=True)]
    if scales_gn is None:  # each codebook is multiplied by itself
        found = [vectors.astype(jnp.float32) for vectors in found]
    total_njv = found[0]
    for vectors in found[1:]:
        total_njv += vectors
    total_nk = total_njv.reshape(-1, K_TILE)
    if scales_gn is not None:
        scales_ng = (scales_gn * 2.0**SCALE_EXPONENT).astype(jnp.float16).T
        total_nk *= jnp.repeat(scales_ng, K_TILE // scales_ng.shape[1], axis=1)
    return in_fragment_order(total_nk)
