"""What the per-thread primitives of `wgmma.threads` mean, in plain jnp, for the interpreter.

Each function has the signature of its namesake there. Fragments and sums have the columns of a
strip in their order here, and in the order of a fragment's registers there.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pack import unpack_codes
from jaxcodec.pallas_kernels.wgmma.plan import K_TILE, STRIP, TABLE_ROW
from jaxcodec.spec import CodebookSpec

WARPGROUP = 128
SCALE_EXPONENT = 8


def store_scalar(ref, value) -> None:
    """ref[0] = value."""
    ref[...] = jnp.full((1,), value)


def zeros(rows: int):
    """Sums of a strip, f32 [64, rows]."""
    return jnp.zeros((STRIP, rows), jnp.float32)


def commit_reads() -> None:
    """Order reads of shared memory before the copies that overwrite it."""
    plgpu.commit_smem()


def fill(table_ref, books_ref, strips: int) -> None:
    """Repeat every codebook vector over its row of the table, as float16."""
    m, size, v = books_ref.shape
    warpgroup = jax.lax.axis_index("warpgroup")
    for block in range(0, size, WARPGROUP * strips):
        start = block + WARPGROUP * warpgroup

        @pl.when(start < size)
        def _(start=start):
            own = pl.ds(start, min(WARPGROUP, size))
            for c in range(m):
                vectors = books_ref[c, own, :].astype(jnp.float16)
                table_ref[c // 2, own, c % 2, :] = jnp.tile(vectors, (1, TABLE_ROW // 2 // v))


def gather(spec: CodebookSpec, table_ref, codes_ref, scales_ref):
    """The fragment f16 [64, 64] of one step along K."""
    span = pl.ds(jax.lax.axis_index("warpgroup") * STRIP, STRIP)
    codes_mjn = unpack_codes(codes_ref[:, :, span], spec.bits)
    table = table_ref[...]
    books = [table[c // 2, :, c % 2, : spec.vector_length] for c in range(spec.num_codebooks)]
    found = [jnp.take(book, codes.T, axis=0) for book, codes in zip(books, codes_mjn, strict=True)]
    total_njv = found[0]
    for vectors in found[1:]:
        total_njv += vectors
    scales_gn = scales_ref[:, span].astype(jnp.float32) * 2.0**SCALE_EXPONENT
    scales_ng = scales_gn.astype(jnp.float16).T
    scales_nk = jnp.repeat(scales_ng, K_TILE // scales_ng.shape[1], axis=1)
    return total_njv.reshape(STRIP, K_TILE) * scales_nk


def multiply(total, fragment, x_ref, steps: int):
    """total [64, rows] += fragment @ x.T over the first `steps` sixteenths of K."""
    return _multiply(total, fragment, x_ref, 0, 16 * steps)


def multiply_and_gather(spec: CodebookSpec, total, fragment, x_ref, table, codes, scales):
    """The rest of `multiply` after one sixteen of K, and the next fragment."""
    total = _multiply(total, fragment, x_ref, 16, K_TILE)
    return total, gather(spec, table, codes, scales)


def _multiply(total, fragment, x_ref, begin: int, end: int):
    fragment_nk = fragment[:, begin:end].astype(jnp.float32)
    x_rk = x_ref[:, begin:end].astype(jnp.float32)
    return total + jnp.dot(fragment_nk, x_rk.T, precision=jax.lax.Precision.HIGHEST)


def stage(total, first: int, factors_ref, out_ref) -> None:
    """Write rows [first, first + chunk) of the result, out [parts, chunk, 128 bytes]."""
    parts, chunk, width = out_ref.shape
    y_rn = total[:, first : first + chunk].T * 2.0**-SCALE_EXPONENT
    if factors_ref is not None:
        y_rn = y_rn * factors_ref[pl.ds(first, chunk)][:, None]
    for part in range(parts):
        out_ref[part] = y_rn[:, part * width : (part + 1) * width].astype(out_ref.dtype)
