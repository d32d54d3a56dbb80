"""What the dequantizer does that Pallas has no operation for, written per CUDA thread.

`interpreted` has its twin in jnp.
"""

import math
from functools import reduce

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxcodec.pallas_kernels.dequantizer.plan import WARP, WARPS, Plan
from jaxcodec.pallas_kernels.lanes import (
    SCALAR,
    add,
    below,
    c,
    div,
    f32,
    far,
    global_pointer,
    load_words,
    mul,
    row_offset,
    thread,
    vec,
)
from jaxcodec.pallas_kernels.operands.layout import TABLE_ROW
from jaxcodec.pallas_kernels.operands.threads import own_copy, read_entry, to_f32


def write_pieces(plan: Plan, table_ref, codes_ref, scales_ref, out_ref, first) -> None:
    """Each warp writes the piece WARPS * first + its number, if there is one.

    Refs: the table in shared memory; in global memory codes u32 [m, words, N], scales [groups, N]
    and the result [K, N].
    """

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 4, SCALAR))
    def write_pieces(_, table, codes, scales, out, first):
        piece = add(mul(first.registers.item(), WARPS), div(thread(), WARP))
        row, across = arith.divui(piece, c(plan.across)), arith.remui(piece, c(plan.across))
        column = add(mul(across, plan.width), mul(thread(WARP), plan.columns))
        inside = arith.andi(below(piece, plan.pieces), below(column, plan.N))
        with mgpu_utils.when(inside):
            _write_piece(plan, table, codes, scales, out, row, column)

    write_pieces(table_ref, codes_ref, scales_ref, out_ref, first)


def _write_piece(plan: Plan, table, codes, scales, out, row, column) -> None:
    """Look up and write the K of one word of a lane's columns."""
    spec, v, g = plan.spec, plan.spec.vector_length, plan.spec.group_size
    words_of_k = plan.K // plan.height
    loaded = []
    for book in range(spec.num_codebooks):
        place = far(global_pointer(codes), add(row, book * words_of_k), 4 * plan.N, mul(column, 4))
        loaded.append(load_words(place, plan.columns, constant=True))
    kind, (low, odd) = ir.MemRefType(table.type).element_type, own_copy(v)
    pointer, first = mgpu_utils.memref_ptr(table), mul(row, plan.height)
    of_group = _scales(plan, scales, first, column)
    for code in range(spec.codes_per_word):
        if g % plan.height and code and code * v % math.gcd(g, plan.height) == 0:
            # Another group may begin.
            of_group = _scales(plan, scales, add(first, code * v), column)
        weights = []
        for i in range(plan.columns):
            places = [row_offset(words[i], spec.bits, code, low, 2 * TABLE_ROW) for words in loaded]
            books = [
                read_entry(spec, pointer, place, book, kind, odd)
                for book, place in enumerate(places)
            ]
            scale = vector.broadcast(vec(2, f32()), of_group[i])
            pairs = [reduce(arith.addf, map(to_f32, pairs)) for pairs in zip(*books, strict=True)]
            weights.append([arith.mulf(pair, scale) for pair in pairs])
        for e in range(v):
            values = [vector.extract(pairs[e // 2], [], [e % 2]) for pairs in weights]
            _store(plan, out, add(first, code * v + e), column, values)


def _scales(plan: Plan, scales, k, column) -> list:
    """Scales of a lane's columns in the group of input k, in float32."""
    dtype = ir.MemRefType(scales.type).element_type
    size = mgpu_utils.bitwidth(dtype) // 8
    group = arith.divui(k, c(plan.spec.group_size))
    place = far(global_pointer(scales), group, size * plan.N, mul(column, size))
    kind = vec(plan.columns, dtype)
    found = to_f32(llvm.load(kind, place, alignment=size * plan.columns, invariant=True))
    return [vector.extract(found, [], [i]) for i in range(plan.columns)]


def _store(plan: Plan, out, k, column, values) -> None:
    """Write a lane's columns of row k of the result."""
    dtype = ir.MemRefType(out.type).element_type
    size = mgpu_utils.bitwidth(dtype) // 8
    values = vector.from_elements(vec(plan.columns, f32()), values)
    place = far(global_pointer(out), k, size * plan.N, mul(column, size))
    llvm.store(arith.truncf(vec(plan.columns, dtype), values), place, alignment=size * plan.columns)
