"""What `wgmma_mosaic` does that Pallas has no operation for, written per CUDA thread.

Each function is one primitive of a warpgroup; `wgmma.interpreted` has its twin in jnp. Between
them, row 16 w + 8 h + l of a fragment [64, 64] is column 16 w + 2 l + h of the strip (w a warp,
l the lane // 4), so that a lane holds neighbouring columns, and K is in its order.

Letters: m codebooks, b bits a code, v weights a code, c a codebook, s a step of 16 along K, p its
first or second half, h one of a lane's two columns.

Source: PTX ISA, wgmma.mma_async.m64nNk16 for the registers of its operands.
"""

from collections.abc import Sequence
from functools import reduce
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

from jaxcodec.pallas_kernels.lanes import add, at, below, c, div, f32, i32, mul, rem, vec
from jaxcodec.pallas_kernels.wgmma.plan import K_TILE, STRIP, TABLE_ROW
from jaxcodec.spec import CodebookSpec

STEPS = K_TILE // 16
WARPGROUP = 128
# Scales are multiplied by 2**8 in float16, because scales of weights lie in 2**-16 to 2**2 and
# float16 in 2**-14 to 2**16; the results are divided by it.
SCALE_EXPONENT = 8

SUMS = plgpu.Layout._WGMMA_ACC_32BIT
FRAGMENT = plgpu.Layout.WGMMA
SCALAR = plgpu.Layout.WG_SPLAT(())
SWIZZLED = (plgpu.SwizzleTransform(128),)


def store_scalar(ref, value) -> None:
    """ref[0] = value."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def store(_, ref, value):
        with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.eq, _thread(), c(0))):
            llvm.store(value.registers.item(), mgpu_utils.memref_ptr(ref))

    store(ref, value)


def zeros(rows: int):
    """Sums of a strip, f32 [64, rows]."""

    @plgpu.inline_mgpu(return_type=_sums(rows))
    def zeros(_):
        return mgpu.WGMMAAccumulator.zero(STRIP, rows)._value

    return zeros()


def commit_reads() -> None:
    """Nothing: what a thread read is in its registers, and wgmma reads as the copies write.

    The interpreter, whose wgmma reads like a thread, asks for a fence before a copy overwrites it.
    """


def fill(table_ref, books_ref, strips: int) -> None:
    """Repeat every codebook vector over its row of the table, as float16.

    Refs: table f16 [pairs, 2**b, 2, 64] in shared memory, books [m, 2**b, v].
    """
    m, size, v = books_ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def fill(_, table, books):
        table, books_pointer = mgpu_utils.memref_ptr(table), mgpu_utils.memref_ptr(books)
        dtype = ir.MemRefType(books.type).element_type
        width = v * mgpu_utils.bitwidth(dtype) // 8
        for start in range(0, size, WARPGROUP * strips):
            entry = add(_thread(), start)
            with mgpu_utils.when(below(entry, size)):
                for book in range(m):
                    place = at(at(books_pointer, mul(entry, width)), book * size * width)
                    vector_v = llvm.load(vec(v, dtype), place, alignment=min(16, width))
                    row = at(table, mul(entry, 2 * TABLE_ROW))
                    row = at(row, (book // 2 * size * 2 + book % 2) * TABLE_ROW)
                    _fill_row(row, _to_f16(vector_v))

    fill(table_ref, books_ref)


def _fill_row(row, values) -> None:
    """Repeat a vector over 128 bytes of the table, 16 at a time.

    Threads begin at different places, so that the 8 threads of a phase do not meet in a bank.
    """
    [length] = ir.VectorType(values.type).shape
    words = vector.bitcast(vec(length // 2, i32()), values)
    words = [vector.extract(words, [], [j]) for j in range(length // 2)]
    for i in range(TABLE_ROW // 16):
        part = arith.xori(rem(_thread(), 8), c(i))
        held = [words[j % len(words)] for j in range(4)]
        if len(words) > 4:
            odd = arith.cmpi(arith.CmpIPredicate.ne, rem(part, 2), c(0))
            held = [arith.select(odd, words[4 + j], words[j]) for j in range(4)]
        held = vector.from_elements(vec(4, i32()), held)
        llvm.store(held, at(row, mul(part, 16)), alignment=16)


def gather(spec: CodebookSpec, table_ref, codes_ref, scales_ref):
    """The fragment f16 [64, 64] of one step along K.

    Refs in shared memory: the table; codes u32 [m, words, columns] and scales [groups, columns] of
    the whole block.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3, return_type=_fragment())
    def gather(_, table, codes, scales):
        lane = _Lane(spec, table, codes, scales)
        return _assemble([lane.finish(s, lane.look_up(s)) for s in range(STEPS)])

    return gather(table_ref, codes_ref, scales_ref)


