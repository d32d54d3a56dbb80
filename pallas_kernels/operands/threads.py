"""Operands of the tensor cores, written per CUDA thread: x in float16, weights looked up.

Each function is one primitive of a warpgroup; `interpreted` has its twin in jnp. Along K, 4 lanes q
of a warp share a column, and each holds 16 neighbouring weights of a tile of 64, whole codebook
vectors: input 16 q + 2 i + e of a tile (i < 8, e < 2) stands at 8 i + 2 q + e in a fragment, and in
x. The table in shared memory repeats every codebook vector over 128 bytes, and neighbouring lanes
read neighbouring copies: whatever the codes, lanes that are served together meet in no bank.

Letters: m codebooks, b bits a code, v weights a code, c a codebook, s a step of 16 along K, p its
first or second half, h one of a lane's two neighbouring columns.

Source: PTX ISA, mma.sync.m16n8k16 and wgmma.mma_async.m64nNk16 for the registers of operands.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import cast

import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from jaxcodec.pallas_kernels.lanes import (
    SCALAR,
    add,
    at,
    below,
    c,
    div,
    f32,
    far,
    i32,
    load_words,
    mul,
    rem,
    row_offset,
    thread,
    vec,
)
from jaxcodec.pallas_kernels.operands.layout import (
    K_TILE,
    LANE_K,
    SCALE_EXPONENT,
    TABLE_BITS,
    TABLE_ROW,
    WARPGROUP,
)
from jaxcodec.spec import CodebookSpec

STEPS = K_TILE // 16  # mmas along K of a tile

SUMS = plgpu.Layout._WGMMA_ACC_32BIT
FRAGMENT = plgpu.Layout.WGMMA
SWIZZLED = (plgpu.SwizzleTransform(128),)


def store_scalar(ref, value) -> None:
    """ref[0] = value."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR))
    def store(_, ref, value):
        with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread(WARPGROUP), c(0))):
            llvm.store(value.registers.item(), mgpu_utils.memref_ptr(ref))

    store(ref, value)


