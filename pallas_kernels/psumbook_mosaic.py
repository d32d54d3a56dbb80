"""The Psumbook gather-GEMM for few rows, on Hopper and later, in Pallas Mosaic GPU.

A block owns `k_tile` input features and some columns. It fills the Psumbook of its features in
shared memory, the inner product of every codebook vector with every segment of x, and then each
of its threads walks columns: for each code of a column it looks the product up and adds. The
group's scale comes last. Blocks of different k tiles leave partial sums in float32 which are added
in a fixed order, so that the same call gives the same bits.

    Psumbook[w, i, c, code, r] = sum_e codebooks[c, code, e] * x[r, (4 w + i) v + e]
    y[r, n] = sum_k scales[k // g, n] * sum_{w, i, c} Psumbook[w, i, c, code(c, w, i, n), r]

Letters: M rows, K input and N output features, m codebooks, v weights a code, g weights a scale,
w a word of 4 codes, i a code in its word, c a codebook, e an element of a vector, r one of the R
rows that share one lookup.

Source: Psumbook, CodeGEMM (arXiv 2512.17970) section 3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

WARPGROUP = 128  # CUDA threads that Mosaic GPU programs as one
WARPGROUPS = 2  # so that one thread fills the entries of one of the 256 codebook vectors
CODEBOOK_SIZE = 256
CODES_PER_WORD = 4
# Rows that one lookup serves: 4 float32 are the 16 bytes of the widest shared-memory load.
ROWS_PER_LOOKUP = 4
# Columns that a warpgroup walks at once; 4 a thread keep 4 independent sums in flight.
COLUMN_TILES = (512, 256, 128)
# 64 features was the fastest tile of the first measurements; less where g, v or memory ask for it.
K_TILES = (64, 32, 16, 8)
# A Psumbook of at most 64 KiB leaves room for three blocks in the 227 KiB of an SM.
PSUMBOOK_BYTES = 64 * 1024
# Words that a thread holds for one column, which bounds the code that one loop body unrolls to.
WORDS_PER_COLUMN = 16
# A block walks further columns only while the grid keeps about two waves of 4 blocks on 132 SMs.
MIN_BLOCKS = 1024
MAX_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one call is cut into blocks; derived from the shapes by `tiling`.

    Attributes:
      rows: R, rows of x that share one lookup (1, 2 or 4).
      k_tile: input features of a block.
      columns: output features that a warpgroup walks at once.
      chunks: times that a warpgroup does so.
    """

    rows: int
    k_tile: int
    columns: int
    chunks: int


def refusal(M: int, K: int, N: int, spec: CodebookSpec) -> str | None:
    """Why the kernel cannot multiply x [M, K] by a `spec` weight [K, N]; None if it can."""
    word = CODES_PER_WORD * spec.vector_length
    if spec.bits != 8:
        return f"its Psumbook has 2**8 entries a codebook, and {spec} has b = {spec.bits}"
    if M < 1:
        return f"it needs at least one row of x, got M = {M}"
    if N < COLUMN_TILES[-1]:
        return f"a warpgroup walks at least {COLUMN_TILES[-1]} columns, got N = {N}"
    if _k_tile(_rows_per_lookup(M), K, spec) is None:
        return (
            f"it needs a tile of {K_TILES} input features that is a multiple of 4 v = {word}, "
            f"divides g = {spec.group_size} and K = {K}, and whose Psumbook fits in "
            f"{PSUMBOOK_BYTES} bytes; {spec} has none for M = {M}"
        )
    return None


