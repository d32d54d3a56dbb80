"""What the Psumbook kernel does per CUDA thread, because Pallas has no gather.

Each function here is one Mosaic GPU primitive; `psumbook.interpreted` has its twin in plain Pallas.
Refs of several matrices come as tuples, with a scalar `matrix` that says whose is meant.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from jaxcodec.pallas_kernels.lanes import (
    SCALAR,
    add,
    at,
    below,
    c,
    div,
    f32,
    global_pointer,
    i32,
    mul,
    rem,
    row_offset,
    shared_address,
    smaller,
    thread,
    vec,
)
from jaxcodec.pallas_kernels.psumbook.plan import (
    COPIES,
    LARGEST,
    QUAD,
    SMALLEST,
    SUM_COLUMNS,
    SUM_WARPGROUPS,
    WARP,
    WARPGROUP,
    Plan,
)

# Codes are read once, and need no place in the L1 cache.
STREAMED = ".L1::no_allocate.L2::256B"
MAX_LOAD = 16  # bytes


def sync() -> None:
    """Wait for all threads of the block."""

    @plgpu.inline_mgpu()
    def wait(_):
        gpu.barrier()

    wait()


def load(plan: Plan, codes, scales, matrix, tile, start, wanted):
    """Words and scales of a span of columns in one tile.

    Args:
      codes: uint32 refs [m, words of K, N].
      scales: refs [K // g, N].
      tile, start: scalars, the tile and the first column.
      wanted: scalar; without it, and beyond the last column, the first words are loaded: a
        register that a predicate leaves undefined would be taken for any other.

    Returns:
      uint32 [span] for each word of the tile and each codebook, and the scales [span].
    """
    word_type = plgpu.ShapeDtypeStruct((plan.span,), jnp.uint32, plan.layout)
    scale_type = plgpu.ShapeDtypeStruct((plan.span,), scales[0].dtype, plan.layout)
    refs = (plgpu.RefType(),) * len(codes)

    @plgpu.inline_mgpu(
        arg_types=(refs, refs, *(SCALAR,) * 4),
        return_type=([word_type] * (plan.words * plan.books), scale_type),
    )
    def load(_, codes, scales, *scalars):
        matrix, tile, start, wanted = (scalar.registers.item() for scalar in scalars)
        width = _choose(matrix, [c(N) for N in plan.widths])
        column = add(start, mul(thread(WARPGROUP), plan.columns))
        if plan.ragged:
            wanted = arith.andi(wanted, below(column, width))
        rows = plan.tiles // plan.parts * plan.words
        part, tile = rem(tile, plan.parts), div(tile, plan.parts)
        row = add(mul(part, plan.books * rows), mul(tile, plan.words))
        first = arith.select(wanted, add(arith.muli(row, width), column), c(0))
        base = at(_choose(matrix, [global_pointer(ref) for ref in codes]), mul(first, 4))
        words = []
        for w, book in np.ndindex(plan.words, plan.books):
            place = at(base, mul(width, 4 * (book * rows + w)))
            words.append(_load_global(place, i32(), plan.columns, STREAMED))
        dtype = ir.MemRefType(scales[0].type).element_type
        group = div(mul(tile, plan.features), plan.spec.group_size)
        first = arith.select(wanted, add(arith.muli(group, width), column), c(0))
        base = _choose(matrix, [global_pointer(ref) for ref in scales])
        place = at(base, mul(first, mgpu_utils.bitwidth(dtype) // 8))
        scale = _load_global(place, dtype, plan.columns)
        if plan.ragged:  # an arbitrary scale might outweigh all that counts
            scale = arith.select(wanted, scale, mgpu_utils.c(0.0, scale.type))
        words = [_fragment(word, plan.layout, is_signed=False) for word in words]
        return words, _fragment(scale, plan.layout)

    return load(tuple(codes), tuple(scales), matrix, tile, start, wanted)


def vectors(plan: Plan, codebooks, matrix, tile, warpgroup):
    """The codebook vectors that each thread needs for a tile, `held` arrays [128 v].

    In its turn j thread t forms entries of vector t + j * threads of the tile's, modulo their
    number.
    """
    del warpgroup  # the thread index runs over all of them
    v = plan.spec.vector_length
    layout = _vectors_layout(plan)
    some = plgpu.ShapeDtypeStruct((WARPGROUP * v,), codebooks[0].dtype, layout)

    @plgpu.inline_mgpu(
        arg_types=((plgpu.RefType(),) * len(codebooks), SCALAR, SCALAR),
        return_type=[some] * plan.held,
    )
    def vectors(_, codebooks, matrix, tile):
        matrix, tile = matrix.registers.item(), tile.registers.item()
        base = _choose(matrix, [global_pointer(ref) for ref in codebooks])
        first = mul(rem(tile, plan.parts), plan.vectors)
        dtype = ir.MemRefType(codebooks[0].type).element_type
        found = []
        for turn in range(plan.held):
            own = add(first, _job(plan, turn)[1])
            place = at(base, mul(own, v * mgpu_utils.bitwidth(dtype) // 8))
            found.append(_fragment(_load_global(place, dtype, v), layout))
        return found

    return vectors(tuple(codebooks), matrix, tile)


def products(plan: Plan, features, vectors, maxima, warpgroup):
    """Inner products of each thread's vectors with pairs of segments, which it will `fill` in.

    Args:
      features: float32 ref, input features of the tile.
      vectors: of `vectors`.
      maxima: uint32 ref, one for each warp: gets the bits of the warp's largest magnitude, unless
        entries are exact.

    Returns:
      float32 [128 * 2 turns], two products a turn.
    """
    del warpgroup
    v = plan.spec.vector_length
    size, layout = _entries_layout(plan)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), [_vectors_layout(plan)] * plan.held, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.float32, layout),
    )
    def products(_, features, vectors, maxima):
        base = mgpu_utils.memref_ptr(features)
        entries = []
        for turn in range(plan.turns):
            own = vectors[turn % plan.held].registers.item()
            if ir.VectorType(own.type).element_type != f32():
                own = arith.extf(vec(v, f32()), own)
            own = _elements(own)
            pair = smaller(_job(plan, turn)[0], 2 * plan.quads - 1)
            place = at(base, mul(pair, 2 * v * 4))
            x = []
            for begin in range(0, 2 * v, 4):
                part = llvm.load(vec(4, f32()), at(place, 4 * begin), alignment=MAX_LOAD)
                x += _elements(part)
            entries += [_dot(x[:v], own), _dot(x[v:], own)]
        if not plan.exact:
            _note_largest(entries, maxima)
        return _fragment(_packed(entries), layout)

    return products(features, list(vectors), maxima)


def fill(plan: Plan, table, entries, maxima, warpgroup):
    """Write the table of one tile from all threads' entries; return the unit of its integers.

    A thread writes half a row a turn, 16 bytes at a time. The 8 threads that a store serves at
    once begin at different places, so that no bank is asked twice.
    """
    del warpgroup
    _, layout = _entries_layout(plan)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, SCALAR),
    )
    def fill(_, table, entries, maxima):
        base, entries = mgpu_utils.memref_ptr(table), _elements(entries.registers.item())
        unit = inverse = mgpu_utils.c(1.0, f32())
        if not plan.exact:
            unit, inverse = _unit(plan, maxima)
        for turn in range(plan.turns):
            pair, own = _job(plan, turn)
            both = entries[2 * turn : 2 * turn + 2]
            if plan.exact:
                both = [arith.bitcast(i32(), value) for value in both]
            else:
                both = [_integers([arith.mulf(value, inverse) for value in both])] * 2
            row = add(mul(div(pair, 2), plan.vectors), own)
            offset = add(mul(row, 4 * plan.row_words), mul(rem(pair, 2), 2 * plan.row_words))
            if 2 * plan.quads * plan.vectors >= (turn + 1) * plan.threads:
                _store_half_row(plan, base, offset, both)
                continue
            with mgpu_utils.when(below(pair, 2 * plan.quads)):
                _store_half_row(plan, base, offset, both)
        return mgpu.FragmentedArray.splat(unit, (), is_signed=None)

    return fill(table, entries, maxima)


def _store_half_row(plan: Plan, base: ir.Value, offset: ir.Value, both: Sequence[ir.Value]):
    """Write the copies of two words; the two are one value unless entries are exact."""
    first, second = both
    chunks = 4 * COPIES // MAX_LOAD
    offset = add(offset, mul(thread(chunks), MAX_LOAD))
    # Opaque, or the compiler keeps all the addresses in registers throughout the kernel.
    offset = mgpu_utils.inline_ptx(
        "mov.b32 $0, $1;", offset, result_types=i32(), has_side_effects=True
    )
    if first is not second:
        upper = arith.andi(offset, c(2 * COPIES))
        swapped = arith.cmpi(arith.CmpIPredicate.ne, upper, c(0))
        first, second = (
            arith.select(swapped, second, first),
            arith.select(swapped, first, second),
        )
    for chunk in range(chunks):
        value = first if chunk < chunks // 2 else second
        place = at(base, arith.xori(offset, c(MAX_LOAD * chunk)))
        llvm.store(vector.broadcast(vec(4, i32()), value), place, alignment=MAX_LOAD)


def gather(plan: Plan, table, words):
    """Sum a tile's entries of one span: float32 [span], in units of `fill`.

    Args:
      table: uint32 ref [quads, vectors, words of a row].
      words: of `load`.
    """
    spec = plan.spec

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), [plan.layout] * len(words)),
        return_type=plgpu.ShapeDtypeStruct((plan.span,), jnp.float32, plan.layout),
    )
    def gather(_, table, words):
        base = shared_address(mgpu_utils.memref_ptr(table))
        lane = mul(thread(COPIES // 2 if plan.exact else COPIES), 4)
        columns = [_elements(word.registers.item()) for word in words]
        sums = []
        for column in range(plan.columns):
            entries = []
            for place, (w, book) in enumerate(np.ndindex(plan.words, plan.books)):
                for i in range(spec.codes_per_word):
                    quad, s = divmod(w * spec.codes_per_word + i, QUAD)
                    offset = row_offset(
                        columns[place][column], spec.bits, i, lane, 4 * plan.row_words
                    )
                    row = quad * plan.vectors + book * spec.codebook_size
                    entries.append(_entry(plan, add(base, offset), row, s))
            if plan.exact:
                sums.append(functools.reduce(arith.addf, entries))
            else:
                sums.append(arith.sitofp(f32(), functools.reduce(arith.addi, entries)))
        return _fragment(_packed(sums), plan.layout)

    return gather(table, list(words))


def _entry(plan: Plan, address: ir.Value, row: int, s: int) -> ir.Value:
    """Entry of segment s of a quad: float32, or an integer. It must not move over a barrier."""
    if plan.exact:
        offset, kind, dtype = s * 2 * COPIES, "f32", f32()
    else:
        offset, kind, dtype = s // 2 * 4 * COPIES + s % 2 * 2, "s16", i32()
    offset += row * 4 * plan.row_words
    return mgpu_utils.inline_ptx(
        f"ld.shared.{kind} $0, [$1+{offset}];",
        address,
        result_types=dtype,
        has_side_effects=True,
    )


def note_largest(plan: Plan, sums, maxima, warpgroup) -> None:
    """Leave the bits of each warp's largest magnitude of `sums` in `maxima`, as `products` does."""
    del warpgroup

    @plgpu.inline_mgpu(arg_types=([plan.layout] * len(sums), plgpu.RefType()))
    def note_largest(_, sums, maxima):
        _note_largest([e for some in sums for e in _elements(some.registers.item())], maxima)

    note_largest(list(sums), maxima)


def integers(plan: Plan, sums, maxima, unit, warpgroup):
    """`sums` as int16 [span] in units of the block's largest / 32767, which goes to `unit` [1]."""
    del warpgroup
    some = plgpu.ShapeDtypeStruct((plan.span,), jnp.int16, plan.layout)

    @plgpu.inline_mgpu(
        arg_types=([plan.layout] * len(sums), plgpu.RefType(), plgpu.RefType()),
        return_type=[some] * len(sums),
    )
    def integers(_, sums, maxima, unit):
        size, inverse = _unit(plan, maxima)
        with mgpu_utils.when(below(thread(), 1)):
            llvm.store(size, global_pointer(unit))
        results = []
        for one in sums:
            values = [arith.mulf(e, inverse) for e in _elements(one.registers.item())]
            pairs = [_integers((values + values[-1:])[i : i + 2]) for i in range(0, len(values), 2)]
            half = ir.IntegerType.get_signless(16)
            packed = vector.bitcast(vec(2 * len(pairs), half), _packed(pairs))
            if plan.columns == 1:
                packed = vector.extract_strided_slice(vec(1, half), packed, [0], [1], [1])
            results.append(_fragment(packed, plan.layout, is_signed=True))
        return results

    return integers(list(sums), maxima, unit)


def sum_splits(plan: Plan, partial, units, buffer, first, splits, column, warpgroup) -> None:
    """Each warp's sums over some of the splits for 32 columns, to its row of `buffer`.

    Args:
      partial: ref [blocks, columns of a block].
      units: float32 ref [blocks], by which integers are multiplied.
      buffer: float32 ref [warps * 32].
      first, splits, column: scalars: the block of the first split, their number, the first column.
    """
    del warpgroup
    kind = jnp.dtype(partial.dtype)
    lanes = SUM_COLUMNS // QUAD  # for a split, each with 4 columns
    step = SUM_WARPGROUPS * WARPGROUP // lanes
    width = partial.shape[1] * kind.itemsize

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, SCALAR, SCALAR, SCALAR))
    def sum_splits(_, partial, units, buffer, *scalars):
        first, splits, column = (scalar.registers.item() for scalar in scalars)
        begin = div(thread(), lanes)
        column = add(column, mul(thread(lanes), QUAD))
        place = at(global_pointer(partial), mul(column, kind.itemsize))
        parts = []
        for turn in range(pl.cdiv(max(plan.splits), step)):
            here = below(add(begin, turn * step), splits)
            dtype = ir.MemRefType(partial.type).element_type
            row = add(first, arith.select(here, add(begin, turn * step), c(0)))
            some = _load_global(at(place, mul(row, width)), dtype, QUAD)
            unit = _load_global(at(global_pointer(units), mul(row, 4)), f32(), 1)
            parts.append((here, some, unit))
        zeros = mgpu_utils.c(0.0, vec(QUAD, f32()))
        total = zeros
        for here, some, unit in parts:
            if not plan.exact:
                unit = vector.broadcast(vec(QUAD, f32()), vector.extract(unit, [], [0]))
                some = arith.mulf(arith.sitofp(vec(QUAD, f32()), some), unit)
            total = arith.addf(total, arith.select(here, some, zeros))
        sums = _elements(total)
        distance = lanes
        while distance < WARP:
            sums = [arith.addf(e, mgpu_utils.shfl_bfly(e, distance)) for e in sums]
            distance *= 2
        with mgpu_utils.when(below(thread(WARP), lanes)):
            place = add(mul(div(thread(), WARP), SUM_COLUMNS), mul(thread(lanes), QUAD))
            place = at(mgpu_utils.memref_ptr(buffer), mul(place, 4))
            llvm.store(_packed(sums), place, alignment=MAX_LOAD)

    sum_splits(partial, units, buffer, first, splits, column)


