"""What the per-thread primitives of `threads` mean, in plain jnp, for the interpreter.

Each function has the signature of its namesake there. Fragments and sums have the columns of a
strip in their order here, and in the order of a fragment's registers there.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.operands.interpreted import weights
from jaxcodec.pallas_kernels.operands.layout import K_TILE, SCALE_EXPONENT
from jaxcodec.pallas_kernels.wgmma.plan import STRIP
from jaxcodec.spec import CodebookSpec


def zeros(rows: int) -> jax.Array:
    """Sums of a strip, f32 [64, rows]."""
    return jnp.zeros((STRIP, rows), jnp.float32)


def commit_reads() -> None:
    """Order reads of shared memory before the copies that overwrite it."""
    plgpu.commit_smem()


def gather(spec: CodebookSpec, table_ref, codes_ref, scales_ref) -> jax.Array:
    """The fragment f16 [64, 64] of one step along K."""
    return weights(spec, table_ref[...], codes_ref[...], scales_ref[...].astype(jnp.float32))


def multiply(total, fragment, x_ref, steps: int) -> jax.Array:
    """total [64, rows] += fragment @ x.T over the first `steps` sixteenths of K."""
    return _multiply(total, fragment, x_ref, 0, 16 * steps)


def multiply_and_gather(
    spec: CodebookSpec, total, fragment, x_ref, table, codes, scales
) -> tuple[jax.Array, jax.Array]:
    """The rest of `multiply` after one sixteen of K, and the next fragment."""
    total = _multiply(total, fragment, x_ref, 16, K_TILE)
    return total, gather(spec, table, codes, scales)


def _multiply(total, fragment, x_ref, begin: int, end: int):
    fragment_nk = fragment[:, begin:end].astype(jnp.float32)
    x_rk = x_ref[:, begin:end].astype(jnp.float32)
    return total + jnp.dot(fragment_nk, x_rk.T, precision=jax.lax.Precision.HIGHEST)


def put(total, ref) -> None:
    """Leave sums [64, rows] in shared memory for `add_others`."""
    ref[...] = total.reshape(ref.shape)


def add_others(total, refs) -> jax.Array:
    """Sums [64, rows] plus those that `put` has left in each ref."""
    for ref in refs:
        total = total + ref[...].reshape(total.shape)
    return total


def stage(total, first: int, factors_ref, out_ref) -> None:
    """Write rows [first, first + chunk) of the result, out [parts, chunk, 128 bytes]."""
    parts, chunk, width = out_ref.shape
    y_rn = total[:, first : first + chunk].T * 2.0**-SCALE_EXPONENT
    y_rn = y_rn * factors_ref[pl.ds(first, chunk)][:, None]
    for part in range(parts):
        out_ref[part] = y_rn[:, part * width : (part + 1) * width].astype(out_ref.dtype)
