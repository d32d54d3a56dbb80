"""What every kernel on tensor cores does to its operands before the launch.

Letters: M rows, K input and N output features.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.mosaic import compiler_params, interpreter
from jaxcodec.pallas_kernels.operands import interpreted, threads
from jaxcodec.pallas_kernels.operands.layout import K_TILE, MIN_N, WARPGROUP
from jaxcodec.tensor import CodebookTensor

# Exponent to which the largest value of a row of x is brought; float16 ends below 2**16.
LARGEST_EXPONENT = 14


def padded(w: CodebookTensor) -> CodebookTensor:
    """A weight whose N the copies can take, a multiple of 8."""
    missing = -w.shape[1] % MIN_N
    if not missing:
        return w
    codes = jnp.pad(w.codes, ((0, 0), (0, 0), (0, missing)))
    return CodebookTensor(codes, w.codebooks, jnp.pad(w.scales, ((0, 0), (0, missing))))


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [M, K] in float16, each row over a power of two that suits it, and f32 [M], the powers."""
    values = x.astype(jnp.float32)
    up, down = _powers(jnp.max(jnp.abs(values), axis=1))
    return (values * up[:, None]).astype(jnp.float16), down


def half_tiles(x: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """x [M, K] as tensor cores read it, each row over a power of two that suits float16.

    Returns:
      f16 [ceil(K / 64), M, 64] with the inputs of 64 in the order of a fragment, and f32 [M], the
      powers of two.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % K_TILE)))
    M, count = x.shape[0], x.shape[1] // K_TILE
    # A warpgroup for each 4096 inputs: of more, the wait for one another takes longer.
    warpgroups = math.gcd(count, min(8, pl.cdiv(count, 64)))
    own, warps = count // warpgroups, WARPGROUP // 32
    primitives = interpreted if interpret else threads

    def half_tiles(x_ref, tiles_ref, factors_ref, maxima, written):
        row, warpgroup = jax.lax.axis_index("row"), jax.lax.axis_index("warpgroup")
        x = x_ref.at[row, pl.ds(warpgroup * own * K_TILE, own * K_TILE)]
        primitives.store_largest(x, maxima.at[pl.ds(warpgroup * warps, warps)])
        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)
        sizes = [maxima[i] for i in range(warpgroups * warps)]
        up, down = _powers(functools.reduce(jnp.maximum, sizes))
        primitives.write_halves(x, up, tiles_ref.at[pl.ds(warpgroup * own, own), row])

        @pl.when(warpgroup == 0)
        def _():
            primitives.store_scalar(factors_ref.at[pl.ds(row, 1)], down)

    kernel = plgpu.kernel(
        half_tiles,
        out_type=(
            jax.ShapeDtypeStruct((count, M, K_TILE), jnp.float16),
            jax.ShapeDtypeStruct((M,), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((warpgroups * warps,), jnp.float32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(M,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter(interpret),
    )
    return kernel(x)


def _powers(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The power of two that brings `largest` to 2**14 to 2**15, and its inverse, in f32."""
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23  # biased by 127
    exponent = jnp.minimum(jnp.maximum(exponent, LARGEST_EXPONENT + 1), 254)
    power = lambda biased: jax.lax.bitcast_convert_type(biased << 23, jnp.float32)
    return power(2 * 127 + LARGEST_EXPONENT - exponent), power(exponent - LARGEST_EXPONENT)
