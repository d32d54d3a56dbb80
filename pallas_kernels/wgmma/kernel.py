"""Many rows times a codebook weight, on Hopper: vectors dequantized into wgmma's A registers.

A block owns a tile of output features and a tile of rows of x, and walks K in steps of 64. One
warpgroup only copies: x, packed words and scales come through the TMA into rings in shared memory.
Each other warpgroup owns 64 output features. It looks its codes up in the codebooks, adds the
entries, multiplies them by the group's scale, all in float16, and so holds a fragment of W.T,
which never leaves the registers: it is the A operand of wgmma, and the tile of x is B. While the
tensor cores work on one step, the warpgroup gathers the fragment of the next. Blocks stay for
several tiles, so that the copies run ahead into the next tile while one is stored.

    y[r, n] = factor[r] * sum_k F[n, k] * x16[r, k]
    F[n, k] = (sum_c codebooks[c, code(c, k // v, n), k % v]) * scales[k // g, n]   in float16
    x16[r, k] = x[r, k] / factor[r], factor[r] a power of two

A lane of a warp holds pairs of weights, k and k + 1, and a pair is one 4-byte lookup. The table
in shared memory repeats every codebook vector over 128 bytes, and lane l always reads word l of a
row: whatever the codes, no two lanes meet in a bank. bfloat16 x becomes float16 exactly, but for
values below 2**-28 of the largest of their row, because each row is first brought to its range.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale;
r a row, k an input and n an output feature, c a codebook.

Source: AQLM (arXiv 2401.06118) section 3 for the format.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.wgmma import interpreted, threads
from jaxcodec.pallas_kernels.wgmma.plan import (
    K_TILE,
    MIN_N,
    PRODUCER_REGISTERS,
    REGISTERS,
    STRIP,
    Plan,
    Tiling,
    candidates,
    fitting,
    refusal,
    scale_rows,
    table_shape,
    tiling,
    word_rows,
)
from jaxcodec.pallas_kernels.wgmma.threads import STEPS, SWIZZLED
from jaxcodec.tensor import CodebookTensor

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]

# Exponent to which the largest value of a row of x is brought; float16 ends below 2**16.
LARGEST_EXPONENT = 14
# Values of a row that a thread holds between finding the largest and writing: more would cost
# blocks, and the second reading comes from the L1.
HELD_VALUES = 64


def matmul(
    x: jax.Array,
    weights: Sequence[CodebookTensor],
    *,
    tiles: Tiling | None = None,
    interpret: bool = False,
    out_dtype: Any = jnp.float32,
) -> list[jax.Array]:
    """Multiply x [M, K] by each weight [K, N_i] in one launch: [M, N_i] in `out_dtype`.

    Weights are rounded to float16 and summed in float32.

    Args:
      x: bf16 or f16 [M, K].
      weights: share K, spec and dtype, each with its own codebooks and N; |w| < 2**8 everywhere.
      tiles: None lets `tiling` choose.
      interpret: run the kernel's structure on a CPU, with JAX looking for races.
      out_dtype: f32 results are not rounded.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    (M, K), spec = x.shape, weights[0].spec
    for w in weights:
        if reason := refusal(M, K, w.shape[1], spec, x.dtype):
            raise NotImplementedError(f"The wgmma kernel cannot run: {reason}.")
    padded = [_padded(w) for w in weights]
    tiles = tiles or tiling(M, K, sum(w.shape[1] for w in padded), spec)
    with jax.named_scope("wgmma_matmul"):
        rows, factors = (x, None) if x.dtype == jnp.float16 else half_rows(x, interpret)
        kind = out_dtype if tiles.splits == 1 else jnp.float32
        parts = _kernel(rows, factors, padded, tiles, interpret, kind)
        if tiles.splits == 1:
            results = [y[0] for y in parts]
        else:
            results = [y.sum(axis=0).astype(out_dtype) for y in parts]
        return [y[:, : w.shape[1]] for y, w in zip(results, weights, strict=True)]


def _padded(w: CodebookTensor) -> CodebookTensor:
    """A weight whose N the copies can take, a multiple of 8."""
    missing = -w.shape[1] % MIN_N
    if not missing:
        return w
    codes = jnp.pad(w.codes, ((0, 0), (0, 0), (0, missing)))
    return CodebookTensor(codes, w.codebooks, jnp.pad(w.scales, ((0, 0), (0, missing))))


