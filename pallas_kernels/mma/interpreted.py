"""What the per-thread primitives of `threads` mean, in plain jnp, for the interpreter.

Each function has the signature of its namesake there. The sums of a warpgroup are [4 width, rows],
the columns of its 4 warps one after another.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.mma.plan import SPAN_TILES, Plan
from jaxcodec.pallas_kernels.operands.interpreted import in_fragment_order, weights
from jaxcodec.pallas_kernels.operands.layout import K_TILE, SCALE_EXPONENT


def _places(plan: Plan):
    """Of each warp of the warpgroup its part and first column, and whether it has any work."""
    across = plan.tiles.columns // plan.tiles.width
    for i in range(4):
        warp = 4 * jax.lax.axis_index("warpgroup") + i
        part = jnp.minimum(warp // across, plan.tiles.parts - 1)
        yield i, part, warp % across * plan.tiles.width, warp < plan.tiles.warps


def zeros(plan: Plan) -> jax.Array:
    """Sums of a warpgroup, f32 [4 width, rows]."""
    return jnp.zeros((4 * plan.tiles.width, plan.tiles.rows), jnp.float32)


def commit_reads() -> None:
    """Order reads of shared memory before the copies that overwrite it."""
    plgpu.commit_smem()


def accumulate(plan: Plan, total, x_ref, table, codes, scales) -> jax.Array:
    """Sums of a warpgroup plus those of one step."""
    g = plan.spec.group_size
    table, sums, width = table[...], [], plan.tiles.width
    for i, part, column, busy in _places(plan):
        own = total[i * width : (i + 1) * width]
        more, across = own, pl.ds(column, width)
        for tile in range(SPAN_TILES):
            words, groups = plan.words // SPAN_TILES, max(1, K_TILE // g)
            word = part * plan.words + tile * words
            group = (part * SPAN_TILES * K_TILE + tile * K_TILE) // g
            codes_mjn = codes[:, pl.ds(word, words), across]
            scales_gn = scales[pl.ds(group, groups), across].astype(jnp.float32)
            on_weights = None if plan.scales_sums else scales_gn
            fragment = weights(plan.spec, table, codes_mjn, on_weights).astype(jnp.float32)
            first = (part * SPAN_TILES + tile) * K_TILE
            x_rk = in_fragment_order(x_ref[:, pl.ds(first, K_TILE)].astype(jnp.float32))
            found = jnp.dot(fragment, x_rk.T, precision=jax.lax.Precision.HIGHEST)
            more += found * scales_gn[0][:, None] if plan.scales_sums else found
        sums.append(jnp.where(busy, more, own))
    return jnp.concatenate(sums)


def store_sums(plan: Plan, total, sums_ref) -> None:
    """Leave the warps' sums in shared memory, f32 [parts, rows, columns]."""
    width = plan.tiles.width
    for i, part, column, busy in _places(plan):
        own = total[i * width : (i + 1) * width].T

        @pl.when(busy)
        def _(part=part, column=column, own=own):
            sums_ref[part, :, pl.ds(column, width)] = own


def write(plan: Plan, sums_ref, factors_ref, out_ref, column) -> None:
    """Add the parts' sums, times the rows' factors, into out [M, N] from a column on."""
    (M, N), columns = out_ref.shape, plan.tiles.columns

    @pl.when(jax.lax.axis_index("warpgroup") == 0)
    def _():
        y_rn = sums_ref[...].sum(axis=0)[:M] * (1.0 if plan.scales_sums else 2.0**-SCALE_EXPONENT)
        if factors_ref is not None:
            y_rn *= factors_ref[...][:, None]
        width = min(columns, N % columns or columns)

        @pl.when(column + columns <= N)
        def _():
            out_ref[:, pl.ds(column, columns)] = y_rn.astype(out_ref.dtype)

        @pl.when(column + columns > N)
        def _():
            out_ref[:, pl.ds(column, width)] = y_rn[:, :width].astype(out_ref.dtype)
