"""The per-thread primitives of `fragments_mosaic`, which Pallas cannot express.

Each has a twin of the same name and meaning in `fragments.interpreted`. Words are those of
`fragments.plan`. Thread 4 g + q of a warp has columns 4 g to 4 g + 3 of the words that it copies,
and in the sums columns 8 q to 8 q + 7 of rows g, g + 8, ...
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, scf, vector

from jaxcodec.pallas_kernels import lanes
from jaxcodec.pallas_kernels.fragments.plan import (
    COLUMNS,
    COPY_BYTES,
    ENTRIES,
    WARP,
    WARPGROUP,
    Plan,
)

REF, SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT()
QUAD = 16  # bytes of 4 registers
LANE_COLUMNS = 4


class Thread:
    """Where a CUDA thread stands: all of these are i32 values, but `active`."""

    def __init__(self, plan: Plan):
        self.index = arith.index_cast(lanes.i32(), gpu.thread_id(gpu.Dimension.x))
        self.lane = lanes.rem(self.index, WARP)
        self.g, self.q = lanes.div(self.lane, 4), lanes.rem(self.lane, 4)
        self.warp = mgpu_utils.warp_idx(sync=True)
        self.column_warp = lanes.div(self.warp, plan.tiles.k_warps)
        self.k_warp = lanes.rem(self.warp, plan.tiles.k_warps)
        self.active = lanes.below(self.warp, plan.tiles.columns * plan.tiles.k_warps)

    def unit(self, plan: Plan, first: ir.Value, turn: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The warp's unit number `turn`, counted in the matrix, and whether there is one."""
        unit = lanes.add(lanes.mul(turn, plan.tiles.k_warps), self.k_warp)
        absolute = lanes.add(first, unit)
        valid = arith.andi(lanes.below(unit, plan.units), lanes.below(absolute, plan.all_units))
        return absolute, arith.andi(self.active, valid)

    def slot(self, plan: Plan, ring: ir.Value, turn: ir.Value) -> ir.Value:
        """Where the warp's unit number `turn` lies in the ring."""
        slot = lanes.mul(lanes.rem(turn, plan.tiles.stages), plan.warps)
        return lanes.at(
            mgpu_utils.memref_ptr(ring), lanes.mul(lanes.add(slot, self.warp), plan.slot * 4)
        )