def half_rows(x: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """bf16 x [M, K] as f16, each row over a power of two, f32 [M], that brings it to f16's range.

    One pass over x where K is a multiple of 128; XLA, which takes three kernels, elsewhere.
    """
    M, K = x.shape
    chunk = next((size for size in (1024, 512, 256, 128) if K % size == 0), None)
    if chunk is None:
        up, down = _powers(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1))
        return (x.astype(jnp.float32) * up[:, None]).astype(jnp.float16), down
    layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=chunk // 128)
    spans = [pl.ds(i * chunk, chunk) for i in range(K // chunk)]
    primitives = interpreted if interpret else threads

    def half_rows(x_ref, rows_ref, factors_ref):
        row = jax.lax.axis_index("row")
        load = lambda span: plgpu.load(x_ref.at[row, span], layout=layout)
        values = [load(span) for span in spans]
        sizes = [jnp.abs(value.astype(jnp.float32)) for value in values]
        up, down = _powers(jnp.max(functools.reduce(jnp.maximum, sizes)))
        for span, value in zip(spans, values, strict=True):
            value = value if K <= 128 * HELD_VALUES else load(span)
            rows_ref[row, span] = (value.astype(jnp.float32) * up).astype(jnp.float16)
        primitives.store_scalar(factors_ref.at[pl.ds(row, 1)], down)

    out_types = (jax.ShapeDtypeStruct((M, K), jnp.float16), jax.ShapeDtypeStruct((M,), jnp.float32))
    kernel = plgpu.kernel(
        half_rows,
        out_type=out_types,
        grid=(M,),
        grid_names=("row",),
        compiler_params=_compiler_params(),
        interpret=_interpreter(interpret),
    )
    return kernel(x)


def _powers(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings `largest` to 2**14 to 2**15, and its inverse, in f32."""
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23  # biased by 127
    exponent = jnp.minimum(jnp.maximum(exponent, LARGEST_EXPONENT + 1), 254)
    power = lambda biased: jax.lax.bitcast_convert_type(biased << 23, jnp.float32)
    return power(2 * 127 + LARGEST_EXPONENT - exponent), power(exponent - LARGEST_EXPONENT)


def _kernel(
    x: jax.Array,
    factors: jax.Array | None,
    weights: Sequence[CodebookTensor],
    tiles: Tiling,
    interpret: bool,
    out_dtype: Any,
) -> list[jax.Array]:
    """Products over each part of K, [splits, M, N_i]; `factors` are f32 [M].

    The rings' protocol: slot i of a ring is free for the copies when every gathering warpgroup has
    arrived at empty[i], and filled when its three copies have arrived at full[i]. A warpgroup
    frees the slot of a step once the first wgmma of the next step is issued and its own are done.
    """
    (M, K), spec = x.shape, weights[0].spec
    tiles = fitting(tiles, spec, weights[0].scales.dtype.itemsize)
    rows, strips = tiles.rows, tiles.strips
    plan = Plan.of(M, K, [w.shape[1] for w in weights], tiles)
    steps, stages, slot = plan.steps, plan.stages, plan.slot
    width = 128 // jnp.dtype(out_dtype).itemsize  # columns of the result that a copy stores
    chunk = width // 2  # rows
    primitives = interpreted if interpret else threads

    def wgmma_matmul(x_ref, factors_ref, weight_refs, *others):
        out_refs, scratch = others[: len(weights)], others[len(weights) :]
        table, x_ring, code_ring, scale_ring, factor_ring, out_ring, *barriers = scratch
        full, empty, filled, ready = barriers
        warpgroup, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        peer = jax.lax.axis_index("peer") if tiles.cluster > 1 else 0
        own_tiles = jax.lax.div(plan.total - 1 - block, plan.blocks) + 1

        def for_weight(weight, do):
            """do(n, refs of weight n) for the one whose number this is."""
            for n, refs in enumerate(weight_refs):
                pl.when(weight == n)(functools.partial(do, n, *refs))

        def free(step):
            primitives.commit_reads()
            plgpu.barrier_arrive(empty.at[slot(step)])

        def advance(step, carry):
            """Multiply the fragment of a step while that of the next is gathered."""
            total, fragment = carry
            total = primitives.multiply(total, fragment, x_ring.at[slot(step)], 1)
            plgpu.wgmma_wait(1)
            free(step + stages - 1)  # the slot of the step before
            after = slot(step + 1)
            plgpu.barrier_wait(full.at[after])
            refs = x_ring.at[slot(step)], table, code_ring.at[after], scale_ring.at[after]
            return primitives.multiply_and_gather(spec, total, fragment, *refs)

        def multiply_tile(first):
            """Sums over the steps that begin with `first`, f32 [64, rows]."""
            at, last = slot(first), first + steps - 1
            plgpu.barrier_wait(full.at[at])
            fragment = primitives.gather(spec, table, code_ring.at[at], scale_ring.at[at])
            # Two steps an iteration: the registers of two fragments take turns.
            two = lambda i, carry: advance(first + 2 * i + 1, advance(first + 2 * i, carry))
            carry = primitives.zeros(rows), fragment
            carry = jax.lax.fori_loop(0, steps // 2 - 1, two, carry)
            total, fragment = advance(last - 1, carry)
            total = primitives.multiply(total, fragment, x_ring.at[slot(last)], STEPS)
            plgpu.wgmma_wait(1)
            free(last + stages - 1)
            plgpu.wgmma_wait(0)
            return total

        def fill_table(i, weight):
            """Write the codebooks of a tile's weight, unless they are there."""
            before, *_ = plan.place(block, i - 1, peer)

            def fill(n, codes_ref, books_ref, scales_ref):
                @pl.when((i == 0) | (before != n))
                def _():
                    for write in (False, True):  # none may write what another still reads
                        if write:
                            primitives.fill(table, books_ref, strips)
                        plgpu.barrier_arrive(filled)
                        plgpu.barrier_wait(filled)

            for_weight(weight, fill)

        def store_tile(total, factors, weight, split, row, column):
            for i in range(rows // chunk):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                staged = out_ring.at[warpgroup, i % 2]
                primitives.stage(total, i * chunk, factors, staged)
                plgpu.commit_smem()

                def copy(n, *_, i=i, staged=staged):
                    for part in range(STRIP // width):
                        first = column + warpgroup * STRIP + part * width
                        place = split, pl.ds(row + i * chunk, chunk), pl.ds(first, width)
                        target = out_refs[n].at[place]
                        plgpu.copy_smem_to_gmem(staged.at[part], target, commit_group=False)

                for_weight(weight, copy)
                plgpu.commit_smem_to_gmem_group()

        @pl.when(warpgroup < strips)
        def _():
            plgpu.set_max_registers(REGISTERS[strips], action="increase")
            for i in range(stages - 1):  # the last slot follows when the first step is done
                plgpu.barrier_arrive(empty.at[i])

            @pl.loop(0, own_tiles)
            def _(i):
                place = plan.place(block, i, peer)
                fill_table(i, place[0])
                total, at = multiply_tile(i * steps), jax.lax.rem(i, 2)
                if factors is not None:
                    plgpu.barrier_wait(ready.at[at])
                store_tile(total, None if factors is None else factor_ring.at[at], *place)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def copy_tile(i, split, row, column, codes_ref, scales_ref):
            across, span = pl.ds(column, plan.columns), pl.ds(row, rows)

            @pl.loop(0, steps)
            def _(j):
                at, k = slot(i * steps + j), split * steps + j
                group = jax.lax.div(k * K_TILE, spec.group_size)
                words, groups = word_rows(spec), scale_rows(spec)
                plgpu.barrier_wait(empty.at[at])
                copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[at])
                copy(
                    x_ref.at[span, pl.ds(k * K_TILE, K_TILE)],
                    x_ring.at[at],
                    collective_axes="peer" if tiles.cluster > 1 else None,
                )
                copy(codes_ref.at[:, pl.ds(k * words, words), across], code_ring.at[at])
                copy(scales_ref.at[pl.ds(group, groups), across], scale_ring.at[at])
                if factors is None:
                    return

                @pl.when(j == 0)
                def _():
                    at = jax.lax.rem(i, 2)
                    plgpu.copy_gmem_to_smem(factors_ref.at[span], factor_ring.at[at], ready.at[at])

        @pl.when(warpgroup == strips)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            @pl.loop(0, own_tiles)
            def _(i):
                weight, split, row, column = plan.place(block, i, peer)
                copy = lambda n, codes, _, scales: copy_tile(i, split, row, column, codes, scales)
                for_weight(weight, copy)

            @pl.loop(0, stages - 1)
            def _(j):  # a peer may not arrive at the barriers of a block that is gone
                plgpu.barrier_wait(empty.at[slot(own_tiles * steps + j)])

    clustered = tiles.cluster > 1
    freed = dict(num_arrivals=strips, num_barriers=stages)
    kernel = plgpu.kernel(
        wgmma_matmul,
        out_type=[jax.ShapeDtypeStruct((tiles.splits, M, w.shape[1]), out_dtype) for w in weights],
        scratch_types=[
            plgpu.SMEM(table_shape(spec), jnp.float16),
            plgpu.SMEM((stages, rows, K_TILE), jnp.float16, transforms=SWIZZLED),
            plgpu.SMEM((stages, spec.num_codebooks, word_rows(spec), plan.columns), jnp.uint32),
            plgpu.SMEM((stages, scale_rows(spec), plan.columns), weights[0].scales.dtype),
            plgpu.SMEM((2, rows), jnp.float32),
            plgpu.SMEM((strips, 2, STRIP // width, chunk, width), out_dtype, transforms=SWIZZLED),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),  # x, codes, scales
            plgpu.ClusterBarrier(collective_axes=("peer",), **freed)
            if clustered
            else plgpu.Barrier(**freed),
            plgpu.Barrier(num_arrivals=strips),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(plan.blocks,),
        grid_names=("block",),
        cluster=(tiles.cluster,) if clustered else (),
        cluster_names=("peer",) if clustered else (),
        num_threads=strips + 1,
        thread_name="warpgroup",
        compiler_params=_compiler_params(),
        interpret=_interpreter(interpret),
    )
    unread = weights[0].scales if factors is None else factors
    return kernel(x, unread, [(w.codes, w.codebooks, w.scales) for w in weights])


def _compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        # The barriers above order everything that threads of a block share.
        unsafe_no_auto_barriers=True,
    )


def _interpreter(interpret: bool) -> plgpu.InterpretGPUParams | None:
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None
