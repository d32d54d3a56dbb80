"""Few rows times a codebook weight, on Hopper: vectors dequantized into the operands of mma.sync.

A block owns some output features and walks K in steps; one warpgroup only copies x, packed words
and scales through the TMA into rings in shared memory. Each other warp owns 16 or 32 output
features and a part of every step: it looks codes up, and the entries of a codebook are a fragment
of W.T, the first operand of mma.sync; rows of x as they are in memory are the second. The products
of all codebooks are added, and multiplied by the scale of their group, in float32: nothing else is
rounded. At the end a block adds the sums of its parts.

Where that cannot be, x is brought into float16 before: a bfloat16 x with codebooks in another
dtype; groups of 16 or 32, whose scales multiply weights in float16; and several codebooks where it
is faster to add them in float16 and to multiply once.

Letters: M rows, K input and N output features.

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

from jaxcodec.pallas_kernels.mma import interpreted, threads
from jaxcodec.pallas_kernels.mma.plan import (
    Plan,
    Tiling,
    adds_codebooks,
    code_columns,
    fitting,
    refusal,
    scale_columns,
    tiling,
)
from jaxcodec.pallas_kernels.mosaic import compiler_params, interpreter
from jaxcodec.pallas_kernels.operands import interpreted as operands_interpreted
from jaxcodec.pallas_kernels.operands import threads as operands_threads
from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    PRODUCER_REGISTERS,
    REGISTERS,
    TABLE_BITS,
    scale_rows,
    table_shape,
)
from jaxcodec.pallas_kernels.operands.preparation import halves, padded
from jaxcodec.tensor import CodebookTensor


def matmul(
    x: jax.Array,
    weights: Sequence[CodebookTensor],
    *,
    tiles: Tiling | None = None,
    interpret: bool = False,
    out_dtype: Any = jnp.float32,
) -> list[jax.Array]:
    """Multiply x [M, K] by each weight [K, N_i] in one launch: [M, N_i] in `out_dtype`.

    Codebooks in x's dtype are multiplied as they are and summed in float32; others, and weights
    where g is 16 or 32 or where `adds_codebooks`, are rounded to float16.

    Args:
      x: bf16 or f16 [M, K], at most 64 rows.
      weights: share K, spec and dtype, each with its own codebooks and N; what is rounded to
        float16 within 2**-14 to 2**15, as that holds it, and scales below 255.
      tiles: None lets `tiling` choose.
      interpret: run the kernel's structure on a CPU, with JAX looking for races.
      out_dtype: f32 results are not rounded.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    (M, K), spec = x.shape, weights[0].spec
    for w in weights:
        if reason := refusal(M, K, w.shape[1], spec, x.dtype):
            raise NotImplementedError(f"The mma kernel cannot run: {reason}.")
    wide = [padded(w) for w in weights]
    Ns = [w.shape[1] for w in wide]
    tiles = tiles or tiling(M, K, Ns, spec)
    adds = adds_codebooks(tiles.rows, K, sum(Ns), spec)
    exact = weights[0].codebooks.dtype == x.dtype and not adds
    with jax.named_scope("mma_matmul"):
        factors = None
        if x.dtype != jnp.float16 and not exact:
            x, factors = halves(x)
        if K % K_TILE:  # of which the copies take whole ones
            x = jnp.pad(x, ((0, 0), (0, -K % K_TILE)))
        results = _kernel(x, factors, wide, tiles, interpret, out_dtype)
        return [y[:, : w.shape[1]] for y, w in zip(results, weights, strict=True)]


