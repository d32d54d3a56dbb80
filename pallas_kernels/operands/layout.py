"""How operands lie in registers and shared memory, and what that lets a kernel run.

Letters: M rows, K input and N output features, m codebooks, b bits a code, v weights a code,
g weights a scale.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxcodec.pallas_kernels.mosaic import format_refusal
from jaxcodec.spec import CodebookSpec

WARPGROUP = 128  # threads
K_TILE = 64  # float16 values in the 128 bytes that the TMA swizzles
LANE_K = 16  # of them, neighbours, are one lane's: 4 lanes share a column
TABLE_ROW = 128  # bytes over which a codebook vector is repeated: 4 for each lane of a warp
# Scales that multiply weights are multiplied by 2**8 in float16, because scales of weights lie in
# 2**-16 to 2**2 and float16 in 2**-14 to 2**16; the results are divided by it.
SCALE_EXPONENT = 8
TABLE_BITS = 8  # of codes whose codebooks shared memory holds
SMS = 132  # of an H100 and an H200
SHARED_BYTES = 227 * 1024  # that a block of Hopper may use
MIN_N = 8  # the TMA copies multiples of 16 bytes
# Registers of a thread that gathers, by the warpgroups that do. setmaxnreg only moves what the
# block has from its start: 168, 128 and 96 a thread, times the threads of one warpgroup more.
REGISTERS = {1: 240, 2: 240, 3: 160, 4: 112}
PRODUCER_REGISTERS = 24


def refusal(
    M: int, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype, most_bits: int = TABLE_BITS
) -> str | None:
    """Why the kernel cannot multiply x [M, K] of `dtype` by a `spec` weight [K, N]; None if it can.

    It runs b up to `most_bits` where a packed word spans at most 64 weights and g is 16, 32 or a
    multiple of 64, with x in bfloat16 or float16.
    """
    g, word = spec.group_size, spec.vector_length * spec.codes_per_word
    if reason := format_refusal(spec):
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"its tensor cores multiply float16, and x is {jnp.dtype(dtype)}"
    if spec.bits > most_bits:
        return f"its codebooks have at most 2**{most_bits} vectors, and {spec} has b = {spec.bits}"
    if word > K_TILE:
        return f"a packed word must span at most {K_TILE} weights, and one of {spec} spans {word}"
    if g % K_TILE and g not in (16, 32):
        return f"g must be 16, 32 or a multiple of {K_TILE}, and {spec} has g = {g}"
    if M < 1:
        return f"it needs at least one row of x, got M = {M}"
    if N < MIN_N:
        return f"it needs at least {MIN_N} output features, got N = {N}"
    return None


def table_shape(spec: CodebookSpec) -> tuple[int, int, int, int]:
    """[pair of codebooks, code, codebook of the pair, 64 values]: 256 bytes for each code.

    Larger codebooks stay in global memory, as [m, 2**b, v].
    """
    return pl.cdiv(spec.num_codebooks, 2), spec.codebook_size, 2, TABLE_ROW // 2


def word_rows(spec: CodebookSpec) -> int:
    """Packed words along a tile of 64."""
    return K_TILE // (spec.vector_length * spec.codes_per_word)


def scale_rows(spec: CodebookSpec, length: int) -> int:
    """Scales along `length` weights of K that begin with a group or lie within one."""
    return max(1, length // spec.group_size)