def multiply(total, fragment, x_ref, steps: int):
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


def multiply_and_gather(spec: CodebookSpec, total, fragment, x_ref, table, codes, scales):
    """Issue the rest of `multiply` after one sixteen of K, between lookups of the next fragment.

    A wgmma with A in registers holds its warp until the one before has read its own: lookups that
    came after all four would find the tensor cores idle in the end.
    """

    @plgpu.inline_mgpu(
        arg_types=(SUMS, FRAGMENT, plgpu.RefType(SWIZZLED), *(plgpu.RefType(),) * 3),
        return_type=(_sums(total.shape[1]), _fragment()),
    )
    def multiply_and_gather(_, total, fragment, x, table, codes, scales):
        lane = _Lane(spec, table, codes, scales)
        steps, found = [], lane.look_up(0)
        for s in range(1, STEPS):
            nvvm.wgmma_fence_aligned()
            total = _wgmma(total, fragment, x, s)
            if s == STEPS - 1:
                nvvm.wgmma_commit_group_sync_aligned()
            steps.append(lane.finish(s - 1, found))
            found = lane.look_up(s)
        steps.append(lane.finish(STEPS - 1, found))
        return total, _assemble(steps)

    return multiply_and_gather(total, fragment, x_ref, table, codes, scales)


def stage(total, first: int, factors_ref, out_ref) -> None:
    """Write rows [first, first + chunk) of the result as the copy to global memory wants them.

    Refs in shared memory: factors f32 [rows] or None, out [parts, chunk, 128 bytes], swizzled.
    """
    chunk = out_ref.shape[1]
    refs = [out_ref] if factors_ref is None else [out_ref, factors_ref]
    types = [plgpu.RefType(SWIZZLED), plgpu.RefType()][: len(refs)]

    @plgpu.inline_mgpu(arg_types=(SUMS, *types))
    def stage(_, total, out, *factors):
        dtype = ir.MemRefType(out.type).element_type
        size = mgpu_utils.bitwidth(dtype) // 8
        pair, row = _pair(), _row()
        byte = mul(add(mul(rem(div(_thread(), 32), 4), 16), mul(pair, 2)), size)
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

    stage(total, *refs)


def _factors(factors: Sequence[ir.Value], row) -> list:
    """What two neighbouring rows of the result are multiplied by."""
    scale = mgpu_utils.c(2.0**-SCALE_EXPONENT, f32())
    if not factors:
        return [scale] * 2
    place = at(mgpu_utils.memref_ptr(factors[0]), mul(row, 4))
    pair = llvm.load(vec(2, f32()), place, alignment=8)
    return [arith.mulf(scale, vector.extract(pair, [], [e])) for e in range(2)]


