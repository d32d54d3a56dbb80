"""What `psumbook.threads` does per CUDA thread, in plain Pallas, for the interpreter on a CPU.

The functions take and return what those of the same names do, element for element.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.psumbook.plan import (
    COPIES,
    LARGEST,
    QUAD,
    SMALLEST,
    SUM_COLUMNS,
    SUM_WARPGROUPS,
    WARP,
    WARPGROUP,
    Plan,
)


def sync(barrier) -> None:
    """Wait for all threads of the block."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def load(plan: Plan, codes, scales, matrix, tile, start, wanted):
    """Words and scales of a span; what is not wanted is never used, and may be anything."""
    del wanted
    tile = jnp.minimum(tile, plan.tiles - 1)
    first, tile = tile % plan.parts * plan.books, tile // plan.parts
    group = tile * plan.features // plan.spec.group_size

    def of(words_ref, scales_ref, width):
        columns = jnp.minimum(start + jnp.arange(plan.span), width - 1)
        words = [
            jnp.take(words_ref[first + c, tile * plan.words + w], columns)
            for w, c in np.ndindex(plan.words, plan.books)
        ]
        own = jnp.take(scales_ref[group], columns)
        return words, jnp.where(start + jnp.arange(plan.span) < width, own, 0)

    every = zip(codes, scales, plan.widths, strict=True)
    return jax.lax.switch(matrix, [lambda one=one: of(*one) for one in every])


def vectors(plan: Plan, codebooks, matrix, tile, warpgroup):
    """The codebook vectors of each thread for one tile."""
    books = jax.lax.switch(matrix, [lambda ref=ref: ref[...] for ref in codebooks])
    first = tile % plan.parts * plan.vectors
    owned = [_jobs(plan, warpgroup, turn) % plan.vectors for turn in range(plan.held)]
    return [books[first + own].reshape(-1) for own in owned]


