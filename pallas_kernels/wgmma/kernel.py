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

bfloat16 x becomes float16 exactly, but for values below 2**-28 of the largest of their row, because
each row is first brought to its range. `operands` tells how a lane looks its weights up.

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale;
r a row, k an input and n an output feature, c a codebook.

Source: AQLM (arXiv 2401.06118) section 3 for the format.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.mosaic import compiler_params, interpreter
from jaxcodec.pallas_kernels.operands import interpreted as operands_interpreted
from jaxcodec.pallas_kernels.operands import threads as operands_threads
from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    PRODUCER_REGISTERS,
    REGISTERS,
    WARPGROUP,
    refusal,
    scale_rows,
    table_shape,
    word_rows,
)
from jaxcodec.pallas_kernels.operands.preparation import half_tiles, padded
from jaxcodec.pallas_kernels.operands.threads import STEPS, SWIZZLED
from jaxcodec.pallas_kernels.wgmma import interpreted, threads
from jaxcodec.pallas_kernels.wgmma.plan import STRIP, Plan, Tiling, fitting, tiling
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

FACTORS = 32  # of rows that a block copies at least: a copy is a multiple of 128 bytes


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
      weights: share K, spec and dtype, each with its own codebooks and N; sums of codebooks within
        2**-14 to 2**15 and scales below 255, as float16 holds them and 2**8 times the scales.
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
    wide = [padded(w) for w in weights]
    tiles = tiles or tiling(M, K, [w.shape[1] for w in wide], spec)
    with jax.named_scope("wgmma_matmul"):
        halves, factors = half_tiles(x, interpret)
        dtype = out_dtype if tiles.splits == 1 else jnp.float32
        sums = _kernel(halves, factors, wide, tiles, interpret, dtype)
        if tiles.splits == 1:
            results = [y[0] for y in sums]
        else:
            results = [y.sum(axis=0).astype(out_dtype) for y in sums]
        return [y[:, : w.shape[1]] for y, w in zip(results, weights, strict=True)]


def _kernel(
    x: jax.Array,
    factors: jax.Array,
    weights: Sequence[CodebookTensor],
    tiles: Tiling,
    interpret: bool,
    out_dtype: Any,
) -> list[jax.Array]:
    """Products over each split of K, [splits, M, N_i], of what `half_tiles` gives for x."""
    spec, scales_dtype = weights[0].spec, weights[0].scales.dtype
    M, K = x.shape[1], weights[0].shape[0]
    found = fitting(tiles, spec, scales_dtype.itemsize)
    if found.stages < 2:  # the copies of a step wait for the step before
        raise ValueError(f"{tiles} needs more shared memory than a block has for {spec}.")
    tiles = found
    plan = Plan.of(M, K, [w.shape[1] for w in weights], tiles)
    clustered = tiles.cluster > 1

    def wgmma_matmul(x_ref, factors_ref, weight_refs, *out_refs, **scratch_refs):
        refs = x_ref, factors_ref, weight_refs, out_refs
        block = _Block(plan, spec, interpret, refs, scratch_refs)

        @pl.when(block.warpgroup < tiles.warpgroups)
        def _():
            plgpu.set_max_registers(REGISTERS[tiles.warpgroups], action="increase")
            block.multiply_tiles()

        @pl.when(block.warpgroup == tiles.warpgroups)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            block.copy_tiles()

    kernel = plgpu.kernel(
        wgmma_matmul,
        out_type=[jax.ShapeDtypeStruct((tiles.splits, M, w.shape[1]), out_dtype) for w in weights],
        scratch_types=_scratch(plan, spec, scales_dtype, out_dtype),
        grid=(plan.blocks,),
        grid_names=("block",),
        cluster=(tiles.cluster,) if clustered else (),
        cluster_names=("peer",) if clustered else (),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter(interpret),
    )
    return kernel(x, factors, [(w.codes, w.codebooks, w.scales) for w in weights])