def tiling(M: int, K: int, N: int, spec: CodebookSpec) -> Tiling:
    """The tile sizes for x [M, K] and a `spec` weight [K, N].

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    if reason := refusal(M, K, N, spec):
        raise NotImplementedError(f"The Mosaic Psumbook kernel cannot run: {reason}.")
    rows = _rows_per_lookup(M)
    k_tile = _k_tile(rows, K, spec)
    assert k_tile is not None
    fitting = [columns for columns in COLUMN_TILES if columns <= N]
    columns = next((columns for columns in fitting if N % columns == 0), fitting[0])
    blocks = pl.cdiv(M, rows) * (K // k_tile) * pl.cdiv(N, columns * WARPGROUPS)
    chunks = 1
    while chunks < MAX_CHUNKS and blocks >= 2 * chunks * MIN_BLOCKS:
        chunks *= 2
    return Tiling(rows, k_tile, columns, chunks)


def _rows_per_lookup(M: int) -> int:
    return next(rows for rows in (1, 2, ROWS_PER_LOOKUP) if rows >= min(M, ROWS_PER_LOOKUP))


def _k_tile(rows: int, K: int, spec: CodebookSpec) -> int | None:
    m, v = spec.num_codebooks, spec.vector_length
    for k_tile in K_TILES:
        psumbook_bytes = k_tile // v * m * CODEBOOK_SIZE * rows * 4
        words = m * k_tile // (CODES_PER_WORD * v)
        aligned = k_tile % (CODES_PER_WORD * v) == 0
        divides = spec.group_size % k_tile == 0 and K % k_tile == 0
        small = psumbook_bytes <= PSUMBOOK_BYTES and words <= WORDS_PER_COLUMN
        if aligned and divides and small:
            return k_tile
    return None


def matmul(x: jax.Array, w: CodebookTensor, *, interpret: bool = False) -> jax.Array:
    """Multiply x [M, K] by w [K, N] with the Psumbook kernel; the result is [M, N] in x's dtype.

    Args:
      x: bf16, f16 or f32 [M, K].
      w: weight [K, N] with b = 8.
      interpret: run the kernel's structure on a CPU, with JAX looking for races.

    Raises:
      NotImplementedError: the kernel cannot run these shapes, with the numbers.
    """
    return _batched_matmul(interpret)(x, w)


@functools.cache
def _batched_matmul(interpret: bool) -> Callable[[jax.Array, CodebookTensor], jax.Array]:
    """The matmul with a rule for vmap: rows of a batch are rows, and weights come one by one."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, w: CodebookTensor) -> jax.Array:
        return _reduced_matmul(x, w, interpret)

    @call.def_vmap
    def _(size: int, batched: tuple[bool, Any], x: jax.Array, w: CodebookTensor):
        x_batched, w_batched = batched
        if not any(jax.tree.leaves(w_batched)):
            y = call(x.reshape(-1, x.shape[-1]), w)
            return y.reshape(*x.shape[:-1], -1), True
        operands = jax.tree.map(
            lambda leaf, mapped: leaf if mapped else jnp.broadcast_to(leaf, (size, *leaf.shape)),
            (x, w),
            (x_batched, w_batched),
        )
        return jax.lax.map(lambda operand: call(*operand), operands), True

    return call


def _reduced_matmul(x: jax.Array, w: CodebookTensor, interpret: bool) -> jax.Array:
    M, N = x.shape[0], w.shape[1]
    tiles = tiling(M, *w.shape, w.spec)
    padded = jnp.pad(x, ((0, -M % tiles.rows), (0, 0)))
    partial_kmn = _kernel(padded, w, tiles, interpret)
    y = partial_kmn.sum(axis=0)[:M].astype(x.dtype)
    # Only a last, incomplete column tile begins earlier than its place in `partial` says.
    whole = N // tiles.columns * tiles.columns
    if whole == N:
        return y[:, :N]
    end = whole + tiles.columns
    return jnp.concatenate([y[:, :whole], y[:, end - (N - whole) : end]], axis=1)