class _Lane:
    """What a thread holds while it gathers its part of a fragment."""

    def __init__(self, spec: CodebookSpec, table, codes, scales):
        self.spec = spec
        self.lane = rem(_thread(), 32)
        self.table = mgpu_utils.memref_ptr(table)
        # Below 8 weights a code, the 4 lanes of a row need different codes of a word.
        ahead = {2: rem(_thread(), 4), 4: div(rem(_thread(), 4), 2)}
        self.codes_ahead = ahead.get(spec.vector_length)
        column = add(mul(div(_thread(), 32), 16), mul(_pair(), 2))
        words, shape = _load_pairs(codes, column), ir.MemRefType(codes.type).shape[:-1]
        self.words = dict(zip(np.ndindex(*shape), words, strict=True))
        self.scales = [_scale(values) for values in _load_pairs(scales, column)]

    def look_up(self, s: int) -> list:
        """Entries [h][p][c], two weights each."""
        books = range(self.spec.num_codebooks)
        return [[[self._entry(s, h, p, c) for c in books] for p in range(2)] for h in range(2)]

    def finish(self, s: int, entries: list) -> list:
        """Registers [p][h]: entries summed over codebooks, times the column's scale."""
        scale = self.scales[s * 16 // self.spec.group_size if len(self.scales) > 1 else 0]
        columns = []
        for h in range(2):
            halves = [reduce(arith.addf, books) for books in entries[h]]
            if self.spec.vector_length == 16:
                odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(self.lane, c(4)), c(0))
                halves = [arith.select(odd, halves[1 - p], halves[p]) for p in range(2)]
            columns.append([arith.mulf(half, scale[h]) for half in halves])
        return [[columns[h][p] for h in range(2)] for p in range(2)]

    def _entry(self, s: int, h: int, p: int, book: int) -> ir.Value:
        spec = self.spec
        code = (16 * s + 8 * p) // spec.vector_length
        word = self.words[book, code // spec.codes_per_word][h]
        place = self._table_offset(word, code % spec.codes_per_word)
        if spec.vector_length == 16 and p == 1:
            # A row holds 4 copies of 8 pairs: odd rows' lanes read theirs the other way round, and
            # `finish` swaps them back.
            place = arith.xori(place, c(16))
        offset = (book // 2 * spec.codebook_size * 2 + book % 2) * TABLE_ROW
        return llvm.load(vec(2, _f16()), at(at(self.table, place), offset), alignment=4)

    def _table_offset(self, word, position: int) -> ir.Value:
        """256 times code `position` of a word, plus 4 times the lane."""
        b, low = self.spec.bits, mul(self.lane, 4)
        if b == 8:  # one instruction puts the code's byte above the lane's
            selector = c(0x5504 + 16 * position)
            if self.codes_ahead is not None:
                selector = arith.addi(selector, mul(self.codes_ahead, 16))
            ptx, constraints = "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"
            operands = [word, low, selector]
            found = llvm.inline_asm(i32(), operands, ptx, constraints, has_side_effects=False)
            return cast(ir.Value, found)
        if self.codes_ahead is not None:
            word = arith.shrui(word, mul(self.codes_ahead, b))
        right = b * position - 8
        word = arith.shrui(word, c(right)) if right > 0 else arith.shli(word, c(-right))
        return arith.ori(arith.andi(word, c((2**b - 1) << 8)), low)


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
    a = [_as_i32(value) for value in fragment.registers.reshape(-1)[4 * s : 4 * s + 4]]
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
    registers = np.empty(count, dtype=object)
    for i in range(count):
        registers[i] = vector.broadcast(vec(1, f32()), llvm.extractvalue(f32(), result, [i]))
    return mgpu.FragmentedArray(
        _registers=registers.reshape(total.registers.shape), _layout=total.layout, _is_signed=None
    )


def _assemble(steps: Sequence[list]) -> mgpu.FragmentedArray:
    """A fragment from the registers [p][h] of its steps of 16."""
    layout = FRAGMENT.to_mgpu()
    registers = np.empty((2 * STEPS, 2), dtype=object)
    for s, halves in enumerate(steps):
        registers[2 * s : 2 * s + 2] = halves
    registers = registers.reshape(layout.registers_shape((STRIP, K_TILE)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_pairs(ref: ir.Value, column) -> list[list]:
    """ref[..., column : column + 2] for every leading index."""
    kind = ir.MemRefType(ref.type)
    *leading, columns = kind.shape
    size = mgpu_utils.bitwidth(kind.element_type) // 8
    first = at(mgpu_utils.memref_ptr(ref), mul(column, size))
    pairs = []
    for i in range(int(np.prod(leading))):
        place = at(first, i * columns * size)
        pair = llvm.load(vec(2, kind.element_type), place, alignment=2 * size)
        pairs.append([vector.extract(pair, [], [h]) for h in range(2)])
    return pairs


def _scale(values: Sequence[ir.Value]) -> list:
    """Two columns' scales in float16, each twice: the weights of a register share a column."""
    both = vector.from_elements(vec(2, values[0].type), list(values))
    if values[0].type != f32():
        both = arith.extf(vec(2, f32()), both)
    power = vector.broadcast(both.type, mgpu_utils.c(2.0**SCALE_EXPONENT, f32()))
    both = arith.truncf(vec(2, _f16()), arith.mulf(both, power))
    return [vector.broadcast(vec(2, _f16()), vector.extract(both, [], [h])) for h in range(2)]


def _pair() -> ir.Value:
    """Which pair of columns among the 8 of a warp a lane has."""
    return div(rem(_thread(), 32), 4)


def _row() -> ir.Value:
    """The first of a lane's two neighbouring rows of the result among 8."""
    return mul(rem(_thread(), 4), 2)


def _fragment() -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((STRIP, K_TILE), jnp.float16, layout=FRAGMENT)


def _sums(rows: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((STRIP, rows), jnp.float32, layout=SUMS)


def _as_i32(value: ir.Value) -> ir.Value:
    return vector.extract(vector.bitcast(vec(1, i32()), value), [], [0])


def _to_f16(values: ir.Value) -> ir.Value:
    kind = ir.VectorType(values.type)
    [length] = kind.shape
    if kind.element_type == _f16():
        return values
    if kind.element_type != f32():
        values = arith.extf(vec(length, f32()), values)
    return arith.truncf(vec(length, _f16()), values)


def _thread() -> ir.Value:
    """The thread's number in its block, where gathering warpgroups come first."""
    return arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))


def _f16() -> ir.Type:
    return ir.F16Type.get()