def write_sums(buffer, outs, matrix, column) -> None:
    """Add what the warps left of each of 32 columns in `buffer`, and write the results.

    Args:
      buffer: float32 ref [rows * 32].
      outs: refs [columns] of each matrix.
      column: scalar, the first column.
    """
    rows = buffer.shape[0] // SUM_COLUMNS

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (plgpu.RefType(),) * len(outs), SCALAR, SCALAR))
    def write_sums(_, buffer, outs, matrix, column):
        matrix, column = matrix.registers.item(), column.registers.item()
        with mgpu_utils.when(below(thread(), SUM_COLUMNS)):
            own = at(mgpu_utils.memref_ptr(buffer), mul(thread(), 4))
            sums = [
                llvm.load(f32(), at(own, row * SUM_COLUMNS * 4), alignment=4) for row in range(rows)
            ]
            total = functools.reduce(arith.addf, sums)
            dtype = ir.MemRefType(outs[0].type).element_type
            if dtype != f32():
                total = arith.truncf(dtype, total)
            base = _choose(matrix, [global_pointer(ref) for ref in outs])
            bytes_ = mgpu_utils.bitwidth(dtype) // 8
            llvm.store(total, at(base, mul(add(column, thread()), bytes_)), alignment=bytes_)

    write_sums(buffer, tuple(outs), matrix, column)


