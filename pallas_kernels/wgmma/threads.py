"""What the wgmma kernel does that Pallas has no operation for, written per CUDA thread.

Each function is one primitive of a warpgroup; `interpreted` has its twin in jnp. Between them, row
16 w + 8 h + l of a fragment [64, 64] is column 16 w + 2 l + h of the strip (w a warp, l the
lane // 4), so that a lane holds neighbouring columns.

Letters: s a step of 16 along K, p its first or second half, h one of a lane's two columns.

Source: PTX ISA, wgmma.mma_async.m64nNk16 for the registers of its operands.
"""

from collections.abc import Sequence
from functools import reduce
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxcodec.pallas_kernels.lanes import add, at, div, f32, mul, rem, thread, vec
from jaxcodec.pallas_kernels.operands.layout import K_TILE, SCALE_EXPONENT, WARPGROUP
from jaxcodec.pallas_kernels.operands.threads import (
    FRAGMENT,
    STEPS,
    SUMS,
    SWIZZLED,
    Lane,
    as_i32,
    pair_of_columns,
    with_registers,
)
from jaxcodec.pallas_kernels.wgmma.plan import STRIP
from jaxcodec.spec import CodebookSpec


def zeros(rows: int) -> jax.Array:
    """Sums of a strip, f32 [64, rows]."""

    @plgpu.inline_mgpu(return_type=_sums(rows))
    def zeros(_):
        return mgpu.WGMMAAccumulator.zero(STRIP, rows)._value

    return zeros()


def commit_reads() -> None:
    """Nothing: what a thread read is in its registers, and wgmma reads as the copies write.

    The interpreter, whose wgmma reads like a thread, asks for a fence before a copy overwrites it.
    """