def fetch(plan: Plan, codes_ref, scales_ref, ring_ref, tile, first, turn) -> None:
    """Start copying the codes and scales of each warp's unit number `turn` into its ring slot.

    Refs: codes u32 [m, words, N], scales [K // g, N], ring u32 [stages, warps, slot].
    """
    item = jnp.dtype(plan.scale_dtype).itemsize
    per_copy = COPY_BYTES // item
    per_row = plan.columns // per_copy
    fours = plan.columns // LANE_COLUMNS

    @plgpu.inline_mgpu(arg_types=(REF,) * 3 + (SCALAR,) * 3)
    def emit(_, codes, scales, ring, *scalars):
        tile, first, turn = (array.registers.item() for array in scalars)
        t = Thread(plan)
        N = ir.MemRefType(codes.type).shape[2]
        unit, valid = t.unit(plan, first, turn)
        slot = t.slot(plan, ring, turn)
        warp_column = lanes.add(lanes.mul(tile, plan.tiles.columns), t.column_warp)
        column = lanes.mul(warp_column, plan.columns)
        # A last tile beyond N copies its last columns once more; `reduce` writes none of them.
        for copy in range(plan.tiles.width):
            place = lanes.add(t.lane, copy * WARP)
            q, four = lanes.div(place, fours), lanes.rem(place, fours)
            own = lanes.add(column, lanes.mul(four, LANE_COLUMNS))
            own = lanes.mul(lanes.smaller(own, N - LANE_COLUMNS), 4)
            place = lanes.at(slot, lanes.mul(_place_of_four(plan, q, four), COPY_BYTES))
            for j in range(plan.steps):
                row = lanes.add(lanes.mul(unit, 4 * plan.steps), lanes.add(q, 4 * j))
                if plan.words % (4 * plan.steps):
                    row = lanes.smaller(row, plan.words - 1)
                source = lanes.far(lanes.global_pointer(codes), row, 4 * N, own)
                for c in range(plan.m):
                    lanes.copy_async(
                        lanes.at(place, (j * plan.m + c) * 4 * fours * COPY_BYTES),
                        lanes.at(source, c * plan.words * N * 4),
                        COPY_BYTES,
                        valid,
                    )
        for start in range(0, per_row * plan.scale_rows, WARP):
            place = lanes.add(t.lane, start)
            part, scale_row = lanes.rem(place, per_row), lanes.div(place, per_row)
            if plan.small_groups:
                word = lanes.smaller(lanes.add(lanes.mul(unit, 4), scale_row), plan.words - 1)
                group = lanes.div(lanes.mul(word, plan.word), plan.g)
            else:
                group = lanes.div(unit, plan.g // plan.unit)
            own = lanes.add(column, lanes.mul(part, per_copy))
            own = lanes.mul(lanes.smaller(own, N - per_copy), item)
            source = lanes.far(lanes.global_pointer(scales), group, item * N, own)
            copies = arith.andi(valid, lanes.below(place, per_row * plan.scale_rows))
            place = lanes.add(lanes.mul(place, COPY_BYTES), plan.code_words * 4)
            lanes.copy_async(lanes.at(slot, place), source, COPY_BYTES, copies)

    emit(codes_ref, scales_ref, ring_ref, tile, first, turn)


def _place_of_four(plan: Plan, q: ir.Value | int, four: ir.Value) -> ir.Value:
    """Where 4 columns of word q lie in a step's codes, so that a quad meets no bank twice."""
    q = lanes.c(q) if isinstance(q, int) else q
    place = arith.xori(four, lanes.mul(q, 2))
    return lanes.add(lanes.mul(q, plan.columns // LANE_COLUMNS), place)


def stage(plan: Plan, x_ref, stage_ref, first, chunk) -> None:
    """Start copying the features of a chunk into shared memory, pieces of 8 swapped.

    All threads of a block together; zeros beyond K, nothing beyond M.
    Refs: x [M, K], stage [1 or 2, x_rows, pitch].
    """
    ragged = plan.chunk_units * plan.unit * plan.chunks * plan.tiles.k_blocks != plan.K

    @plgpu.inline_mgpu(arg_types=(REF,) * 2 + (SCALAR,) * 2)
    def emit(_, x, stage, *scalars):
        first, chunk = (array.registers.item() for array in scalars)
        own = _OwnPieces(plan, stage, chunk)
        chunk_k = lanes.mul(lanes.add(first, lanes.mul(chunk, plan.chunk_units)), plan.unit)
        for piece, exists, place in own.pieces(lanes.below(chunk, plan.chunks)):
            k = lanes.add(chunk_k, lanes.mul(piece, 8))
            source = lanes.far(lanes.global_pointer(x), own.group, 2 * plan.K, lanes.mul(k, 2))
            filled = lanes.below(k, plan.K) if ragged else None
            for row in range(0, plan.M, own.groups):
                lanes.copy_async(
                    lanes.at(place, row * 2 * plan.pitch),
                    lanes.at(source, row * 2 * plan.K),
                    COPY_BYTES,
                    own.fits(row, exists),
                    filled,
                )

    emit(x_ref, stage_ref, first, chunk)


def arrange(plan: Plan, stage_ref, chunk) -> None:
    """Order the registers of a chunk's fragments; every thread those that it copied itself.

    16 bytes hold registers low, high of two products. Of at most 8 rows, both products share one
    operand; of more, a row shares it with the row 8 further on. See `_Unit._operand`.
    """
    if plan.small_groups:
        return

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
    def emit(_, stage, chunk):
        own = _OwnPieces(plan, stage, chunk.registers.item())
        for _, exists, place in own.pieces(lanes.below(lanes.c(0), 1)):
            for row in range(0, plan.M, own.groups):
                if not plan.few and row % 16 >= 8:
                    continue
                branch = scf.IfOp(own.fits(row, exists), [], has_else=False)
                with ir.InsertionPoint(branch.then_block):
                    low = lanes.at(place, row * 2 * plan.pitch)
                    a = lanes.load_words(low, 4)
                    if plan.few:
                        lanes.store(low, [a[0], a[2], a[1], a[3]])
                    else:
                        high = lanes.at(low, 8 * 2 * plan.pitch)
                        b = lanes.load_words(high, 4)
                        lanes.store(low, [a[0], b[0], a[1], b[1]])
                        lanes.store(high, [a[2], b[2], a[3], b[3]])
                    scf.yield_([])

    emit(stage_ref, chunk)


class _OwnPieces:
    """Which 16-byte pieces of a chunk of x a thread copies: some places of every groups-th row."""

    def __init__(self, plan: Plan, stage: ir.Value, chunk: ir.Value):
        self.plan, self.t = plan, Thread(plan)
        self.count = plan.chunk_features // 8  # of a row
        self.groups = 1
        while self.groups < 8 and 2 * self.groups * self.count <= plan.threads:
            self.groups *= 2
        self.across = plan.threads // self.groups
        self.group = lanes.div(self.t.index, self.across)  # also the thread's first row
        row = lanes.add(lanes.mul(lanes.rem(chunk, 2), plan.x_rows), self.group)
        self.buffer = lanes.at(mgpu_utils.memref_ptr(stage), lanes.mul(row, 2 * plan.pitch))

    def pieces(self, wanted: ir.Value):
        """Yield (piece of the chunk, whether it exists, its place in the thread's first row)."""
        plan = self.plan
        for start in range(0, self.count, self.across):
            piece = lanes.add(lanes.rem(self.t.index, self.across), start)
            q = lanes.rem(lanes.div(piece, plan.word // 8), 4)
            place = lanes.at(self.buffer, lanes.mul(_swapped(plan, piece, q), COPY_BYTES))
            exists = wanted
            if self.count % self.across:
                exists = arith.andi(wanted, lanes.below(piece, self.count))
            yield piece, exists, place

    def fits(self, row: int, exists: ir.Value) -> ir.Value:
        """Whether the thread has a row of x in the rows that begin at `row`."""
        if row + self.groups <= self.plan.M:
            return exists
        return arith.andi(exists, lanes.below(self.group, self.plan.M - row))


def _swapped(plan: Plan, piece: ir.Value | int, q: ir.Value) -> ir.Value:
    """Where a piece of lane q's word lies."""
    piece = lanes.c(piece) if isinstance(piece, int) else piece
    if plan.small_groups or plan.word < 32:
        return piece
    swap = arith.andi(q, lanes.c(2)) if plan.word == 32 else lanes.mul(q, 2)
    return arith.xori(piece, swap)


def fill(plan: Plan, codebooks_ref, book_ref) -> None:
    """Write the copies of every codebook vector, all threads of a block together.

    Refs: codebooks [m, 256, v], book [regions, 256, 128].
    """
    sharers = max(plan.threads // ENTRIES, 1)  # threads that copy one vector
    chunks = plan.table_bytes // QUAD
    share_chunks = -(-chunks // sharers)

    @plgpu.inline_mgpu(arg_types=(REF,) * 2)
    def emit(_, codebooks, book):
        t = Thread(plan)
        source, book = lanes.global_pointer(codebooks), mgpu_utils.memref_ptr(book)
        share = lanes.mul(lanes.rem(t.index, sharers), share_chunks)
        for start in range(0, ENTRIES, plan.threads):
            entry = lanes.add(lanes.div(t.index, sharers), start)
            for c in range(plan.m):
                for part, piece, words in _pieces_of_vector(plan, source, entry, c):
                    for s in range(share_chunks):
                        # Neighbouring threads begin at different banks.
                        chunk = lanes.rem(lanes.add(lanes.add(share, s), entry), chunks)
                        place = lanes.add(lanes.mul(entry, 256), lanes.mul(chunk, QUAD))
                        place = lanes.add(place, plan.table_offset(c, part, piece))
                        lanes.store(lanes.at(book, place), (words * 4)[:4])

    emit(codebooks_ref, book_ref)


def _pieces_of_vector(plan: Plan, source: ir.Value, entry: ir.Value, c: int):
    """Yield (part, piece, its 32-bit words) of vector `entry` of codebook c."""
    item = jnp.dtype(plan.book_dtype).itemsize
    count = plan.v * item // 4
    width = min(4, count)
    place = lanes.add(lanes.mul(entry, plan.v * item), c * ENTRIES * plan.v * item)
    place = lanes.at(source, place)
    words = [
        word
        for start in range(0, count, width)
        for word in lanes.load_words(lanes.at(place, 4 * start), width)
    ]
    parts = [words]
    if plan.book_dtype != plan.dtype:
        kind = lanes.float_type(plan.dtype)
        values = lanes.floats(words, plan.book_dtype)
        parts = []
        for _ in range(plan.parts):
            rounded = [arith.truncf(kind, value) for value in values]
            parts.append(lanes.pairs(rounded))
            values = [
                arith.subf(value, arith.extf(lanes.f32(), near))
                for value, near in zip(values, rounded, strict=True)
            ]
    per_piece = plan.piece // 4
    for part, packed in enumerate(parts):
        for piece in range(plan.pieces):
            yield part, piece, packed[piece * per_piece : (piece + 1) * per_piece]


def sums_layout(plan: Plan):
    """A register holds columns 8 q + 4 half to + 3 of a tile, of row 8 eight + g.

    It is number (tile * eights + eight) * 2 + half.
    """
    length = plan.tiles.width * plan.eights * 8 * WARPGROUP
    return plgpu.Layout.WG_STRIDED((length,), vec_size=LANE_COLUMNS)


def multiply(plan: Plan, codebooks_ref, book_ref, ring_ref, stage_ref, sums, first, turn):
    """The sums after each warp's unit number `turn`, whose copies have arrived.

    Args:
      sums: f32 [width * eights * 8 * 128] in `sums_layout`.
    """
    layout = sums_layout(plan)
    book_ref = codebooks_ref if plan.global_book else book_ref

    @plgpu.inline_mgpu(
        arg_types=(REF,) * 3 + (layout,) + (SCALAR,) * 2,
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout),
    )
    def emit(_, book, ring, stage, sums, *scalars):
        first, turn = (array.registers.item() for array in scalars)
        t = Thread(plan)
        _, valid = t.unit(plan, first, turn)
        pointer = lanes.global_pointer if plan.global_book else mgpu_utils.memref_ptr
        unit = lanes.add(lanes.mul(lanes.rem(turn, plan.chunk), plan.tiles.k_warps), t.k_warp)
        buffer = lanes.rem(lanes.div(turn, plan.chunk), 2)
        step = lanes.mul(unit, plan.steps)
        row = lanes.smaller(t.g, plan.M - 1) if plan.few else t.g
        row = lanes.add(lanes.mul(buffer, plan.x_rows), row)
        x = lanes.add(lanes.mul(row, 2 * plan.pitch), lanes.mul(step, 2 * plan.step))
        x = lanes.at(mgpu_utils.memref_ptr(stage), x)
        values: list[ir.Value] = [
            vector.extract(register, [], [e]) for register in sums.registers.flat for e in range(4)
        ]
        branch = scf.IfOp(valid, [lanes.f32()] * len(values), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            unit = _Unit(plan, t, pointer(book), t.slot(plan, ring, turn), x)
            scf.yield_(unit.add_to(values))
        with ir.InsertionPoint(cast(ir.Block, branch.else_block)):
            scf.yield_(values)
        registers = np.empty(sums.registers.shape, dtype=object)
        for r in range(registers.size):
            four = list(branch.results)[4 * r : 4 * r + 4]
            registers.flat[r] = vector.from_elements(lanes.vec(4, lanes.f32()), four)
        return mgpu.FragmentedArray(_registers=registers, _layout=sums.layout, _is_signed=None)

    return emit(book_ref, ring_ref, stage_ref, sums, first, turn)


class _Unit:
    """The products of one unit of a warp."""

    def __init__(self, plan: Plan, t: Thread, book: ir.Value, slot: ir.Value, x: ir.Value):
        self.plan, self.t, self.book, self.slot, self.x = plan, t, book, slot, x
        copies = 1 if plan.global_book else plan.table_bytes // plan.piece
        self.low = lanes.mul(lanes.rem(t.lane, copies), plan.piece)
        self.selector = lanes.byte_selector(t.q) if plan.small_groups else None

    def add_to(self, sums: list[ir.Value]) -> list[ir.Value]:
        """sums + scale * products of all steps."""
        plan = self.plan
        # A vector of 2 features is half of the 4 that a thread gives to a product.
        span = 1 if plan.v >= 4 else 2
        total = self._zeros()
        for j in range(plan.steps):
            for code in range(0, plan.codes, span):
                for tile in range(plan.tiles.width):
                    vectors = [
                        columns
                        for c in range(plan.m)
                        for columns in self._look_up(j, c, tile, code, span)
                    ]
                    for p in range(span * plan.v // 4):
                        product = code * plan.v // 4 + p
                        own = [[r[2 * p : 2 * p + 2] for r in columns] for columns in vectors]
                        self._multiply(j, product, own, total[tile])
                if plan.small_groups:
                    sums, total = self._scaled(code, total, sums), self._zeros()
        return sums if plan.small_groups else self._scaled(0, total, sums)

    def _zeros(self):
        zero = mgpu_utils.c(0.0, lanes.f32())
        targets = 2 if self.plan.few else self.plan.row_tiles
        tiles = range(self.plan.tiles.width)
        return [[[[zero] * 4 for _ in range(4)] for _ in range(targets)] for _ in tiles]

    def _look_up(self, j: int, c: int, tile: int, code: int, span: int):
        """Registers of `span` codes of the thread's 4 columns, for every part of codebook c."""
        plan = self.plan
        words = [self._words(j, c, tile, code + e) for e in range(span)]
        for part in range(plan.parts):
            columns = []
            for i in range(LANE_COLUMNS):
                registers = []
                for e in range(span):
                    registers += self._vector(words[e][i], c, part, code + e)
                columns.append(registers)
            yield columns

    def _words(self, j: int, c: int, tile: int, code: int) -> list[ir.Value]:
        """The words of the thread's 4 columns that hold this code."""
        plan, t = self.plan, self.t
        # In small groups all lanes of a quad take word `code` together.
        place = _place_of_four(plan, code if plan.small_groups else t.q, t.g)
        slot = lanes.at(self.slot, lanes.mul(place, COPY_BYTES))
        return lanes.load_words(
            lanes.at(slot, (j * plan.m + c) * 16 * plan.columns + tile * 8 * COPY_BYTES), 4
        )

    def _vector(self, word: ir.Value, c: int, part: int, code: int) -> list[ir.Value]:
        plan = self.plan
        if plan.global_book:
            index = lanes.rem(word, 1 << 16) if code == 0 else lanes.div(word, 1 << 16)
            place = lanes.at(self.book, lanes.mul(index, 2 * plan.v))
            offsets = [(c << 16) * 2 * plan.v + piece * plan.piece for piece in range(plan.pieces)]
        else:
            if self.selector is None:
                place = lanes.byte_offset(word, code, self.low)
            else:
                place = lanes.byte_offset_of_lane(word, self.selector, self.low)
            place = lanes.at(self.book, place)
            offsets = [plan.table_offset(c, part, piece) for piece in range(plan.pieces)]
        count = plan.piece // 4
        return [
            word
            for offset in offsets
            for word in lanes.load_words(lanes.at(place, offset), count, plan.global_book)
        ]

    def _multiply(self, j: int, product: int, vectors, total) -> None:
        """total += x * vectors, for 16 features of all rows; `vectors` [books][column][2]."""
        plan = self.plan
        for target in [product % 2] if plan.few else range(plan.row_tiles):
            x = self._operand(j, product, 0 if plan.few else 16 * target)
            for columns in vectors:
                for i in range(LANE_COLUMNS):
                    total[target][i] = lanes.mma(x, columns[i], total[target][i], plan.dtype)

    def _operand(self, j: int, product: int, row: int) -> list[ir.Value]:
        """Of 16 rows at `row`: low of row g, low of row g + 8, high of row g, high of row g + 8.

        Where there are at most 8, rows 8 to 15 of an even product are the next product's rows.
        """
        plan, q = self.plan, self.t.q
        pair, odd = divmod(product, 2)
        if plan.small_groups:
            a, b = ((row, product), (row + 8, product))
            if plan.few:
                a, b = (row, 2 * pair), (row, 2 * pair + 1)
            (a_low, a_high), (b_low, b_high) = self._low_high(j, *a), self._low_high(j, *b)
            return [a_low, b_low, a_high, b_high]
        if odd and not plan.few:
            row += 8
        x = lanes.at(self.x, row * 2 * plan.pitch + j * 2 * plan.step)
        place = lanes.add(lanes.mul(q, 2 * plan.word), lanes.mul(_swapped(plan, pair, q), 16))
        return lanes.load_words(lanes.at(x, place), 4)

    def _low_high(self, j: int, row: int, product: int) -> list[ir.Value]:
        """The thread's registers of x for one product, from shared memory that nobody arranged."""
        plan = self.plan
        code, within = divmod(4 * product, plan.v)
        k = j * plan.step + code * plan.word + within
        x = lanes.at(self.x, (row * plan.pitch + k) * 2)
        return lanes.load_words(lanes.at(x, lanes.mul(self.t.q, 2 * plan.v)), 2)

    def _scaled(self, scale_row: int, total, sums: list[ir.Value]) -> list[ir.Value]:
        """sums + scale * total."""
        plan = self.plan
        item = jnp.dtype(plan.scale_dtype).itemsize
        result = []
        for tile in range(plan.tiles.width):
            place = (plan.code_words + scale_row * plan.scale_words) * 4 + tile * COLUMNS * item
            place = lanes.at(self.slot, lanes.add(lanes.mul(self.t.q, 8 * item), place))
            words = [
                word
                for offset in range(0, 8 * item, QUAD)
                for word in lanes.load_words(lanes.at(place, offset), 4)
            ]
            scales = lanes.floats(words, plan.scale_dtype)
            for eight in range(plan.eights):
                for column in range(2 * LANE_COLUMNS):
                    half, i = divmod(column, LANE_COLUMNS)
                    if plan.few:  # the even products of row g, and the odd ones
                        terms = [total[tile][0][i][half], total[tile][1][i][2 + half]]
                    else:
                        terms = [total[tile][eight // 2][i][eight % 2 * 2 + half]]
                    value = sums[len(result)]
                    for term in terms:
                        value = llvm.intr_fma(term, scales[column], value)
                    result.append(value)
        return result


def store_sums(plan: Plan, sums_ref, sums) -> None:
    """Write every warp's sums to f32 [warps, rows, sums_pitch] as [rows, columns]."""

    @plgpu.inline_mgpu(arg_types=(REF, sums_layout(plan)))
    def emit(_, out, sums):
        t = Thread(plan)
        when = t.active
        if plan.M < 8:
            when = arith.andi(when, lanes.below(t.g, plan.M))
        branch = scf.IfOp(when, [], has_else=False)
        with ir.InsertionPoint(branch.then_block):
            row = lanes.add(lanes.mul(t.warp, plan.rows), t.g)
            place = lanes.add(lanes.mul(row, plan.sums_pitch), lanes.mul(t.q, 2 * LANE_COLUMNS))
            place = lanes.at(mgpu_utils.memref_ptr(out), lanes.mul(place, 4))
            for r, register in enumerate(sums.registers.flat):
                rest, half = divmod(r, 2)
                tile, eight = divmod(rest, plan.eights)
                offset = eight * 8 * plan.sums_pitch + tile * COLUMNS + half * LANE_COLUMNS
                offset = 4 * offset
                llvm.store(register, lanes.at(place, offset), alignment=QUAD)
            scf.yield_([])

    emit(sums_ref, sums)


def reduce(plan: Plan, sums_ref, out_ref, tile, rank) -> None:
    """Add the sums of all warps that share columns, in a fixed order, and write the result.

    The blocks of a cluster share the work, and read each other's shared memory.
    Refs: sums f32 [warps, rows, sums_pitch], out [M, N].
    """
    tiles = plan.tiles
    of_warp = plan.columns // 4  # fours of neighbouring columns
    fours = plan.M * tiles.columns * of_warp
    share = -(-fours // tiles.k_blocks)

    @plgpu.inline_mgpu(arg_types=(REF,) * 2 + (SCALAR,) * 2)
    def emit(_, sums, out, *scalars):
        tile, rank = (array.registers.item() for array in scalars)
        t = Thread(plan)
        out_type, N = ir.MemRefType(out.type).element_type, ir.MemRefType(out.type).shape[1]
        item = mgpu_utils.bitwidth(out_type) // 8
        four_type = lanes.vec(4, lanes.f32())
        for start in range(0, share, plan.threads):
            within = lanes.add(t.index, start)
            four = lanes.add(within, lanes.mul(rank, share))
            quarter, rest = lanes.rem(four, of_warp), lanes.div(four, of_warp)
            column_warp, row = lanes.rem(rest, tiles.columns), lanes.div(rest, tiles.columns)
            n = lanes.mul(lanes.add(lanes.mul(tile, tiles.columns), column_warp), plan.columns)
            n = lanes.add(n, lanes.mul(quarter, 4))
            when = arith.andi(lanes.below(within, share), lanes.below(four, fours))
            branch = scf.IfOp(arith.andi(when, lanes.below(n, N)), [], has_else=False)
            with ir.InsertionPoint(branch.then_block):
                place = lanes.mul(column_warp, tiles.k_warps * plan.rows)
                place = lanes.mul(lanes.add(place, row), plan.sums_pitch)
                place = lanes.mul(lanes.add(place, lanes.mul(quarter, 4)), 4)
                place = lanes.at(mgpu_utils.memref_ptr(sums), place)
                terms: list[ir.Value] = []
                for block in range(tiles.k_blocks):
                    peer = lanes.peer_address(place, block) if tiles.k_blocks > 1 else None
                    for warp in range(tiles.k_warps):
                        offset = warp * plan.rows * plan.sums_pitch * 4
                        if peer is None:
                            own = lanes.at(place, offset)
                            terms.append(llvm.load(four_type, own, alignment=QUAD))
                        else:
                            terms.append(lanes.load_peer(peer, offset))
                total: ir.Value = functools.reduce(arith.addf, terms)
                if out_type != lanes.f32():
                    total = arith.truncf(lanes.vec(4, out_type), total)
                target = lanes.far(lanes.global_pointer(out), row, N * item, lanes.mul(n, item))
                llvm.store(total, target, alignment=4 * item)
                scf.yield_([])

    emit(sums_ref, out_ref, tile, rank)


@plgpu.inline_mgpu()
def end_copies(_) -> None:
    """End a group of the thread's copies."""
    nvvm.cp_async_commit_group()


def await_copies(pending: int) -> None:
    """Wait until at most the `pending` last groups of the thread's copies are on their way."""

    @plgpu.inline_mgpu()
    def emit(_):
        nvvm.cp_async_wait_group(pending)

    emit()


@plgpu.inline_mgpu()
def sync_warp(_) -> None:
    """Let the lanes of a warp see what each other's finished copies wrote."""
    nvvm.bar_warp_sync(lanes.c(-1))


@plgpu.inline_mgpu()
def sync_block(_) -> None:
    """Let the threads of a block see each other's shared memory."""
    gpu.barrier()


@plgpu.inline_mgpu()
def sync_cluster(_) -> None:
    """Let the threads of a cluster see each other's shared memory."""
    nvvm.cluster_arrive(aligned=True)
    nvvm.cluster_wait(aligned=True)


def zero_sums(plan: Plan) -> jax.Array:
    """Sums before the first unit."""
    zeros = jnp.zeros((plan.tiles.width * plan.eights * 8 * WARPGROUP,), jnp.float32)
    return plgpu.layout_cast(zeros, sums_layout(plan))