def _vectors_layout(plan: Plan) -> Any:
    v = plan.spec.vector_length
    return plgpu.Layout.WG_STRIDED((WARPGROUP * v,), vec_size=v)


def _entries_layout(plan: Plan) -> tuple[int, Any]:
    size = WARPGROUP * 2 * plan.turns
    return size, plgpu.Layout.WG_STRIDED((size,), vec_size=2 * plan.turns)


def _job(plan: Plan, turn: int) -> tuple[ir.Value, ir.Value]:
    """The pair of segments and the vector whose entries the thread forms in its turn."""
    job = add(thread(), turn * plan.threads)
    return div(job, plan.vectors), rem(job, plan.vectors)


def _note_largest(values: Sequence[ir.Value], maxima: ir.Value) -> None:
    """Leave the bits of the warp's largest magnitude in its place of `maxima`."""
    # Magnitudes order as their bits do.
    bits = [arith.andi(arith.bitcast(i32(), value), c(0x7FFFFFFF)) for value in values]
    largest = _largest_of_warp(functools.reduce(arith.maxui, bits))
    with mgpu_utils.when(below(thread(WARP), 1)):
        llvm.store(largest, at(mgpu_utils.memref_ptr(maxima), mul(div(thread(), WARP), 4)))


def _unit(plan: Plan, maxima: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What one of the largest integers stands for, from the maxima of all warps; its inverse."""
    lane = smaller(thread(WARP), plan.threads // WARP - 1)
    bits = llvm.load(i32(), at(mgpu_utils.memref_ptr(maxima), mul(lane, 4)), alignment=4)
    largest = arith.bitcast(f32(), _largest_of_warp(bits))
    largest = arith.maximumf(largest, mgpu_utils.c(SMALLEST, f32()))
    inverse = mgpu_utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", largest, result_types=f32())
    unit = arith.mulf(largest, mgpu_utils.c(1 / LARGEST, f32()))
    return unit, arith.mulf(inverse, mgpu_utils.c(LARGEST, f32()))


def _largest_of_warp(value: ir.Value) -> ir.Value:
    return mgpu_utils.redux(value, c(-1), mgpu_utils.ReductionKind.UMAX)


def _integers(both: Sequence[ir.Value]) -> ir.Value:
    """Two float32 rounded to 16-bit integers in one word, the first in the low half."""
    low, high = (
        mgpu_utils.inline_ptx("cvt.rni.s32.f32 $0, $1;", value, result_types=i32())
        for value in both
    )
    return mgpu_utils.inline_ptx("prmt.b32 $0, $1, $2, 0x5410;", low, high, result_types=i32())


def _load_global(place: ir.Value, dtype: ir.Type, length: int, hint: str = "") -> ir.Value:
    """A vector of `length` values that nobody writes, aligned to its size or 16 bytes."""
    total = length * mgpu_utils.bitwidth(dtype) // 8
    unit = ir.IntegerType.get_signless(16) if total == 2 else i32()
    unit_bytes = mgpu_utils.bitwidth(unit) // 8
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), place)
    parts = []
    for begin in range(0, total, MAX_LOAD):
        count = min(total - begin, MAX_LOAD) // unit_bytes
        names = ", ".join(f"${i}" for i in range(count))
        kind = f"v{count}.u{8 * unit_bytes} {{{names}}}" if count > 1 else f"u{8 * unit_bytes} $0"
        parts += mgpu_utils.inline_ptx(
            f"ld.global.nc{hint}.{kind}, [${count}+{begin}];",
            address,
            result_types=[unit] * count,
            has_side_effects=True,
        )
    return vector.bitcast(vec(length, dtype), _packed(parts))


def _choose(index: ir.Value, values: Sequence[ir.Value]) -> ir.Value:
    """values[index], for an index that is only known to the device."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        here = arith.cmpi(arith.CmpIPredicate.eq, index, c(i))
        chosen = arith.select(here, value, chosen)
    return chosen


def _fragment(register: ir.Value, layout: Any, is_signed: bool | None = None) -> Any:
    """The array of which each thread holds one register."""
    registers = np.empty((1,), dtype=object)
    registers[0] = register
    return mgpu.FragmentedArray(
        _registers=registers, _layout=layout.to_mgpu(), _is_signed=is_signed
    )


def _packed(values: Sequence[ir.Value]) -> ir.Value:
    return vector.from_elements(vec(len(values), values[0].type), list(values))


def _elements(register: ir.Value) -> list[ir.Value]:
    length = ir.VectorType(register.type).shape[0]
    return [vector.extract(register, [], [i]) for i in range(length)]


def _dot(left: Sequence[ir.Value], right: Sequence[ir.Value]) -> ir.Value:
    total = arith.mulf(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total = llvm.intr_fmuladd(a, b, total)
    return total
