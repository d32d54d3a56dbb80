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
    group = tile * plan.features // plan.spec.group_size

    def of(words_ref, scales_ref, width):
        columns = jnp.minimum(start + jnp.arange(plan.span), width - 1)
        words = [
            jnp.take(words_ref[c, tile * plan.words + w], columns)
            for w, c in np.ndindex(plan.words, plan.spec.num_codebooks)
        ]
        return words, jnp.take(scales_ref[group], columns)

    every = zip(codes, scales, plan.widths, strict=True)
    return jax.lax.switch(matrix, [lambda one=one: of(*one) for one in every])


def vectors(plan: Plan, codebooks, matrix, warpgroup):
    """The codebook vectors of each thread."""
    books = jax.lax.switch(matrix, [lambda ref=ref: ref[...] for ref in codebooks])
    owned = [_jobs(plan, warpgroup, turn) % plan.vectors for turn in range(plan.held)]
    return [books[own].astype(jnp.float32).reshape(-1) for own in owned]


def products(plan: Plan, features, vectors, maxima, warpgroup):
    """Inner products of each thread's vectors with its pairs of segments."""
    v = plan.spec.vector_length
    x_pse = features[...].reshape(-1, 2, v)
    entries = []
    for turn in range(plan.turns):
        pair = jnp.minimum(_jobs(plan, warpgroup, turn) // plan.vectors, 2 * plan.quads - 1)
        vector_te = vectors[turn % plan.held].reshape(WARPGROUP, 1, v)
        entries.append((x_pse[pair] * vector_te).sum(axis=2))
    entries = jnp.concatenate(entries, axis=1)
    if not plan.exact:
        largest = jnp.abs(entries).reshape(-1, WARP * 2 * plan.turns).max(axis=1)
        warps = pl.ds(warpgroup * (WARPGROUP // WARP), WARPGROUP // WARP)
        maxima[warps] = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    return entries.reshape(-1)


def fill(plan: Plan, table, entries, maxima, warpgroup):
    """Write the table of one tile; return the unit of its integers."""
    unit = jnp.float32(1)
    entries = entries.reshape(WARPGROUP, plan.turns, 2)
    if plan.exact:
        bits = jax.lax.bitcast_convert_type(entries, jnp.uint32)
        halves = jnp.repeat(bits, plan.copies // 2, axis=2)
    else:
        largest = jax.lax.bitcast_convert_type(maxima[...], jnp.float32).max()
        largest = jnp.maximum(largest, SMALLEST)
        unit = largest / LARGEST
        whole = jnp.round(entries * (LARGEST / largest)).astype(jnp.int32)
        whole = whole.astype(jnp.uint32) & jnp.uint32(0xFFFF)
        both = whole[:, :, 0] | whole[:, :, 1] << 16
        halves = jnp.broadcast_to(both[:, :, None], (*both.shape, plan.copies))
    run = math.gcd(WARPGROUP, plan.vectors)  # threads whose vectors lie side by side
    for turn in range(plan.turns):
        for begin in range(0, WARPGROUP, run):
            job = _jobs(plan, warpgroup, turn)[begin]
            pair, own = job // plan.vectors, pl.ds(job % plan.vectors, run)

            @pl.when(pair < 2 * plan.quads)
            def _(pair=pair, own=own, some=halves[begin : begin + run, turn]):
                table[pair // 2, own, pl.ds(pair % 2 * plan.copies, plan.copies)] = some

    return unit


def gather(plan: Plan, table, words):
    """Sum a tile's entries of one span."""
    spec, rows = plan.spec, table[...]
    lane = jnp.arange(plan.span) // plan.columns
    total = jnp.zeros(plan.span, jnp.float32)
    for place, (w, c) in enumerate(np.ndindex(plan.words, spec.num_codebooks)):
        for i in range(spec.codes_per_word):
            code = words[place] >> jnp.uint32(spec.bits * i) & jnp.uint32(spec.codebook_size - 1)
            quad, s = divmod(w * spec.codes_per_word + i, QUAD)
            row = c * spec.codebook_size + code.astype(jnp.int32)
            if plan.exact:
                copies = plan.copies // 2
                bits = rows[quad, row, s * copies + lane % copies]
                total += jax.lax.bitcast_convert_type(bits, jnp.float32)
            else:
                both = rows[quad, row, s // 2 * plan.copies + lane % plan.copies]
                upper = jax.lax.bitcast_convert_type(both << (16 - 16 * (s % 2)), jnp.int32)
                total += (upper >> 16).astype(jnp.float32)
    return total


def sum_splits(partial, first, splits, column, rounds, warpgroup):
    """Each thread's sums over some of the splits, for 4 columns."""
    size = WARPGROUP * QUAD // SUM_COLUMNS
    begin = warpgroup * size + jnp.arange(size)
    step = SUM_WARPGROUPS * size
    slab = partial[:, pl.ds(column, SUM_COLUMNS)]
    total = jnp.zeros((size, SUM_COLUMNS), jnp.float32)
    for turn in range(rounds):
        split = begin + turn * step
        some = slab[jnp.minimum(first + split, partial.shape[0] - 1)]
        total += jnp.where((split < splits)[:, None], some, 0)
    return total.reshape(-1)


def write_sums(buffer, outs, matrix, column) -> None:
    """Add what the threads left of each column, and write the results."""
    total = buffer[...].reshape(-1, SUM_COLUMNS).sum(axis=0)
    for i, out in enumerate(outs):

        @pl.when(matrix == i)
        def _(out=out):
            out[pl.ds(column, SUM_COLUMNS)] = total.astype(out.dtype)


def _jobs(plan: Plan, warpgroup, turn):
    """Numbers of the half rows of the table that the threads fill in their turn."""
    return warpgroup * WARPGROUP + turn * plan.threads + jnp.arange(WARPGROUP)