def store_largest(x_ref, maxima_ref) -> None:
    """The largest |x| that each warp of a warpgroup finds in its share of x, f32 [4]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def store(_, x, maxima):
        kind, largest = ir.MemRefType(x.type), mgpu_utils.c(0.0, f32())
        dtype, [K] = kind.element_type, kind.shape
        size, first = mgpu_utils.bitwidth(dtype) // 8, mgpu_utils.memref_ptr(x)
        own = thread(WARPGROUP)
        for start in range(0, K // 8, WARPGROUP):
            piece = add(own, start)
            # Beyond the end threads read the first piece again.
            piece = arith.select(below(piece, K // 8), piece, c(0))
            values = llvm.load(vec(8, dtype), at(first, mul(piece, 8 * size)), alignment=8 * size)
            sizes = math.absf(to_f32(values))
            reduced = vector.reduction(f32(), vector.CombiningKind.MAXIMUMF, sizes)
            largest = arith.maximumf(largest, reduced)
        for distance in (16, 8, 4, 2, 1):
            largest = arith.maximumf(largest, mgpu_utils.shfl_bfly(largest, distance))
        with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.eq, rem(own, 32), c(0))):
            llvm.store(largest, at(mgpu_utils.memref_ptr(maxima), mul(div(own, 32), 4)))

    store(x_ref, maxima_ref)


def write_halves(x_ref, power, tiles_ref) -> None:
    """A row of x times a power of two, as float16 in the order of fragments.

    Refs in global memory: x [K], tiles f16 [K / 64, 64].
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, plgpu.RefType()))
    def write(_, x, power, tiles):
        kind, power = ir.MemRefType(x.type), power.registers.item()
        dtype, [K] = kind.element_type, kind.shape
        size = mgpu_utils.bitwidth(dtype) // 8
        (stride, _), _ = ir.MemRefType(tiles.type).get_strides_and_offset()
        x, tiles = mgpu_utils.memref_ptr(x), mgpu_utils.memref_ptr(tiles)
        # A thread writes 16 bytes: of each lane's neighbours in a tile the i-th pair.
        for start in range(0, K // 8, WARPGROUP):
            piece = add(thread(WARPGROUP), start)
            with mgpu_utils.when(below(piece, K // 8)):
                tile, i = div(piece, 8), rem(piece, 8)
                first = at(x, mul(add(mul(tile, K_TILE), mul(i, 2)), size))
                halves = []
                for lane in range(4):
                    place = at(first, lane * LANE_K * size)
                    pair = to_f32(llvm.load(vec(2, dtype), place, alignment=2 * size))
                    pair = arith.mulf(pair, vector.broadcast(pair.type, power))
                    pair = to_dtype(pair, f16())
                    halves += [vector.extract(pair, [], [e]) for e in range(2)]
                place = far(tiles, tile, 2 * stride, mul(i, 16))
                llvm.store(vector.from_elements(vec(8, f16()), halves), place, alignment=16)

    write(x_ref, power, tiles_ref)


def fill(table_ref, books_ref, warpgroups: int) -> None:
    """Repeat every codebook vector over its row of the table, in the table's dtype.

    Refs: table [pairs, 2**b, 2, 64] in shared memory, books [m, 2**b, v].
    """
    m, size, v = books_ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 2)
    def fill(_, table, books):
        kind, dtype = (ir.MemRefType(ref.type).element_type for ref in (table, books))
        table, books_pointer = mgpu_utils.memref_ptr(table), mgpu_utils.memref_ptr(books)
        width = v * mgpu_utils.bitwidth(dtype) // 8
        for start in range(0, size, WARPGROUP * warpgroups):
            entry = add(thread(), start)
            with mgpu_utils.when(below(entry, size)):
                for book in range(m):
                    place = at(at(books_pointer, mul(entry, width)), book * size * width)
                    vector_v = llvm.load(vec(v, dtype), place, alignment=min(16, width))
                    row = at(table, mul(entry, 2 * TABLE_ROW))
                    row = at(row, (book // 2 * size * 2 + book % 2) * TABLE_ROW)
                    _fill_row(row, to_dtype(vector_v, kind))

    fill(table_ref, books_ref)


def _fill_row(row, values) -> None:
    """Repeat a vector over 128 bytes of the table, 16 at a time.

    Threads begin at different places, so that the 8 threads of a phase do not meet in a bank.
    """
    [length] = ir.VectorType(values.type).shape
    words = vector.bitcast(vec(length // 2, i32()), values)
    words = [vector.extract(words, [], [j]) for j in range(length // 2)]
    for i in range(TABLE_ROW // 16):
        part = arith.xori(thread(8), c(i))
        held = [words[j % len(words)] for j in range(4)]
        if len(words) > 4:
            odd = arith.cmpi(arith.CmpIPredicate.ne, rem(part, 2), c(0))
            held = [arith.select(odd, words[4 + j], words[j]) for j in range(4)]
        held = vector.from_elements(vec(4, i32()), held)
        llvm.store(held, at(row, mul(part, 16)), alignment=16)


class Lane:
    """What a thread holds while it gathers its part of a fragment: 16 weights of two columns."""

    def __init__(
        self,
        spec: CodebookSpec,
        table,
        codes,
        scales,
        column=None,
        word=None,
        group=None,
        scaled=True,
    ):
        self.spec, self.scaled = spec, scaled
        self.dtype = ir.MemRefType(table.type).element_type
        v, g, length = spec.vector_length, spec.group_size, spec.vector_length * spec.codes_per_word
        lane, self.table = thread(32), mgpu_utils.memref_ptr(table)
        first = mul(rem(lane, 4), LANE_K)  # of its weights along K
        column = mul(rem(div(thread(), 32), 4), 16) if column is None else column
        column = add(column, mul(pair_of_columns(), 2))
        word, group = c(0) if word is None else word, c(0) if group is None else group
        self.low, self.odd = own_copy(v)
        word = add(word, div(first, length))
        rows = [add(word, i) for i in range(max(1, LANE_K // length))]
        self.words = _load_pairs(codes, spec.num_codebooks, rows, column)
        # Of a word that holds more than the lane's weights, the code that they begin with.
        self.ahead = div(rem(first, length), v) if length > LANE_K else None
        group = add(group, div(first, g)) if g < K_TILE else group
        [[scales]] = _load_pairs(scales, 1, [group], column)
        self.scales = _scale(scales) if scaled else [_number(scale) for scale in scales]
        self.entries: dict[tuple[int, int, int], list] = {}

    def look_up(self, s: int) -> None:
        """Load the entries that begin in a step."""
        v, books = self.spec.vector_length, range(self.spec.num_codebooks)
        codes = range(pl.cdiv(4 * s, v), pl.cdiv(4 * (s + 1), v))
        for h, code, book in product(range(2), codes, books):
            self.entries[h, code, book] = self._entry(h, code, book)

    def finish(self, s: int) -> list:
        """Registers [p][h]: entries summed over codebooks, times the column's scale if `scaled`."""
        books = self.apart(s)
        total = [[reduce(arith.addf, [b[p][h] for b in books]) for h in range(2)] for p in range(2)]
        if not self.scaled:
            return total
        return [[arith.mulf(half[h], self.scales[h]) for h in range(2)] for half in total]

    def apart(self, s: int) -> list:
        """Registers [codebook][p][h] of the entries themselves."""
        books, halves = range(self.spec.num_codebooks), range(2)
        return [[[self._pair(h, 4 * s + 2 * p, b) for h in halves] for p in halves] for b in books]

    def _pair(self, h: int, i: int, book: int) -> ir.Value:
        """A codebook's part of the neighbouring weights i and i + 1 of a column."""
        code, place = divmod(i, self.spec.vector_length)
        return self.entries[h, code, book][place // 2]

    def _entry(self, h: int, code: int, book: int) -> list:
        """A codebook vector, two weights a register."""
        word, position = divmod(code, self.spec.codes_per_word)
        if self.spec.bits > TABLE_BITS:
            return self._distant_entry(self.words[book][word][h], position, book)
        place = self._table_offset(self.words[book][word][h], position)
        return read_entry(self.spec, self.table, place, book, self.dtype, self.odd)

    def _distant_entry(self, word, position: int, book: int) -> list:
        """An entry of a codebook in global memory, [m, 2**b, v]."""
        b, size = self.spec.bits, 2 * self.spec.vector_length
        if self.ahead is not None:
            word = arith.shrui(word, mul(self.ahead, b))
        code = arith.andi(arith.shrui(word, c(b * position)), c(2**b - 1))
        first = at(at(self.table, mul(code, size)), book * self.spec.codebook_size * size)
        most = min(8, self.spec.vector_length)  # values of a load
        places = [at(first, begin) for begin in range(0, size, 2 * most)]
        return [pair for place in places for pair in load_pairs(place, most, self.dtype)]

    def _table_offset(self, word, position: int) -> ir.Value:
        """256 times code `position`, counted from the lane's first, of a word, plus `low`."""
        b, row = self.spec.bits, 2 * TABLE_ROW
        if self.ahead is None:
            return row_offset(word, b, position, self.low, row)
        if b < 8:
            return row_offset(arith.shrui(word, mul(self.ahead, b)), b, position, self.low, row)
        # One instruction puts the code's byte above the lane's.
        selector = arith.addi(c(0x5504 + 16 * position), mul(self.ahead, 16))
        ptx, operands = "prmt.b32 $0, $1, $2, $3;", [word, self.low, selector]
        found = llvm.inline_asm(i32(), operands, ptx, "=r,r,r,r", has_side_effects=False)
        return cast(ir.Value, found)


def read_entry(spec: CodebookSpec, table: ir.Value, place, book: int, dtype, odd) -> list:
    """A vector of a codebook, from a place among those of all its codes, two values a register.

    Of the 4 copies of 32 bytes an odd lane reads the second half first, to meet no even one.
    """
    # Two codebooks share rows. What is known is added last, where a load has room for it.
    offset = (book // 2 * spec.codebook_size * 2 + book % 2) * TABLE_ROW
    v = spec.vector_length
    load = lambda place: load_pairs(at(at(table, place), offset), min(v, 8), dtype)
    if v < 16:
        return load(place)
    first, second = load(place), load(arith.xori(place, c(16)))
    pick = lambda a, b: [arith.select(odd, x, y) for x, y in zip(a, b, strict=True)]
    return pick(second, first) + pick(first, second)


def own_copy(v: int) -> tuple[ir.Value, ir.Value]:
    """Where in a row of the table the lane's copy of a vector begins, and whether it is odd."""
    lane, size = thread(32), min(16, 2 * v)
    odd = arith.cmpi(arith.CmpIPredicate.ne, rem(lane, 2), c(0))
    return mul(rem(lane, TABLE_ROW // size), size), odd


def load_pairs(place, count: int, dtype: ir.Type) -> list:
    """`count` neighbouring values of 16 bits, two a register, from one load."""
    words = load_words(place, count // 2)
    pair = lambda word: vector.from_elements(vec(1, i32()), [word])
    return [vector.bitcast(vec(2, dtype), pair(word)) for word in words]


def _load_pairs(ref: ir.Value, count: int, rows: Sequence[ir.Value], column) -> list[list]:
    """ref[i, row, column : column + 2] for i < count and each row, where ref has 2 or 3 axes."""
    kind = ir.MemRefType(ref.type)
    strides, _ = kind.get_strides_and_offset()
    size = mgpu_utils.bitwidth(kind.element_type) // 8
    first = at(mgpu_utils.memref_ptr(ref), mul(column, size))
    found = []
    for i in range(count):
        outer = 0 if len(strides) == 2 else i * strides[0] * size
        places = [at(at(first, mul(row, strides[-2] * size)), outer) for row in rows]
        loaded = [llvm.load(vec(2, kind.element_type), p, alignment=2 * size) for p in places]
        found.append([[vector.extract(pair, [], [h]) for h in range(2)] for pair in loaded])
    return found


def _number(value: ir.Value) -> ir.Value:
    """A scale in float32."""
    return vector.extract(to_f32(vector.from_elements(vec(1, value.type), [value])), [], [0])


def _scale(values: Sequence[ir.Value]) -> list:
    """Two columns' scales in float16, each twice: the weights of a register share a column."""
    both = to_f32(vector.from_elements(vec(2, values[0].type), list(values)))
    power = vector.broadcast(both.type, mgpu_utils.c(2.0**SCALE_EXPONENT, f32()))
    both = arith.truncf(vec(2, f16()), arith.mulf(both, power))
    return [vector.broadcast(vec(2, f16()), vector.extract(both, [], [h])) for h in range(2)]


def pair_of_columns() -> ir.Value:
    """Which pair of columns among the 8 of a warp a lane has."""
    return div(thread(32), 4)


def with_registers(total, sums: Sequence) -> mgpu.FragmentedArray:
    """An array like `total` that holds these values."""
    registers = np.empty(len(sums), dtype=object)
    for i, value in enumerate(sums):
        registers[i] = vector.broadcast(vec(1, f32()), value)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(total.registers.shape), _layout=total.layout, _is_signed=None
    )


def as_i32(value: ir.Value) -> ir.Value:
    """Two 16-bit values as one register."""
    return vector.extract(vector.bitcast(vec(1, i32()), value), [], [0])


def to_f32(values: ir.Value) -> ir.Value:
    """A vector in float32."""
    kind = ir.VectorType(values.type)
    return values if kind.element_type == f32() else arith.extf(vec(kind.shape[0], f32()), values)


def to_dtype(values: ir.Value, dtype: ir.Type) -> ir.Value:
    """A vector in a dtype of 16 bits."""
    kind = ir.VectorType(values.type)
    if kind.element_type == dtype:
        return values
    return arith.truncf(vec(kind.shape[0], dtype), to_f32(values))


def f16() -> ir.Type:
    """The type of operands."""
    return ir.F16Type.get()