def _kernel(
    x: jax.Array,
    factors: jax.Array | None,
    weights: Sequence[CodebookTensor],
    tiles: Tiling,
    interpret: bool,
    out_dtype: Any,
) -> list[jax.Array]:
    """Products [M, N_i] of x in a dtype of tensor cores, its rows times any factors."""
    spec, scales_dtype = weights[0].spec, weights[0].scales.dtype
    M, K = x.shape[0], weights[0].shape[0]
    found = fitting(tiles, spec, scales_dtype.itemsize)
    if not found.stages:
        raise ValueError(f"{tiles} needs more shared memory than a block has for {spec}.")
    tiles = found
    plan = Plan.of(K, [w.shape[1] for w in weights], tiles, spec)
    words, groups = plan.words * tiles.parts, scale_rows(spec, tiles.step)
    scratch = dict(
        x=plgpu.SMEM((tiles.stages, tiles.rows, tiles.step), x.dtype, transforms=plan.x_transforms),
        codes=plgpu.SMEM(
            (tiles.stages, spec.num_codebooks, words, code_columns(tiles, spec)), jnp.uint32
        ),
        scales=plgpu.SMEM((tiles.stages, groups, scale_columns(tiles)), scales_dtype),
        sums=plgpu.SMEM((tiles.parts, tiles.rows, tiles.columns), jnp.float32),
        full=plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),  # x, codes, scales
        empty=plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
        met=plgpu.Barrier(num_arrivals=tiles.warpgroups),
    )

    if spec.bits <= TABLE_BITS:
        scratch["table"] = plgpu.SMEM(table_shape(spec), x.dtype)

    def mma_matmul(x_ref, factors_ref, weight_refs, *out_refs, **scratch_refs):
        warpgroup, block = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("block")
        for n, refs in enumerate(weight_refs):
            tile = _Tile(plan, interpret, x_ref, factors_ref, refs, out_refs[n], scratch_refs)
            begin, end = plan.starts[n : n + 2]
            own = (block >= begin) & (block < end)
            column = (block - begin) * tiles.columns
            pl.when(own & (warpgroup < tiles.warpgroups))(functools.partial(tile.multiply, column))
            pl.when(own & (warpgroup == tiles.warpgroups))(functools.partial(tile.copy, column))

    kernel = plgpu.kernel(
        mma_matmul,
        out_type=[jax.ShapeDtypeStruct((M, w.shape[1]), out_dtype) for w in weights],
        scratch_types=scratch,
        grid=(plan.starts[-1],),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter(interpret),
    )
    # Those that stay in global memory are read as they are multiplied.
    books = lambda w: w.codebooks.astype(x.dtype) if spec.bits > TABLE_BITS else w.codebooks
    return kernel(x, factors, [(w.codes, books(w), w.scales) for w in weights])


class _Tile:
    """What a block does for one weight: one warpgroup calls `copy`, the others `multiply`.

    Slot i of a ring is free for the copies when every multiplying warpgroup has arrived at
    empty[i], and filled when its three copies have arrived at full[i].
    """

    def __init__(self, plan: Plan, interpret: bool, x, factors, weight, out, scratch):
        self.plan, self.x, self.factors, self.out = plan, x, factors, out
        self.codes, self.books, self.scales = weight
        self.scratch = types.SimpleNamespace(**scratch)
        self.primitives = interpreted if interpret else threads
        self.operands = operands_interpreted if interpret else operands_threads

    def slot(self, step):
        """Where in a ring a step lies."""
        return step & (self.plan.tiles.stages - 1)

    def copy(self, column) -> None:
        """Fill the rings with all that the block will read."""
        plan, scratch, tiles = self.plan, self.scratch, self.plan.tiles
        rows = pl.ds(0, tiles.rows)
        words, groups = scratch.codes.shape[2], scratch.scales.shape[1]
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, plan.steps)
        def _(step):
            at = self.slot(step)
            group = jax.lax.div(step * tiles.step, plan.spec.group_size)
            plgpu.barrier_wait(scratch.empty.at[at])
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=scratch.full.at[at])
            across = pl.ds(column, scratch.codes.shape[3])
            copy(self.codes.at[:, pl.ds(step * words, words), across], scratch.codes.at[at])
            scales = pl.ds(column, scale_columns(tiles))
            copy(self.scales.at[pl.ds(group, groups), scales], scratch.scales.at[at])
            copy(self.x.at[rows, pl.ds(step * tiles.step, tiles.step)], scratch.x.at[at])

        for at in range(tiles.stages):  # nobody may leave before what it has copied is read
            plgpu.barrier_wait(scratch.empty.at[at])

    def multiply(self, column) -> None:
        """Compute the block's columns of the result and write them."""
        plan, scratch = self.plan, self.scratch
        plgpu.set_max_registers(REGISTERS[plan.tiles.warpgroups], action="increase")
        for at in range(plan.tiles.stages):
            plgpu.barrier_arrive(scratch.empty.at[at])
        table = self.books
        if plan.spec.bits <= TABLE_BITS:
            table = scratch.table
            self.operands.fill(table, self.books, plan.tiles.warpgroups)
            self.sync()

        def advance(step, total):
            at = self.slot(step)
            plgpu.barrier_wait(scratch.full.at[at])
            refs = scratch.x.at[at], table, scratch.codes.at[at], scratch.scales.at[at]
            total = self.primitives.accumulate(plan, total, *refs)
            self.primitives.commit_reads()
            plgpu.barrier_arrive(scratch.empty.at[at])
            return total

        total = jax.lax.fori_loop(0, plan.steps, advance, self.primitives.zeros(plan))
        self.primitives.store_sums(plan, total, scratch.sums)
        self.sync()
        self.primitives.write(plan, scratch.sums, self.factors, self.out, column)

    def sync(self) -> None:
        """Wait for the other warpgroups that multiply."""
        plgpu.barrier_arrive(self.scratch.met)
        plgpu.barrier_wait(self.scratch.met)