def products(plan: Plan, features, vectors, maxima, warpgroup):
    """Inner products of each thread's vectors with its pairs of segments."""
    v = plan.spec.vector_length
    x_pse = features[...].reshape(-1, 2, v)
    entries = []
    for turn in range(plan.turns):
        pair = jnp.minimum(_jobs(plan, warpgroup, turn) // plan.vectors, 2 * plan.quads - 1)
        vector_te = vectors[turn % plan.held].astype(jnp.float32).reshape(WARPGROUP, 1, v)
        entries.append((x_pse[pair] * vector_te).sum(axis=2))
    entries = jnp.concatenate(entries, axis=1)
    if not plan.exact:
        _note_largest(entries, maxima, warpgroup)
    return entries.reshape(-1)


def fill(plan: Plan, table, entries, maxima, warpgroup):
    """Write the table of one tile; return the unit of its integers."""
    unit = jnp.float32(1)
    entries = entries.reshape(WARPGROUP, plan.turns, 2)
    if plan.exact:
        bits = jax.lax.bitcast_convert_type(entries, jnp.uint32)
        halves = jnp.repeat(bits, COPIES // 2, axis=2)
    else:
        unit = _unit(maxima)
        whole = jnp.round(entries / unit).astype(jnp.int32)
        whole = whole.astype(jnp.uint32) & jnp.uint32(0xFFFF)
        both = whole[:, :, 0] | whole[:, :, 1] << 16
        halves = jnp.broadcast_to(both[:, :, None], (*both.shape, COPIES))
    run = math.gcd(WARPGROUP, plan.vectors)  # threads whose vectors lie side by side
    for turn in range(plan.turns):
        for begin in range(0, WARPGROUP, run):
            job = _jobs(plan, warpgroup, turn)[begin]
            pair, own = job // plan.vectors, pl.ds(job % plan.vectors, run)

            @pl.when(pair < 2 * plan.quads)
            def _(pair=pair, own=own, some=halves[begin : begin + run, turn]):
                table[pair // 2, own, pl.ds(pair % 2 * COPIES, COPIES)] = some

    return unit


def gather(plan: Plan, table, words):
    """Sum a tile's entries of one span."""
    spec, rows = plan.spec, table[...]
    lane = jnp.arange(plan.span) // plan.columns
    total = jnp.zeros(plan.span, jnp.float32)
    for place, (w, c) in enumerate(np.ndindex(plan.words, plan.books)):
        for i in range(spec.codes_per_word):
            code = words[place] >> jnp.uint32(spec.bits * i) & jnp.uint32(spec.codebook_size - 1)
            quad, s = divmod(w * spec.codes_per_word + i, QUAD)
            row = c * spec.codebook_size + code.astype(jnp.int32)
            if plan.exact:
                copies = COPIES // 2
                bits = rows[quad, row, s * copies + lane % copies]
                total += jax.lax.bitcast_convert_type(bits, jnp.float32)
            else:
                both = rows[quad, row, s // 2 * COPIES + lane % COPIES]
                upper = jax.lax.bitcast_convert_type(both << (16 - 16 * (s % 2)), jnp.int32)
                total += (upper >> 16).astype(jnp.float32)
    return total


def note_largest(plan: Plan, sums, maxima, warpgroup) -> None:
    """Leave the bits of each warp's largest magnitude in `maxima`."""
    _note_largest(jnp.stack(sums, axis=1).reshape(WARPGROUP, -1), maxima, warpgroup)


def integers(plan: Plan, sums, maxima, unit, warpgroup):
    """`sums` as int16 in units of the block's largest."""
    size = _unit(maxima)

    @pl.when(warpgroup == 0)
    def _():
        unit[0] = size

    return [jnp.round(one / size).astype(jnp.int16) for one in sums]


def sum_splits(plan: Plan, partial, units, buffer, first, splits, column, warpgroup) -> None:
    """Each warp's sums over some of the splits."""
    warps = WARPGROUP // WARP
    rows = WARP * QUAD // SUM_COLUMNS  # that a warp adds at a time
    begin = warpgroup * warps * rows + jnp.arange(warps * rows).reshape(warps, rows)
    step = SUM_WARPGROUPS * warps * rows
    slab = partial[:, pl.ds(column, SUM_COLUMNS)]
    if not plan.exact:
        slab = slab.astype(jnp.float32) * units[...].reshape(-1, 1)
    total = jnp.zeros((warps, SUM_COLUMNS), jnp.float32)
    for turn in range(pl.cdiv(max(plan.splits), step)):
        split = begin + turn * step
        some = slab[jnp.minimum(first + split, partial.shape[0] - 1)]
        total += jnp.where((split < splits).reshape(warps, rows, 1), some, 0).sum(axis=1)
    buffer[pl.ds(warpgroup * warps * SUM_COLUMNS, warps * SUM_COLUMNS)] = total.reshape(-1)


def write_sums(buffer, outs, matrix, column) -> None:
    """Add what the warps left of each column, and write the results."""
    total = buffer[...].reshape(-1, SUM_COLUMNS).sum(axis=0)
    for i, out in enumerate(outs):

        @pl.when(matrix == i)
        def _(out=out):
            out[pl.ds(column, SUM_COLUMNS)] = total.astype(out.dtype)


def _note_largest(values, maxima, warpgroup) -> None:
    """Leave the bits of each warp's largest of `values` [128, any] in its place of `maxima`."""
    largest = jnp.abs(values).reshape(WARPGROUP // WARP, -1).max(axis=1)
    warps = pl.ds(warpgroup * (WARPGROUP // WARP), WARPGROUP // WARP)
    maxima[warps] = jax.lax.bitcast_convert_type(largest, jnp.uint32)


def _unit(maxima):
    """What one of the largest integers stands for."""
    largest = jax.lax.bitcast_convert_type(maxima[...], jnp.float32).max()
    return jnp.maximum(largest, SMALLEST) / LARGEST


def _jobs(plan: Plan, warpgroup, turn):
    """Numbers of the half rows of the table that the threads fill in their turn."""
    return warpgroup * WARPGROUP + turn * plan.threads + jnp.arange(WARPGROUP)
