"""The Psumbook gather-GEMM for few rows, on Hopper and later, in Pallas Mosaic GPU.

The inner products of every codebook vector with every segment of x, the Psumbook, are formed once
for a block's columns in shared memory; a weight column then only looks them up and adds.

    Psumbook[p, c, i] = sum_e codebooks[c, i, e] * x[v p + e]
    y[n] = sum_p scales[v p // g, n] * sum_c Psumbook[p, c, code(c, p, n)]

A block owns some tiles of input features and some columns of one matrix, and keeps one float32 sum
a column in registers while it walks its tiles, the codes of the next columns on their way. Blocks
of other tiles leave other partial sums; a second kernel adds them in a fixed order, so that the
same call gives the same bits. With a 16-bit x partial sums are 16-bit integers too, in units of a
block's largest / 32767: half the bytes, of which there may be a tenth of the codes'.

**The table.** Shared memory has 32 banks of 4 bytes, and lanes of a warp that look up different
words of one bank wait for each other: random codes cost 3.2 cycles a lookup instead of 1. So every
lane has a bank to itself. For 16-bit x an entry is a 16-bit integer, two segments share a 32-bit
word, and each of the 32 lanes has its own copy of the word:

    table[q, (c, i), 32 h + lane] = (Psumbook[4 q + 2 h + 1, c, i], Psumbook[4 q + 2 h, c, i])

A row of 64 words is 256 bytes, so byte `i` of a word of codes becomes the address of its entry by
one byte permutation. The integers are a tile's products in units of its largest product / 32767:
their sum is exact, and rounding entries and partial sums costs 6e-5 of the result. For float32 x an
entry is a float32 with 16 copies, which costs two cycles a lookup:

    table[q, (c, i), 16 s + lane % 16] = Psumbook[4 q + s, c, i]

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
p a segment of v input features, c a codebook, i a code, e an element of a vector, q a quad of 4
segments, s one of them, h a half of it.

Source: Psumbook, CodeGEMM (arXiv 2512.17970) section 3.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.mosaic import compiler_params, interpreter
from jaxcodec.pallas_kernels.psumbook import interpreted, threads
from jaxcodec.pallas_kernels.psumbook.plan import (
    SUM_COLUMNS,
    SUM_WARPGROUPS,
    WARP,
    WARPGROUP,
    Plan,
    Tiling,
    candidates,
    refusal,
    tiling,
)
from jaxcodec.tensor import CodebookTensor

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]


def matmul(
    x: jax.Array,
    weights: Sequence[CodebookTensor],
    *,
    tiles: Tiling | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    interpret: bool = False,
) -> list[jax.Array]:
    """Multiply x [M, K] by each weight [K, N_i], all in one launch and one more that sums.

    Args:
      x: bf16, f16 or f32 [M, K]. Sums are float32; with a 16-bit x products are rounded to 16-bit
        integers, which costs a relative error of 6e-5.
      weights: share K, spec and dtype, each with its own codebooks and N.
      tiles: default `tiling`'s.
      out_dtype: of the results.
      interpret: run the kernels' structure on a CPU, with JAX looking for races.

    Returns:
      [M, N_i] of `out_dtype` for each weight.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    M, K = x.shape
    spec, widths = weights[0].spec, [w.shape[1] for w in weights]
    for N in widths:
        if reason := refusal(M, K, N, spec, x.dtype):
            raise NotImplementedError(f"The Psumbook kernel cannot run: {reason}.")
    plan = Plan.of(tiles or tiling(M, K, widths, spec), K, widths, spec, x.dtype)
    with jax.named_scope("psumbook_matmul"):
        padded = jnp.pad(x, ((0, 0), (0, -K % WARPGROUP)))
        partial, units = _partial_sums(padded, weights, plan, interpret)
        results = _summed(partial, units, plan, out_dtype, interpret)
    return [y[:, :N] for y, N in zip(results, widths, strict=True)]


