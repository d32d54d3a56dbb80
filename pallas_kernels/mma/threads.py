"""What the mma kernel does that Pallas has no operation for, written per CUDA thread.

Each function is one primitive of a warpgroup; `interpreted` has its twin in jnp. Warp w of a block
has part w // (columns // width), and of the columns those that begin with width times the rest. Its
sums are, for each 16 columns and 8 rows of x, the 4 of an mma.

Source: PTX ISA, mma.sync.m16n8k16.
"""

from itertools import product
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from jaxcodec.pallas_kernels.lanes import (
    SCALAR,
    add,
    at,
    below,
    c,
    div,
    f32,
    load_words,
    mma,
    mul,
    rem,
    smaller,
    store,
    thread,
    vec,
)
from jaxcodec.pallas_kernels.mma.plan import MMA_COLUMNS, SPAN_TILES, Plan
from jaxcodec.pallas_kernels.operands.layout import K_TILE, SCALE_EXPONENT
from jaxcodec.pallas_kernels.operands.threads import STEPS, SUMS, Lane, as_i32, with_registers


def _place(plan: Plan) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Part and first column of the warp, and whether it has any work."""
    warp, across = div(thread(), 32), plan.tiles.columns // plan.tiles.width
    part = smaller(arith.divui(warp, c(across)), plan.tiles.parts - 1)
    column = mul(arith.remui(warp, c(across)), plan.tiles.width)
    return part, column, below(warp, plan.tiles.warps)


def _sums(plan: Plan) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((4 * plan.tiles.width, plan.tiles.rows), jnp.float32, layout=SUMS)


def zeros(plan: Plan) -> jax.Array:
    """Sums of a warpgroup, f32 [4 width, rows]."""

    @plgpu.inline_mgpu(return_type=_sums(plan))
    def zeros(_):
        return mgpu.WGMMAAccumulator.zero(4 * plan.tiles.width, plan.tiles.rows)._value

    return zeros()


def commit_reads() -> None:
    """Nothing: what a thread has read is in its registers before it arrives at a barrier.

    The interpreter asks for a fence before a copy overwrites it.
    """


def accumulate(plan: Plan, total, x_ref, table, codes, scales) -> jax.Array:
    """Sums of a warpgroup plus those of one step.

    Refs in shared memory: x [rows, step], of which 64 inputs of all rows lie together, swizzled;
    the table; codes u32 [m, words, columns]; scales [groups, columns].
    """

    @plgpu.inline_mgpu(
        arg_types=(SUMS, plgpu.RefType(plan.x_transforms), *(plgpu.RefType(),) * 3),
        return_type=_sums(plan),
    )
    def accumulate(_, total, x, table, codes, scales):
        sums = [vector.extract(value, [], [0]) for value in total.registers.flat]
        part, column, busy = _place(plan)

        def work():
            return _accumulate(plan, sums, x, table, codes, scales, part, column)

        if plan.tiles.warps % 4 == 0:
            return with_registers(total, work())
        branch = scf.IfOp(busy, [f32()] * len(sums), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(work())
        with ir.InsertionPoint(cast(ir.Block, branch.else_block)):
            scf.yield_(sums)
        return with_registers(total, list(branch.results))

    return accumulate(total, x_ref, table, codes, scales)


def _accumulate(plan: Plan, sums: list, x, table, codes, scales, part, column) -> list:
    """The sums of a lane plus those of its warp's span.

    Where codebooks are not added, each one's entries are an operand of their own: nothing is
    rounded, and no product waits for that of another codebook.
    """
    rows, spec = plan.tiles.rows, plan.spec
    dtype = jnp.dtype(jnp.bfloat16 if _is_bfloat16(x) else jnp.float16)
    for tile in range(SPAN_TILES):
        first = add(mul(part, SPAN_TILES), tile)
        rights = [_rows_of_x(x, rows, first, eight) for eight in range(rows // 8)]
        word = add(mul(part, plan.words), tile * plan.words // SPAN_TILES)
        group = arith.divui(mul(first, K_TILE), c(spec.group_size))
        for i in range(plan.tiles.width // MMA_COLUMNS):
            place = add(column, i * MMA_COLUMNS), word, group
            lane = Lane(spec, table, codes, scales, *place, scaled=not plan.scales_sums)
            for s in range(STEPS):
                lane.look_up(s)
            of_sums = [scale for scale in lane.scales for _ in range(2)]
            for left in _lefts(plan, lane):
                for eight, right in enumerate(rights):
                    at = 4 * (i * rows // 8 + eight)
                    own = sums[at : at + 4]
                    found = [mgpu_utils.c(0.0, f32())] * 4 if plan.scales_sums else own
                    for s in range(STEPS):
                        found = mma(left[s], right[2 * s : 2 * s + 2], found, dtype)
                    if plan.scales_sums:
                        found = [_fma(*each) for each in zip(found, of_sums, own, strict=True)]
                    sums = [*sums[:at], *found, *sums[at + 4 :]]
    return sums


def _lefts(plan: Plan, lane: Lane) -> list[list]:
    """First operands [step] of a tile: one for each codebook, or their sum."""
    flat = lambda registers: [as_i32(w) for half in registers for w in half]
    if plan.adds_codebooks:
        return [[flat(lane.finish(s)) for s in range(STEPS)]]
    books = zip(*(lane.apart(s) for s in range(STEPS)), strict=True)
    return [[flat(registers) for registers in steps] for steps in books]


def _is_bfloat16(ref: ir.Value) -> bool:
    return isinstance(ir.MemRefType(ref.type).element_type, ir.BF16Type)


def _fma(a, b, total) -> ir.Value:
    fused = dict(fastmath=arith.FastMathFlags.contract)
    return arith.addf(arith.mulf(a, b, **fused), total, **fused)


def _rows_of_x(x, rows: int, tile, eight: int) -> list[ir.Value]:
    """Eight rows of a tile of x as second operands of 4 steps, two registers each.

    Lane 4 g + q reads the 16 inputs of row g that its weights have: two pieces of 16 bytes.
    """
    lane = thread(32)
    row, found = div(lane, 4), []
    first = add(mul(add(mul(tile, rows), 8 * eight), 128), mul(row, 128))
    first = at(mgpu_utils.memref_ptr(x), first)
    for half in range(2):
        # The swizzle: pieces of a row change places by the row's number.
        piece = arith.xori(add(mul(rem(lane, 4), 2), half), row)
        found += load_words(at(first, mul(piece, 16)), 4)
    return found


def store_sums(plan: Plan, total, sums_ref) -> None:
    """Leave the warps' sums in shared memory, f32 [parts, rows, columns]."""

    @plgpu.inline_mgpu(arg_types=(SUMS, plgpu.RefType()))
    def store_sums(_, total, ref):
        part, column, busy = _place(plan)
        lane = thread(32)
        column = add(column, mul(div(lane, 4), 2))
        row = add(mul(part, plan.tiles.rows), mul(rem(lane, 4), 2))
        first = at(mgpu_utils.memref_ptr(ref), mul(add(mul(row, plan.tiles.columns), column), 4))
        values = [vector.extract(value, [], [0]) for value in total.registers.flat]
        with mgpu_utils.when(busy):
            for i, eight, e in product(
                range(plan.tiles.width // MMA_COLUMNS), range(plan.tiles.rows // 8), range(2)
            ):
                begin = 4 * (i * plan.tiles.rows // 8 + eight) + e
                place = (8 * eight + e) * plan.tiles.columns + i * MMA_COLUMNS
                store(at(first, 4 * place), [values[begin], values[begin + 2]])

    store_sums(total, sums_ref)


def write(plan: Plan, sums_ref, factors_ref, out_ref, column) -> None:
    """Add the parts' sums, times the rows' factors if any, into out [M, N] from a column on."""
    (M, N), tiles = out_ref.shape, plan.tiles

    refs = [ref for ref in (sums_ref, out_ref, factors_ref) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(SCALAR, *(plgpu.RefType(),) * len(refs)))
    def write(_, column, sums, out, *factors):
        dtype, column = ir.MemRefType(out.type).element_type, column.registers.item()
        size = mgpu_utils.bitwidth(dtype) // 8
        pairs = tiles.columns // 2
        sums, out, *factors = map(mgpu_utils.memref_ptr, (sums, out, *factors))
        for start in range(0, M * pairs, 128 * tiles.warpgroups):
            i = add(thread(), start)
            row, pair = arith.divui(i, c(pairs)), arith.remui(i, c(pairs))
            target = add(column, mul(pair, 2))
            inside = arith.andi(below(i, M * pairs), below(target, N))
            with mgpu_utils.when(inside):
                place = at(sums, mul(add(mul(row, tiles.columns), mul(pair, 2)), 4))
                total = None
                for part in range(tiles.parts):
                    offset = part * tiles.rows * tiles.columns * 4
                    found = llvm.load(vec(2, f32()), at(place, offset), alignment=8)
                    total = found if total is None else arith.addf(total, found)
                total = cast(ir.Value, total)
                powers: list = [llvm.load(f32(), at(each, mul(row, 4))) for each in factors]
                if not plan.scales_sums:
                    powers.append(mgpu_utils.c(2.0**-SCALE_EXPONENT, f32()))
                for power in powers:
                    total = arith.mulf(total, vector.broadcast(vec(2, f32()), power))
                if dtype != f32():
                    total = arith.truncf(vec(2, dtype), total)
                place = at(out, mul(add(mul(row, N), target), size))
                llvm.store(total, place, alignment=2 * size)

    write(column, *refs)
