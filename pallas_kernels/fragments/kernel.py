"""Codebook vectors straight into tensor-core fragments, for up to 64 rows, on Hopper and later.

No weight is ever written anywhere: the vector that a thread looks up is, as it comes from shared
memory, the thread's part of an operand of `mma.sync`. Within a product of 16 features any feature
may stand at any place, if x is permuted alike; so a lane takes v neighbouring features whole.
Codebooks lie in shared memory in as many copies as a phase of a load has lanes, each in its own
banks: whatever the codes, no lookup waits for another. The warps of a block share columns and
take turns along K; their sums are added in the end, in a fixed order, across a cluster of blocks
if K is split there too. Codes and x come by asynchronous copies, ahead of their use.

    y[r, n] = sum_k scales[k // g, n] * x[r, k] * sum_c codebooks[c, code(c, k // v, n), k % v]

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
b bits a code; r a row, n a column, c a codebook.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.fragments import interpreted, threads
from jaxcodec.pallas_kernels.fragments.plan import (
    ENTRIES,
    Plan,
    Tiling,
    candidates,
    refusal,
    tiling,
    virtual,
)
from jaxcodec.spec import CodebookSpec
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
    """Multiply x [M, K] by each weight [K, N_i] in one launch: [M, N_i] in `out_dtype`.

    Products are exact in bf16 or f16 and summed in float32. A codebook that x's dtype cannot hold
    (f16 or f32 with x in bf16, f32 with x in f16) is split into two summands, to 16 bits or more.

    Args:
      x: bf16 or f16 [M, K].
      weights: share K, spec and dtype, each with its own codebooks and N.
      tiles: None for `tiling`'s.
      interpret: run the kernel's structure on a CPU, with JAX looking for races.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
      ValueError: the weights differ in K, spec or dtype.
    """
    M, K = x.shape
    first = weights[0]
    spec = first.spec
    for w in weights:
        alike = w.shape[0] == K and w.spec == spec and w.dtype == first.dtype
        if not alike:
            raise ValueError(
                f"Weights of one launch need K = {K}, {spec} and {first.dtype}, "
                f"got K = {w.shape[0]}, {w.spec} and {w.dtype}."
            )
        if reason := refusal(M, K, w.shape[1], spec, x.dtype):
            raise NotImplementedError(f"The fragment kernel cannot run: {reason}.")
    if tiles is None:
        tiles = tiling(M, K, sum(w.shape[1] for w in weights), spec)
    v, codes = virtual(spec)
    plan = Plan(
        M=M,
        K=K,
        m=spec.num_codebooks,
        v=v,
        codes=codes,
        g=spec.group_size,
        dtype=x.dtype,
        book_dtype=first.codebooks.dtype,
        scale_dtype=first.scales.dtype,
        tiles=tiles,
    )
    if plan.global_book and first.dtype != x.dtype:
        return _sum_of_parts(x, weights, tiles, out_dtype, interpret)
    books = [joined_codebooks(w.codebooks, spec) for w in weights]
    operands = [(w.codes, book, w.scales) for w, book in zip(weights, books, strict=True)]
    return _kernel(x, operands, plan, out_dtype, interpret)


def _sum_of_parts(x, weights, tiles: Tiling, out_dtype, interpret: bool) -> list[jax.Array]:
    """Codebooks too large for shared memory, of another dtype than x: one launch for each part."""
    totals = [jnp.zeros((), jnp.float32)] * len(weights)
    rest = [w.codebooks.astype(jnp.float32) for w in weights]
    for _ in range(2):
        parts = [books.astype(x.dtype) for books in rest]
        rest = [a - b.astype(jnp.float32) for a, b in zip(rest, parts, strict=True)]
        rounded = [
            CodebookTensor(w.codes, part, w.scales) for w, part in zip(weights, parts, strict=True)
        ]
        ys = matmul(x, rounded, tiles=tiles, interpret=interpret)
        totals = [total + y for total, y in zip(totals, ys, strict=True)]
    return [total.astype(out_dtype) for total in totals]


def joined_codebooks(codebooks: jax.Array, spec: CodebookSpec) -> jax.Array:
    """Codebooks [m, 256, 8 v / b] that 8 bits at once look up, first code in the low bits."""
    joined = 8 // spec.bits
    if joined <= 1:
        return codebooks
    shifts = spec.bits * np.arange(joined)
    fields = np.arange(ENTRIES)[:, None] >> shifts & 2**spec.bits - 1
    return codebooks[:, fields].reshape(codebooks.shape[0], ENTRIES, -1)


def _kernel(x, operands, plan: Plan, out_dtype, interpret: bool) -> list[jax.Array]:
    tiles, count = plan.tiles, len(operands)
    primitives = interpreted if interpret else threads
    blocks = [pl.cdiv(scales.shape[1], plan.block_columns) for _, _, scales in operands]
    starts = [sum(blocks[:i]) for i in range(count)]

    def multiply_matrix(x_ref, weight_refs, out_ref, scratch, tile, rank):
        codes_ref, codebooks_ref, scales_ref = weight_refs
        first = rank * plan.units
        p = functools.partial
        fetch = p(primitives.fetch, plan, codes_ref, scales_ref, scratch["ring"], tile, first)
        stage = p(primitives.stage, plan, x_ref, scratch["stage"], first)
        arrange = p(primitives.arrange, plan, scratch["stage"])
        multiply = p(
            primitives.multiply,
            plan,
            codebooks_ref,
            scratch.get("book"),
            scratch["ring"],
            scratch["stage"],
        )
        sync_block = p(primitives.sync_block, *scratch["barrier"])

        stage(jnp.int32(0))
        for turn in range(tiles.stages - 1):
            fetch(jnp.int32(turn))
            primitives.end_copies()
        if not plan.global_book:
            primitives.fill(plan, codebooks_ref, scratch["book"])
        primitives.await_copies(tiles.stages - 2)
        arrange(jnp.int32(0))
        sync_block()

        def take_turn(chunk, turn_in_chunk, sums, stage_next):
            turn = chunk * plan.chunk + turn_in_chunk
            primitives.await_copies(tiles.stages - 2)
            primitives.sync_warp()
            fetch(turn + tiles.stages - 1)
            if stage_next:
                stage(chunk + 1)
            primitives.end_copies()
            return multiply(sums, first, turn)

        def take_turns(chunk, sums):
            several = plan.chunks > 1
            sums = take_turn(chunk, 0, sums, several)
            if plan.chunk > 1:
                others = lambda turn, sums: take_turn(chunk, turn, sums, False)
                sums = jax.lax.fori_loop(1, plan.chunk, others, sums)
            if several:
                # The next chunk was staged with the codes that chunk - 1 turns ago were fetched.
                primitives.await_copies(min(plan.chunk - 1, tiles.stages - 2))
                arrange(chunk + 1)
                sync_block()
            return sums

        sums = primitives.zero_sums(plan)
        if plan.chunks > 1:
            sums = jax.lax.fori_loop(0, plan.chunks, take_turns, sums)
        else:
            sums = take_turns(jnp.int32(0), sums)

        primitives.await_copies(0)
        sync_block()  # the sums lie where x and codes were
        primitives.store_sums(plan, scratch["sums"], sums)
        if tiles.k_blocks > 1:
            primitives.sync_cluster(*scratch["cluster_barrier"])
        else:
            sync_block()
        primitives.reduce(plan, scratch["all_sums"], out_ref, tile, rank)
        if tiles.k_blocks > 1:
            # No block may end, and its memory be reused, while others still read it.
            primitives.sync_cluster(*scratch["cluster_barrier"])

    def codebook_fragments(x_ref, *refs, **scratch_refs):
        block = jax.lax.axis_index("columns")
        rank = jax.lax.axis_index("k") if tiles.k_blocks > 1 else jnp.int32(0)
        scratch = _named(scratch_refs, refs[4 * count :], block, rank)
        for i in range(count):
            weight_refs, out_ref = refs[3 * i : 3 * i + 3], refs[3 * count + i]
            run = functools.partial(
                multiply_matrix, x_ref, weight_refs, out_ref, scratch, block - starts[i], rank
            )
            if count == 1:
                run()
            else:
                pl.when((block >= starts[i]) & (block < starts[i] + blocks[i]))(run)

    out_type = [
        jax.ShapeDtypeStruct((plan.M, scales.shape[1]), out_dtype) for _, _, scales in operands
    ]
    if interpret and tiles.k_blocks > 1:
        out_type.append(_exchange(plan, sum(blocks)))
    several = tiles.k_blocks > 1
    kernel = plgpu.kernel(
        codebook_fragments,
        out_type=out_type,
        scratch_types=_scratch(plan, interpret),
        grid=(sum(blocks),),
        grid_names=("columns",),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Shared memory is written by copies and read after barriers that stand here.
            unsafe_no_auto_barriers=True,
        ),
        cluster=(tiles.k_blocks,) if several else (),
        cluster_names=("k",) if several else (),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    with jax.named_scope("codebook_fragments"):
        arrays = [array for operand in operands for array in operand]
        return list(kernel(x, *arrays))[:count]


def _scratch(plan: Plan, interpret: bool) -> dict:
    """Memory of a block: lookup tables; then x and codes, or the sums that follow them."""
    tiles = plan.tiles
    buffers = min(plan.chunks, 2)
    scratch: dict[str, Any] = {
        "memory": plgpu.RefUnion(
            [
                plgpu.SMEM((buffers, plan.x_rows, plan.pitch), plan.dtype),
                plgpu.SMEM((tiles.stages, plan.warps, plan.slot), jnp.uint32),
            ],
            plgpu.SMEM((plan.warps, plan.rows, plan.sums_pitch), jnp.float32),
        )
    }
    if not plan.global_book:
        scratch["book"] = plgpu.SMEM((plan.regions, ENTRIES, 128), plan.dtype)
    if interpret:
        scratch["barrier"] = plgpu.Barrier(num_arrivals=tiles.warpgroups)
        if tiles.k_blocks > 1:
            scratch["cluster_barrier"] = plgpu.ClusterBarrier(
                collective_axes=("k",), num_arrivals=tiles.warpgroups
            )
    return scratch


def _exchange(plan: Plan, blocks: int) -> jax.ShapeDtypeStruct:
    """Global memory that stands for the other blocks' shared memory, which is not interpreted."""
    shape = (blocks, plan.tiles.k_blocks, plan.warps, plan.rows, plan.sums_pitch)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _named(scratch: dict, exchange: Sequence, block, rank) -> dict:
    (stage, ring), sums = scratch["memory"]
    own = exchange[0].at[block, rank] if exchange else sums
    return {
        "stage": stage,
        "ring": ring,
        "sums": own,
        "all_sums": exchange[0].at[block] if exchange else sums,
        "book": scratch.get("book"),
        "barrier": [scratch["barrier"]] if "barrier" in scratch else [],
        "cluster_barrier": [scratch["cluster_barrier"]] if "cluster_barrier" in scratch else [],
    }
