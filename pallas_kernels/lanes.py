"""Per-thread building blocks of kernels that Pallas cannot express: small MLIR emitters.

Everything here is called while a kernel is being built, inside `plgpu.inline_mgpu`, and returns
MLIR values of one CUDA thread. Offsets are in bytes; a shared-memory address is a pointer in
address space 3, a global one in address space 1.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

GLOBAL = 1  # of LLVM's address spaces for NVPTX
WARP = 32
SCALAR = plgpu.Layout.WG_SPLAT(())  # of an argument that all threads share


def thread(modulus: int | None = None) -> ir.Value:
    """Index of the CUDA thread in its block, or in its part of `modulus` threads."""
    index = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
    return index if modulus is None else rem(index, modulus)


def i8() -> ir.Type:
    """Bytes, in which offsets are counted."""
    return ir.IntegerType.get_signless(8)


def i32() -> ir.Type:
    """The type of words, packed pairs of 16 bits and offsets."""
    return ir.IntegerType.get_signless(32)


def f32() -> ir.Type:
    """The type of sums."""
    return ir.F32Type.get()


def vec(length: int, dtype: ir.Type) -> ir.Type:
    """A vector type of `length` elements."""
    return ir.VectorType.get((length,), dtype)


def c(value: int) -> ir.Value:
    """An i32 constant."""
    return mgpu_utils.c(value, i32())


def add(a: ir.Value, b: ir.Value | int) -> ir.Value:
    """a + b."""
    if isinstance(b, int):
        return a if b == 0 else arith.addi(a, c(b))
    return arith.addi(a, b)


def mul(a: ir.Value, b: int) -> ir.Value:
    """a * b."""
    return a if b == 1 else arith.muli(a, c(b))


def div(a: ir.Value, b: int) -> ir.Value:
    """a // b of unsigned values; a shift where b is a power of two."""
    if b & (b - 1) == 0:
        return a if b == 1 else arith.shrui(a, c(b.bit_length() - 1))
    return arith.divui(a, c(b))


def rem(a: ir.Value, b: int) -> ir.Value:
    """a % b of unsigned values; a mask where b is a power of two."""
    if b & (b - 1) == 0:
        return arith.andi(a, c(b - 1))
    return arith.remui(a, c(b))


def below(a: ir.Value, b: ir.Value | int) -> ir.Value:
    """a < b of unsigned values."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, c(b) if isinstance(b, int) else b)


def smaller(a: ir.Value, b: int) -> ir.Value:
    """min(a, b) of unsigned values."""
    return arith.minui(a, c(b))


def global_pointer(ref: ir.Value) -> ir.Value:
    """Where a global ref begins, as a pointer that compiles to global loads."""
    pointer = mgpu_utils.memref_ptr(ref)
    return llvm.addrspacecast(llvm.PointerType.get(GLOBAL), pointer)


def at(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The pointer `offset` bytes on; a dynamic offset is a non-negative i32."""
    return mgpu_utils.getelementptr(pointer, [offset], i8())


def far(pointer: ir.Value, row: ir.Value, stride: int, offset: ir.Value) -> ir.Value:
    """pointer + row * stride + offset in 64 bits: an array may exceed 4 GiB."""
    i64 = ir.IntegerType.get_signless(64)
    wide = arith.muli(arith.extui(i64, row), mgpu_utils.c(stride, i64))
    pointer = llvm.getelementptr(
        pointer.type, pointer, [wide], [-(2**31)], i8(), llvm.GEPNoWrapFlags.none
    )
    return at(pointer, offset)


def load_words(pointer: ir.Value, count: int, constant: bool = False) -> list[ir.Value]:
    """`count` (1, 2 or 4) consecutive i32 in one aligned load, of memory that nobody writes if
    `constant`."""
    dtype = i32() if count == 1 else vec(count, i32())
    loaded = llvm.load(dtype, pointer, alignment=4 * count, invariant=constant)
    return [loaded] if count == 1 else [vector.extract(loaded, [], [e]) for e in range(count)]


def _assembly(
    dtype: ir.Type,
    operands: Sequence[Any],
    text: str,
    constraints: str,
    has_side_effects: bool = False,
) -> ir.Value:
    """One PTX instruction, whose result is a function of its operands unless it has effects."""
    result = llvm.inline_asm(
        dtype, list(operands), text, constraints, has_side_effects=has_side_effects
    )
    return cast(ir.Value, result)


def store(pointer: ir.Value, values: Sequence[ir.Value]) -> None:
    """Store values of one type side by side, in one aligned store of 4, 8 or 16 bytes."""
    dtype = values[0].type
    width = len(values) * mgpu_utils.bitwidth(dtype) // 8
    packed = vector.from_elements(vec(len(values), dtype), list(values))
    llvm.store(packed, pointer, alignment=width)


def shared_address(pointer: ir.Value) -> ir.Value:
    """The 32-bit address of a pointer into shared memory."""
    return llvm.ptrtoint(i32(), pointer)


def byte_offset(word: ir.Value, byte: int, low: ir.Value) -> ir.Value:
    """256 * (byte `byte` of word) + low, for low < 256, in one byte permutation."""
    # Result bytes from the lowest up: low's byte 0, the wanted byte, two of low's zeros.
    selector = 0x7604 | byte << 4
    return _assembly(
        i32(),
        [word, low],
        f"prmt.b32 $0, $1, $2, {selector:#x};",
        "=r,r,r",
    )


def row_offset(word: ir.Value, bits: int, i: int, low: ir.Value, row_bytes: int) -> ir.Value:
    """row_bytes * (code i of a word) + low, for codes of `bits` and low < row_bytes."""
    if (bits, row_bytes) == (8, 256):
        return byte_offset(word, i, low)
    left = row_bytes.bit_length() - 1 - bits * i
    shift = arith.shli if left >= 0 else arith.shrui
    code = arith.andi(shift(word, c(abs(left))), c((2**bits - 1) * row_bytes))
    return arith.ori(code, low)


def mma(
    a: Sequence[ir.Value], b: Sequence[ir.Value], total: Sequence[ir.Value], dtype: jnp.dtype
) -> list[ir.Value]:
    """total [16, 8] + a [16, 16] @ b [16, 8] of one warp, in bf16 or f16 with f32 sums.

    Lane 4 g + q holds, two 16-bit values a register, a: rows g and g + 8 at k = 2 q, then the same
    at k = 2 q + 8; b: column g at k = 2 q, then 2 q + 8; total: row g, columns 2 q and 2 q + 1,
    then row g + 8.

    Source: PTX ISA, mma.sync.m16n8k16.
    """
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    result = _assembly(
        ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
        [*a, *b, *total],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )
    return [llvm.extractvalue(f32(), result, [e]) for e in range(4)]