def _partial_sums(
    x: jax.Array, weights: Sequence[CodebookTensor], plan: Plan, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Sums over each block's tiles [M, blocks, columns of a block], and their units [M, blocks].

    Blocks lie matrix by matrix, then by columns, then by tiles. x [M, K], K whole warpgroups.
    """
    count = len(weights)
    primitives = interpreted if interpret else threads

    def psumbook_partial_sums(x_ref, *refs):
        codes, codebooks, scales = (refs[i * count : (i + 1) * count] for i in range(3))
        out_ref, units_ref, table, features, maxima, *barrier = refs[3 * count :]
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
        warpgroup = jax.lax.axis_index("warpgroup")
        matrix, first, last, block_column = _place(plan, block)
        width = _item(matrix, plan.widths)

        def column(chunk):
            return block_column + (chunk * plan.warpgroups + warpgroup) * plan.span

        def load(tile, ahead):
            """Words and scales of the chunk that comes `ahead` chunks after the first of `tile`."""
            tile += ahead // plan.chunks
            start = column(ahead % plan.chunks)
            return primitives.load(plan, codes, scales, matrix, tile, start, tile < last)

        window = jnp.minimum(first // plan.parts * plan.features, x.shape[1] - plan.window)
        # Asked for before the codes, behind which they would wait.
        vectors = primitives.vectors(plan, codebooks, matrix, first, warpgroup)
        parts = [begin + warpgroup * WARPGROUP for begin in range(0, plan.window, plan.threads)]
        values = [_features(x_ref.at[row], plan, window, part) for part in parts]
        held = tuple(load(first, d) for d in range(plan.ahead))
        for part, some in zip(parts, values, strict=True):

            @pl.when(part < plan.window)
            def _(part=part, some=some):
                features[pl.ds(part, WARPGROUP)] = some

        primitives.sync(*barrier)

        def products(tile, vectors):
            """Entries of `tile`, and the vectors of the next."""
            own = pl.ds(tile // plan.parts * plan.features - window, plan.features)
            largest = maxima.at[tile % 2]
            entries = primitives.products(plan, features.at[own], vectors, largest, warpgroup)
            if plan.parts > 1:
                vectors = primitives.vectors(plan, codebooks, matrix, tile + 1, warpgroup)
            return entries, vectors

        def look_up(chunk, words):
            if not plan.ragged:
                return primitives.gather(plan, table, words)
            zeros = plgpu.layout_cast(jnp.zeros((plan.span,), jnp.float32), plan.layout)
            return jax.lax.cond(
                column(chunk) < width,
                lambda: primitives.gather(plan, table, words),
                lambda: zeros,
            )

        def step(tile, carry):
            sums, held, (entries, vectors) = list(carry[0]), list(carry[1]), carry[2]
            primitives.sync(*barrier)  # nobody looks up the last tile any more
            unit = primitives.fill(plan, table, entries, maxima.at[tile % 2], warpgroup)
            primitives.sync(*barrier)
            following = jax.lax.cond(
                tile + 1 < last, lambda: products(tile + 1, vectors), lambda: (entries, vectors)
            )
            for chunk in range(plan.chunks):
                words, scale = held.pop(0)
                held.append(load(tile, chunk + plan.ahead))
                found = look_up(chunk, words)
                sums[chunk] += found * (scale.astype(jnp.float32) * unit)
            return tuple(sums), tuple(held), following

        zeros = plgpu.layout_cast(jnp.zeros((plan.span,), jnp.float32), plan.layout)
        carry = ((zeros,) * plan.chunks, held, products(first, vectors))
        sums, _, _ = jax.lax.fori_loop(first, last, step, carry)
        if not plan.exact:
            largest = maxima.at[2]
            primitives.note_largest(plan, sums, largest, warpgroup)
            primitives.sync(*barrier)
            unit = units_ref.at[row, pl.ds(block, 1)]
            sums = primitives.integers(plan, sums, largest, unit, warpgroup)
        for chunk in range(plan.chunks):
            place = (chunk * plan.warpgroups + warpgroup) * plan.span
            out_ref[row, block, pl.ds(place, plan.span)] = sums[chunk]

    grid = (x.shape[0], plan.starts[-1])
    kernel = _kernel(
        psumbook_partial_sums,
        out_type=[
            jax.ShapeDtypeStruct((*grid, plan.block_columns), plan.partial_dtype),
            jax.ShapeDtypeStruct(grid, jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((plan.quads, plan.vectors, plan.row_words), jnp.uint32),
            plgpu.SMEM((plan.window,), jnp.float32),
            plgpu.SMEM((3, plan.threads // WARP), jnp.uint32),
        ],
        grid=grid,
        warpgroups=plan.warpgroups,
        interpret=interpret,
    )
    return kernel(
        x,
        *(w.codes for w in weights),
        *(w.codebooks.reshape(plan.parts * plan.vectors, -1) for w in weights),
        *(w.scales for w in weights),
    )


def _features(x_ref, plan: Plan, window: jax.Array, part: jax.Array) -> jax.Array:
    """128 input features, those at `part` of the block's window; the last if it ends before."""
    part = window + jnp.minimum(part, plan.window - WARPGROUP)
    layout = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)
    return plgpu.load(x_ref.at[pl.ds(part, WARPGROUP)], layout=layout).astype(jnp.float32)