def _scratch(plan: Plan, spec: CodebookSpec, scales_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Memory and barriers of a block."""
    tiles, stages, columns = plan.tiles, plan.stages, plan.columns
    width = 128 // jnp.dtype(out_dtype).itemsize  # columns of the result that a copy stores
    chunk = min(width // 2, tiles.rows)  # rows
    buffers = min(2, tiles.rows // chunk)
    freed = dict(num_arrivals=tiles.warpgroups, num_barriers=stages)
    scratch = dict(
        table=plgpu.SMEM(table_shape(spec), jnp.float16),
        x=plgpu.SMEM((stages, tiles.parts, tiles.rows, K_TILE), jnp.float16, transforms=SWIZZLED),
        codes=plgpu.SMEM(
            (stages, spec.num_codebooks, tiles.parts * word_rows(spec), columns), jnp.uint32
        ),
        scales=plgpu.SMEM((stages, scale_rows(spec, tiles.step), columns), scales_dtype),
        factors=plgpu.SMEM((2, max(tiles.rows, FACTORS)), jnp.float32),
        staging=plgpu.SMEM(
            (tiles.strips, buffers, STRIP // width, chunk, width), out_dtype, transforms=SWIZZLED
        ),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),  # x, codes, scales
        empty=plgpu.ClusterBarrier(collective_axes=("peer",), **freed)
        if tiles.cluster > 1
        else plgpu.Barrier(**freed),
        met=plgpu.Barrier(num_arrivals=tiles.warpgroups),
        ready=plgpu.Barrier(num_barriers=2),
    )
    if tiles.parts > 1:
        sums = tiles.parts - 1, tiles.strips, tiles.rows // 2, WARPGROUP
        scratch["others"] = plgpu.SMEM(sums, jnp.float32)
    return scratch


class _Block:
    """What a block does with its refs: one warpgroup calls `copy_tiles`, the others the rest.

    The rings' protocol: slot i of a ring is free for the copies when every gathering warpgroup has
    arrived at empty[i], and filled when its three copies have arrived at full[i]. A warpgroup
    frees the slot of a step once the first wgmma of the next step is issued and its own are done.
    """

    def __init__(self, plan: Plan, spec: CodebookSpec, interpret: bool, refs, scratch: dict):
        self.plan, self.spec = plan, spec
        self.primitives = interpreted if interpret else threads
        self.operands = operands_interpreted if interpret else operands_threads
        self.x, self.factors, self.weights, self.outs = refs
        self.scratch = types.SimpleNamespace(**scratch)
        tiles = plan.tiles
        self.warpgroup = jax.lax.axis_index("warpgroup")
        self.part = jax.lax.div(self.warpgroup, tiles.strips)
        self.strip = jax.lax.rem(self.warpgroup, tiles.strips)
        self.block = jax.lax.axis_index("block")
        self.peer = jax.lax.axis_index("peer") if tiles.cluster > 1 else 0
        self.tiles = jax.lax.div(plan.total - 1 - self.block, plan.blocks) + 1

    def place(self, i):
        """Weight, split of K, first row and first column of the block's i-th tile."""
        return self.plan.place(self.block, i, self.peer)

    def for_weight(self, weight, do) -> None:
        """do(refs of the weight and of its result) for the one whose number this is."""
        for n, refs in enumerate(self.weights):
            pl.when(weight == n)(functools.partial(do, *refs, self.outs[n]))

    # The warpgroup that copies

    def copy_tiles(self) -> None:
        """Fill the rings with all that the block will read."""
        steps, stages = self.plan.steps, self.plan.stages

        @pl.loop(0, self.tiles)
        def _(i):
            weight, split, row, column = self.place(i)
            copy = lambda codes, _, scales, __: self.copy_tile(i, split, row, column, codes, scales)
            self.for_weight(weight, copy)

        @pl.loop(0, stages - 1)
        def _(j):  # a peer may not arrive at the barriers of a block that is gone
            plgpu.barrier_wait(self.scratch.empty.at[self.plan.slot(self.tiles * steps + j)])

    def copy_tile(self, i, split, row, column, codes_ref, scales_ref) -> None:
        """Fill the rings with what one tile reads."""
        plan, spec, scratch, tiles = self.plan, self.spec, self.scratch, self.plan.tiles
        across, span = pl.ds(column, plan.columns), pl.ds(row, tiles.rows)
        words, groups = tiles.parts * word_rows(spec), scale_rows(spec, tiles.step)

        @pl.loop(0, plan.steps)
        def _(j):
            at, k = plan.slot(i * plan.steps + j), split * plan.steps + j
            group = jax.lax.div(k * tiles.step, spec.group_size)
            plgpu.barrier_wait(scratch.empty.at[at])
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=scratch.full.at[at])
            copy(
                self.x.at[pl.ds(k * tiles.parts, tiles.parts), span],
                scratch.x.at[at],
                collective_axes="peer" if tiles.cluster > 1 else None,
            )
            copy(codes_ref.at[:, pl.ds(k * words, words), across], scratch.codes.at[at])
            copy(scales_ref.at[pl.ds(group, groups), across], scratch.scales.at[at])

            @pl.when(j == 0)
            def _():
                at = jax.lax.rem(i, 2)
                factors, ready = scratch.factors.at[at], scratch.ready.at[at]
                own = pl.ds(row, factors.shape[0])
                plgpu.copy_gmem_to_smem(self.factors.at[own], factors, ready)

    # The warpgroups that gather and multiply

    def multiply_tiles(self) -> None:
        """Compute and store the block's tiles."""
        for i in range(self.plan.stages - 1):  # the last slot follows when the first step is done
            plgpu.barrier_arrive(self.scratch.empty.at[i])

        @pl.loop(0, self.tiles)
        def _(i):
            weight, split, row, column = self.place(i)
            self.fill_table(i, weight)
            total, at = self.multiply_tile(i * self.plan.steps), jax.lax.rem(i, 2)
            total = self.add_parts(total)
            plgpu.barrier_wait(self.scratch.ready.at[at])

            @pl.when(self.part == 0)
            def _():
                factors = self.scratch.factors.at[at]
                self.store_tile(total, factors, weight, split, row, column)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def sync(self) -> None:
        """Wait for the other warpgroups that multiply."""
        plgpu.barrier_arrive(self.scratch.met)
        plgpu.barrier_wait(self.scratch.met)

    def fill_table(self, i, weight) -> None:
        """Write the codebooks of a tile's weight, unless they are there."""
        before, *_ = self.place(i - 1)

        @pl.when((i == 0) | (before != weight))
        def _():
            self.sync()  # none may write what another still reads
            warpgroups = self.plan.tiles.warpgroups
            fill = lambda _, books, *__: self.operands.fill(self.scratch.table, books, warpgroups)
            self.for_weight(weight, fill)
            self.sync()

    def multiply_tile(self, first):
        """Sums over the own part of the steps that begin with `first`, f32 [64, rows]."""
        steps, slot, scratch = self.plan.steps, self.plan.slot, self.scratch
        at, last = slot(first), first + steps - 1
        plgpu.barrier_wait(scratch.full.at[at])
        fragment = self.primitives.gather(self.spec, *self.gathered(at))
        # Two steps an iteration: the registers of two fragments take turns.
        two = lambda i, carry: self.advance(first + 2 * i + 1, self.advance(first + 2 * i, carry))
        carry = self.primitives.zeros(self.plan.tiles.rows), fragment
        carry = jax.lax.fori_loop(0, steps // 2 - 1, two, carry)
        total, fragment = self.advance(last - 1, carry)
        x = self.rows_of_x(slot(last))
        total = self.primitives.multiply(total, fragment, x, STEPS)
        plgpu.wgmma_wait(1)
        self.free(last)
        plgpu.wgmma_wait(0)
        return total

    def advance(self, step, carry):
        """Multiply the fragment of a step while that of the next is gathered."""
        total, fragment = carry
        x = self.rows_of_x(self.plan.slot(step))
        total = self.primitives.multiply(total, fragment, x, 1)
        plgpu.wgmma_wait(1)
        self.free(step)
        after = self.plan.slot(step + 1)
        plgpu.barrier_wait(self.scratch.full.at[after])
        refs = x, *self.gathered(after)
        return self.primitives.multiply_and_gather(self.spec, total, fragment, *refs)

    def free(self, step) -> None:
        """Let the copies overwrite the slot of the step before; at first, a slot not yet used."""
        self.primitives.commit_reads()
        at = self.plan.slot(step + self.plan.stages - 1)
        plgpu.barrier_arrive(self.scratch.empty.at[at])

    def rows_of_x(self, at):
        """The own part of x in a slot, f16 [rows, 64]."""
        return self.scratch.x.at[at, self.part]

    def gathered(self, at):
        """The table, and the words and scales of the own strip and part in a slot."""
        words, groups = word_rows(self.spec), scale_rows(self.spec, K_TILE)
        group = jax.lax.div(self.part * K_TILE, self.spec.group_size)
        own = pl.ds(self.strip * STRIP, STRIP)
        codes = self.scratch.codes.at[at, :, pl.ds(self.part * words, words), own]
        return self.scratch.table, codes, self.scratch.scales.at[at, pl.ds(group, groups), own]

    def add_parts(self, total):
        """The sums of all parts of the own strip, for the first part; f32 [64, rows]."""
        parts = self.plan.tiles.parts
        if parts == 1:
            return total
        others = self.scratch.others
        self.sync()  # the first part has read those of the last tile

        @pl.when(self.part > 0)
        def _():
            self.primitives.put(total, others.at[self.part - 1, self.strip])

        self.sync()
        refs = [others.at[i, self.strip] for i in range(parts - 1)]
        return self.primitives.add_others(total, refs)

    def store_tile(self, total, factors, weight, split, row, column) -> None:
        """Write the sums of the own strip to the result."""
        staging = self.scratch.staging.at[self.strip]
        buffers, parts, chunk, width = staging.shape
        for i in range(self.plan.tiles.rows // chunk):
            plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
            staged = staging.at[i % buffers]
            self.primitives.stage(total, i * chunk, factors, staged)
            plgpu.commit_smem()

            def copy(*refs, i=i, staged=staged):
                for part in range(parts):
                    first = column + self.strip * STRIP + part * width
                    place = split, pl.ds(row + i * chunk, chunk), pl.ds(first, width)
                    target = refs[-1].at[place]
                    plgpu.copy_smem_to_gmem(staged.at[part], target, commit_group=False)

            self.for_weight(weight, copy)
            plgpu.commit_smem_to_gmem_group()
