"""A codebook weight as the dense matrix that it stands for, on Hopper.

    W[k, n] = scales[k // g, n] * sum_c codebooks[c, code(c, k // v, n), k % v]

Every block holds the codebooks in shared memory, in the table of `operands`. A warp takes one piece
of the weight after another, looks its codes up, and sums and scales in float32: 2 bytes a weight go
out where a quarter of one came in, so that writing the result is what takes the time.

Letters: K input and N output features, m codebooks, v weights a code, g weights a scale, c a
codebook.

Source: AQLM (arXiv 2401.06118) section 3 for the format.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.pallas_kernels.dequantizer import interpreted, threads
from jaxcodec.pallas_kernels.dequantizer.plan import WARPGROUPS, Plan, refusal
from jaxcodec.pallas_kernels.mosaic import compiler_params, interpreter
from jaxcodec.pallas_kernels.operands import interpreted as operands_interpreted
from jaxcodec.pallas_kernels.operands import threads as operands_threads
from jaxcodec.pallas_kernels.operands.layout import table_shape
from jaxcodec.tensor import CodebookTensor


def dequantize(w: CodebookTensor, dtype: jnp.dtype, interpret: bool = False) -> jax.Array:
    """The matrix [K, N] that `w` stands for, summed and scaled in float32, rounded to `dtype`.

    Args:
      w: weight [K, N] with codebooks in bf16 or f16, of at most 2**8 vectors.
      dtype: bf16 or f16.
      interpret: run the kernel's structure on a CPU, with JAX looking for races.

    Raises:
      NotImplementedError: the kernel cannot run this format or dtype, with the numbers.
    """
    if reason := refusal(w.spec, w.codebooks.dtype, dtype):
        raise NotImplementedError(f"The dequantizer cannot run: {reason}.")
    plan = Plan(w.spec, *w.shape)
    primitives = interpreted if interpret else threads
    operands = operands_interpreted if interpret else operands_threads

    def dequantizer(codes_ref, books_ref, scales_ref, out_ref, table, filled):
        operands.fill(table, books_ref, WARPGROUPS)
        plgpu.barrier_arrive(filled)
        plgpu.barrier_wait(filled)

        @pl.loop(0, plan.turns)
        def _(turn):
            first = turn * plan.blocks + jax.lax.axis_index("block")
            primitives.write_pieces(plan, table, codes_ref, scales_ref, out_ref, first)

    kernel = plgpu.kernel(
        dequantizer,
        out_type=jax.ShapeDtypeStruct(w.shape, dtype),
        scratch_types=[
            plgpu.SMEM(table_shape(w.spec), w.codebooks.dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter(interpret),
    )
    with jax.named_scope("dequantize"):
        return kernel(w.codes, w.codebooks, w.scales)