def _summed(
    partial: jax.Array, units: jax.Array, plan: Plan, dtype: Any, interpret: bool
) -> list[jax.Array]:
    """Add the partial sums of all splits: [M, N_i rounded up] in `dtype` for each matrix."""
    M, count = partial.shape[0], len(plan.widths)
    primitives = interpreted if interpret else threads

    def psumbook_sum(partial_ref, units_ref, *refs):
        out_refs, (buffer, *barrier) = refs[:count], refs[count:]
        row, block = jax.lax.axis_index("row"), jax.lax.axis_index("block")
        warpgroup = jax.lax.axis_index("warpgroup")
        matrix, local = _matrix(block, plan.sum_starts)
        column = local * SUM_COLUMNS
        splits = _item(matrix, plan.splits)
        across = column // plan.block_columns
        first = _item(matrix, plan.starts[:-1]) + across * splits
        inside = column - across * plan.block_columns
        own = (partial_ref.at[row], units_ref.at[row], buffer)
        primitives.sum_splits(plan, *own, first, splits, inside, warpgroup)
        primitives.sync(*barrier)

        @pl.when(warpgroup == 0)
        def _():
            primitives.write_sums(buffer, [ref.at[row] for ref in out_refs], matrix, column)

    widths = [pl.cdiv(N, SUM_COLUMNS) * SUM_COLUMNS for N in plan.widths]
    kernel = _kernel(
        psumbook_sum,
        out_type=[jax.ShapeDtypeStruct((M, width), dtype) for width in widths],
        scratch_types=[
            plgpu.SMEM((SUM_WARPGROUPS * WARPGROUP // WARP * SUM_COLUMNS,), jnp.float32),
        ],
        grid=(M, plan.sum_starts[-1]),
        warpgroups=SUM_WARPGROUPS,
        interpret=interpret,
    )
    return kernel(partial, units)


def _kernel(body, *, out_type, scratch_types, grid, warpgroups, interpret):
    if interpret:  # where there is no `bar.sync`, which needs no setting up
        scratch_types = [*scratch_types, plgpu.Barrier(num_arrivals=warpgroups)]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("row", "block"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter(interpret),
    )


def _place(plan: Plan, block: jax.Array) -> tuple[jax.Array, ...]:
    """The matrix of a block, its first tile, the one after its last, and its first column."""
    matrix, local = _matrix(block, plan.starts)
    splits = _item(matrix, plan.splits)
    across = local // splits
    split = local - across * splits
    first, last = split * plan.tiles // splits, (split + 1) * plan.tiles // splits
    return matrix, first, last, across * plan.block_columns


def _matrix(block: jax.Array, starts: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The matrix that a block belongs to, and its number among the matrix's blocks."""
    matrix = sum((block >= start).astype(jnp.int32) for start in starts[1:-1])
    matrix = jnp.asarray(matrix, jnp.int32)
    return matrix, block - _item(matrix, starts[:-1])


def _item(index: jax.Array, items: Sequence[int]) -> jax.Array:
    """items[index] for an index that is only known to the device."""
    chosen = jnp.int32(items[0])
    for i, item in enumerate(items[1:], 1):
        chosen = jnp.where(index == i, item, chosen)
    return chosen