def _kernel(x: jax.Array, w: CodebookTensor, tiles: Tiling, interpret: bool) -> jax.Array:
    """Partial sums [K // k_tile, M, N rounded up to whole blocks] in float32; M is a multiple of R.

    Column tile t lies at t * columns, and holds the columns that begin at
    min(t * columns, N - columns): the last tile of an N that no tile divides looks back.
    """
    M, K = x.shape
    N, spec = w.shape[1], w.spec
    m, v = spec.num_codebooks, spec.vector_length
    columns, chunks = tiles.columns, tiles.chunks
    segment = CODES_PER_WORD * v
    words = tiles.k_tile // segment
    blocks = pl.cdiv(N, columns * WARPGROUPS * chunks)
    strided = _one_column_a_register(columns)
    fill = _fill_twin if interpret else _fill
    gather = _gather_twin if interpret else _gather

    def psumbook_matmul(x_ref, codes_ref, codebooks_ref, scales_ref, out_ref, book_ref, filled):
        row = jax.lax.axis_index("rows") * tiles.rows
        k = jax.lax.axis_index("k")
        first_tile = jax.lax.axis_index("columns") * (WARPGROUPS * chunks)
        warpgroup = jax.lax.axis_index("warpgroup")
        scale_row = k * tiles.k_tile // spec.group_size

        def tile_of(chunk):
            return first_tile + chunk * WARPGROUPS + warpgroup

        def columns_of(chunk):
            start = jnp.minimum(tile_of(chunk) * columns, N - columns)
            return pl.ds(start, columns)

        def load_words(chunk):
            span = columns_of(chunk)
            return tuple(
                plgpu.load(codes_ref.at[c, k * words + word, span], layout=strided)
                for word in range(words)
                for c in range(m)
            )

        def finish(chunk, held):
            sums = gather(book_ref.at[0], held[:m])
            for word in range(1, words):
                found = gather(book_ref.at[word], held[word * m : (word + 1) * m])
                sums = [a + b for a, b in zip(sums, found, strict=True)]
            scale = plgpu.load(scales_ref.at[scale_row, columns_of(chunk)], layout=strided)
            scale = scale.astype(jnp.float32)
            place = pl.ds(tile_of(chunk) * columns, columns)
            for r in range(tiles.rows):
                out_ref[k, row + r, place] = sums[r] * scale

        held = load_words(0)  # on their way while the Psumbook is being filled

        @pl.loop(0, words)
        def _(word):
            features = pl.ds(k * tiles.k_tile + word * segment, segment)
            x_tile = x_ref.at[pl.ds(row, tiles.rows), features]
            fill(book_ref.at[word], x_tile, codebooks_ref, warpgroup)

        plgpu.barrier_arrive(filled)
        plgpu.barrier_wait(filled)

        def walk(chunk, held):
            following = load_words(chunk + 1)
            finish(chunk, held)
            return following

        held = jax.lax.fori_loop(0, chunks - 1, walk, held) if chunks > 1 else held
        finish(chunks - 1, held)

    out_type = jax.ShapeDtypeStruct(
        (K // tiles.k_tile, M, blocks * WARPGROUPS * chunks * columns), jnp.float32
    )
    book_shape = (words, CODES_PER_WORD, m, CODEBOOK_SIZE, tiles.rows)
    kernel = plgpu.kernel(
        psumbook_matmul,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM(book_shape, jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(M // tiles.rows, K // tiles.k_tile, blocks),
        grid_names=("rows", "k", "columns"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # A thread only writes the Psumbook before the barrier and only reads it after.
            unsafe_no_auto_barriers=True,
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    with jax.named_scope("psumbook_matmul"):
        return kernel(x, w.codes, w.codebooks, w.scales)


def _one_column_a_register(columns: int):
    # Lanes of a warp hold neighbouring columns: loads coalesce, whatever the alignment of a row.
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=1)


# Two primitives are written per CUDA thread, because Pallas has no gather: writing and reading
# entries of the Psumbook. Each has a twin in plain Pallas, which the interpreter runs.


def _fill_twin(book_ref, x_ref, codebooks_ref, warpgroup) -> None:
    own = pl.ds(warpgroup * WARPGROUP, WARPGROUP)
    books_mcv = codebooks_ref[:, own, :].astype(jnp.float32)
    v = books_mcv.shape[-1]
    x_riv = x_ref[...].astype(jnp.float32).reshape(-1, CODES_PER_WORD, v)
    products = jnp.einsum("riv,mcv->imcr", x_riv, books_mcv, precision=jax.lax.Precision.HIGHEST)
    book_ref[:, :, own, :] = products


def _gather_twin(book_ref, words: Sequence[jax.Array]) -> Sequence[jax.Array]:
    book_imcr = book_ref[...]
    m, rows = book_imcr.shape[1], book_imcr.shape[3]
    sums = [jnp.zeros(words[0].shape, jnp.float32) for _ in range(rows)]
    for c in range(m):
        for i in range(CODES_PER_WORD):
            code = ((words[c] >> jnp.uint32(8 * i)) & jnp.uint32(255)).astype(jnp.int32)
            for r in range(rows):
                sums[r] = sums[r] + jnp.take(book_imcr[i, c, :, r], code)
    return sums


def _fill(book_ref, x_ref, codebooks_ref, warpgroup) -> None:
    """Entries of one word: thread t writes those of codebook vector t, for all books and rows.

    Refs: book f32 [4, m, 256, R], x [R, 4 v], codebooks [m, 256, v].
    """
    del warpgroup  # the thread index runs over both warpgroups
    rows, segment = x_ref.shape
    v = segment // CODES_PER_WORD
    m = codebooks_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def fill(_, book, x, codebooks):
        thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
        x_ptr, book_ptr = mgpu_utils.memref_ptr(x), mgpu_utils.memref_ptr(book)
        codebook_ptr = mgpu_utils.memref_ptr(codebooks)
        x_type = ir.MemRefType(x.type).element_type
        codebook_type = ir.MemRefType(codebooks.type).element_type
        x_row = ir.MemRefType(x.type).get_strides_and_offset()[0][0]
        vectors = [
            _load_floats(codebook_ptr, codebook_type, v, thread, v, c * CODEBOOK_SIZE * v)
            for c in range(m)
        ]
        for i in range(CODES_PER_WORD):
            x_rows = [
                _load_floats(x_ptr, x_type, v, None, 0, r * x_row + i * v) for r in range(rows)
            ]
            for c in range(m):
                entry = [_dot(vectors[c], x_rows[r]) for r in range(rows)]
                base = mgpu_utils.getelementptr(
                    book_ptr, [(i * m + c) * CODEBOOK_SIZE * rows], _f32()
                )
                offset = arith.muli(thread, mgpu_utils.c(rows, _i32()))
                place = mgpu_utils.getelementptr(base, [offset], _f32())
                value = vector.from_elements(_vector(rows, _f32()), entry)
                llvm.store(value, place, alignment=4 * rows)

    fill(book_ref, x_ref, codebooks_ref)


def _gather(book_ref, words: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sum the entries of one word of codes: R arrays f32 [columns].

    Args:
      book_ref: Psumbook of the word, f32 [4, m, 256, R] in shared memory.
      words: m arrays uint32 [columns], 4 codes each, one element a register.
    """
    _, m, _, rows = book_ref.shape
    layout = _one_column_a_register(words[0].shape[0])
    entry_bytes = 4 * rows
    shift = int(math.log2(entry_bytes))
    sums_type = [plgpu.ShapeDtypeStruct(words[0].shape, jnp.float32, layout)] * rows

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (layout,) * m), return_type=sums_type)
    def gather(_, book, words):
        book_ptr = mgpu_utils.memref_ptr(book)
        byte = ir.IntegerType.get_signless(8)
        sums = [np.empty(words[0].registers.shape, dtype=object) for _ in range(rows)]
        for register in range(words[0].registers.size):
            entries = []
            for c in range(m):
                word = vector.extract(words[c].registers[register], [], [0])
                for i in range(CODES_PER_WORD):
                    offset = _code_offset(word, i, shift)
                    place = mgpu_utils.getelementptr(book_ptr, [offset], byte)
                    book_bytes = (i * m + c) * CODEBOOK_SIZE * entry_bytes
                    place = mgpu_utils.getelementptr(place, [book_bytes], byte)
                    entries.append(llvm.load(_vector(rows, _f32()), place, alignment=entry_bytes))
            total = functools.reduce(arith.addf, entries)
            for r in range(rows):
                value = vector.extract(total, [], [r])
                sums[r][register] = vector.broadcast(_vector(1, _f32()), value)
        return [
            mgpu.FragmentedArray(_registers=row_sums, _layout=words[0].layout, _is_signed=None)
            for row_sums in sums
        ]

    return gather(book_ref, tuple(words))


def _code_offset(word: ir.Value, i: int, shift: int) -> ir.Value:
    """Code i of a word times 2**shift: one shift and one mask do both."""
    right = 8 * i - shift
    if right > 0:
        word = arith.shrui(word, mgpu_utils.c(right, _i32()))
    elif right < 0:
        word = arith.shli(word, mgpu_utils.c(-right, _i32()))
    return arith.andi(word, mgpu_utils.c(255 << shift, _i32()))


def _load_floats(
    ptr: ir.Value,
    dtype: ir.Type,
    length: int,
    index: ir.Value | None,
    stride: int,
    offset: int,
) -> list[ir.Value]:
    """`length` consecutive values at ptr[index * stride + offset], as float32."""
    ptr = mgpu_utils.getelementptr(ptr, [offset], dtype)
    if index is not None:
        element = arith.muli(index, mgpu_utils.c(stride, _i32()))
        ptr = mgpu_utils.getelementptr(ptr, [element], dtype)
    # Without an alignment LLVM would load 16-bit values one at a time.
    alignment = min(16, length * mgpu_utils.bitwidth(dtype) // 8)
    values = llvm.load(_vector(length, dtype), ptr, alignment=alignment)
    if dtype != _f32():
        values = arith.extf(_vector(length, _f32()), values)
    return [vector.extract(values, [], [e]) for e in range(length)]


def _dot(left: Sequence[ir.Value], right: Sequence[ir.Value]) -> ir.Value:
    total = arith.mulf(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total = llvm.intr_fmuladd(a, b, total)
    return total


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _f32() -> ir.Type:
    return ir.F32Type.get()


def _vector(length: int, dtype: ir.Type) -> ir.Type:
    return ir.VectorType.get((length,), dtype)