def gather(spec: CodebookSpec, table_ref, codes_ref, scales_ref) -> jax.Array:
    """The fragment f16 [64, 64] of one step along K.

    Refs in shared memory: the table; codes u32 [m, words, 64] and scales [groups, 64].
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3, return_type=_fragment())
    def gather(_, table, codes, scales):
        lane, steps = Lane(spec, table, codes, scales), []
        for s in range(STEPS):
            lane.look_up(s)
            steps.append(lane.finish(s))
        return _assemble(steps)

    return gather(table_ref, codes_ref, scales_ref)


def multiply(total, fragment, x_ref, steps: int) -> jax.Array:
    """Issue total [64, rows] += fragment @ x.T over the first `steps` sixteenths of K."""

    @plgpu.inline_mgpu(
        arg_types=(SUMS, FRAGMENT, plgpu.RefType(SWIZZLED)), return_type=_sums(total.shape[1])
    )
    def multiply(_, total, fragment, x):
        # LLVM must have computed the fragment before the fence.
        fragment = mgpu.optimization_barrier(fragment)
        nvvm.wgmma_fence_aligned()
        for s in range(steps):
            total = _wgmma(total, fragment, x, s)
        nvvm.wgmma_commit_group_sync_aligned()
        return total

    return multiply(total, fragment, x_ref)


def multiply_and_gather(
    spec: CodebookSpec, total, fragment, x_ref, table, codes, scales
) -> tuple[jax.Array, jax.Array]:
    """Issue the rest of `multiply` after one sixteen of K, between lookups of the next fragment.

    A wgmma with A in registers holds its warp until the one before has read its own: lookups that
    came after all four would find the tensor cores idle in the end.
    """

    @plgpu.inline_mgpu(
        arg_types=(SUMS, FRAGMENT, plgpu.RefType(SWIZZLED), *(plgpu.RefType(),) * 3),
        return_type=(_sums(total.shape[1]), _fragment()),
    )
    def multiply_and_gather(_, total, fragment, x, table, codes, scales):
        lane, steps = Lane(spec, table, codes, scales), []
        lane.look_up(0)
        for s in range(1, STEPS):
            nvvm.wgmma_fence_aligned()
            total = _wgmma(total, fragment, x, s)
            if s == STEPS - 1:
                nvvm.wgmma_commit_group_sync_aligned()
            steps.append(lane.finish(s - 1))
            lane.look_up(s)
        steps.append(lane.finish(STEPS - 1))
        return total, _assemble(steps)

    return multiply_and_gather(total, fragment, x_ref, table, codes, scales)


def stage(total, first: int, factors_ref, out_ref) -> None:
    """Write rows [first, first + chunk) of the result as the copy to global memory wants them.

    Refs in shared memory: factors f32 [rows] or None, out [parts, chunk, 128 bytes], swizzled.
    """
    chunk = out_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(SUMS, plgpu.RefType(SWIZZLED), plgpu.RefType()))
    def stage(_, total, out, factors):
        dtype = ir.MemRefType(out.type).element_type
        size = mgpu_utils.bitwidth(dtype) // 8
        pair, row = pair_of_columns(), _row()
        byte = mul(add(mul(rem(div(thread(), 32), 4), 16), mul(pair, 2)), size)
        part = at(mgpu_utils.memref_ptr(out), mul(div(byte, 128), chunk * 128))
        sums = total.registers.reshape(-1, 2, 2)  # [8 rows of x, column and row of the pair]
        for i in range(chunk // 8):
            factor = _factors(factors, add(row, first + 8 * i))
            for e in range(2):
                # The swizzle: 16-byte pieces of a row change places by the row's number.
                place = add(mul(add(row, e), 128), arith.xori(rem(byte, 128), mul(add(row, e), 16)))
                values = [vector.extract(v, [], [0]) for v in sums[first // 8 + i, :, e]]
                values = [arith.mulf(value, factor[e]) for value in values]
                values = vector.from_elements(vec(2, f32()), values)
                if dtype != f32():
                    values = arith.truncf(vec(2, dtype), values)
                llvm.store(values, at(at(part, i * 8 * 128), place), alignment=2 * size)

    stage(total, out_ref, factors_ref)


def put(total, ref) -> None:
    """Leave sums [64, rows] in shared memory, f32 [rows / 2, 128], for `add_others`."""

    @plgpu.inline_mgpu(arg_types=(SUMS, plgpu.RefType()))
    def put(_, total, ref):
        first = at(mgpu_utils.memref_ptr(ref), mul(thread(WARPGROUP), 4))
        for i, value in enumerate(total.registers.flat):
            llvm.store(vector.extract(value, [], [0]), at(first, i * WARPGROUP * 4))

    put(total, ref)


def add_others(total, refs) -> jax.Array:
    """Sums [64, rows] plus those that `put` has left in each ref."""

    @plgpu.inline_mgpu(
        arg_types=(SUMS, *[plgpu.RefType()] * len(refs)), return_type=_sums(total.shape[1])
    )
    def add_others(_, total, *refs):
        lane = mul(thread(WARPGROUP), 4)
        firsts = [at(mgpu_utils.memref_ptr(ref), lane) for ref in refs]
        sums = []
        for i, value in enumerate(total.registers.flat):
            others = [llvm.load(f32(), at(first, i * WARPGROUP * 4)) for first in firsts]
            sums.append(reduce(arith.addf, others, vector.extract(value, [], [0])))
        return with_registers(total, sums)

    return add_others(total, *refs)


def _factors(factors: ir.Value, row) -> list:
    """What two neighbouring rows of the result are multiplied by."""
    scale = mgpu_utils.c(2.0**-SCALE_EXPONENT, f32())
    place = at(mgpu_utils.memref_ptr(factors), mul(row, 4))
    pair = llvm.load(vec(2, f32()), place, alignment=8)
    return [arith.mulf(scale, vector.extract(pair, [], [e])) for e in range(2)]


def _wgmma(total, fragment, x, s: int):
    """total [64, n] += fragment[:, 16 s : 16 s + 16] @ x[:, 16 s : 16 s + 16].T, one instruction.

    x: float16 [n, 64] in shared memory, swizzled, 8 rows in 1024 bytes.
    """
    rows = total.shape[1]
    count = rows // 2
    tile = mma_utils.encode_descriptor(
        x, leading_byte_offset=0, stride_byte_offset=8 * 128, swizzle=128
    )
    i64 = ir.IntegerType.get_signless(64)
    # A descriptor counts 16 bytes; the 32 of a step lie within a swizzled row of 128.
    tile = arith.addi(cast(ir.Value, tile), mgpu_utils.c(2 * s, i64))
    sums = [vector.extract(value, [], [0]) for value in total.registers.flat]
    a = [as_i32(value) for value in fragment.registers.reshape(-1)[4 * s : 4 * s + 4]]
    names = [f"${i}" for i in range(2 * count + 5)]
    d_names, a_names, tile_name = names[:count], names[2 * count : -1], names[-1]
    ptx = (
        f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.f16.f16 "
        f"{{{', '.join(d_names)}}}, {{{', '.join(a_names)}}}, {tile_name}, 1, 1, 1, 0;"
    )
    # The sums are inputs as well, tied to the same registers.
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * 4 + ["l"]
    struct = llvm.StructType.get_literal([f32()] * count)
    operands = [*sums, *a, tile]
    result = llvm.inline_asm(struct, operands, ptx, ",".join(constraints), has_side_effects=True)
    result = cast(ir.Value, result)
    return with_registers(total, [llvm.extractvalue(f32(), result, [i]) for i in range(count)])


def _assemble(steps: Sequence[list]) -> mgpu.FragmentedArray:
    """A fragment from the registers [p][h] of its steps of 16."""
    layout = FRAGMENT.to_mgpu()
    registers = np.empty((2 * STEPS, 2), dtype=object)
    for s, halves in enumerate(steps):
        registers[2 * s : 2 * s + 2] = halves
    registers = registers.reshape(layout.registers_shape((STRIP, K_TILE)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _row() -> ir.Value:
    """The first of a lane's two neighbouring rows of the result among 8."""
    return mul(thread(4), 2)


def _fragment() -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((STRIP, K_TILE), jnp.float16, layout=FRAGMENT)


def _sums(rows: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((STRIP, rows), jnp.float32, layout=SUMS)
