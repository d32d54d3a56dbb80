"""What multiplying by a codebook-quantized weight means, in plain JAX.

    y[m, n] = sum_k x[m, k] W[k, n],   W = dequantize(w)

`reference` is the specification: it dequantizes and multiplies in float32 throughout, where x,
codebooks and scales are exact. Every other implementation means the same sum in another order.
`psumbook` never builds W: each codebook vector is multiplied once with each segment of x, and a
weight column only looks products up. These run on every device, and are what a GPU without a
kernel falls back on.

Letters: M rows of x, K input and N output features, m codebooks, v weights a code, g weights a
scale, J = K // v segments of x, G = K // g groups, c a codebook, i one of its 2**b vectors.
Source: Psumbook, CodeGEMM (arXiv 2512.17970) section 3.
"""

import jax
import jax.numpy as jnp

from jaxcodec.pack import unpack_codes
from jaxcodec.tensor import CodebookTensor, dequantize


def reference(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """x [M, K] times the dequantized w [K, N], all in float32; f32 [M, N]."""
    weight_kn = dequantize(w, jnp.float32)
    return jnp.dot(x.astype(jnp.float32), weight_kn, precision=jax.lax.Precision.HIGHEST)


def dense(x: jax.Array, weight_kn: jax.Array) -> jax.Array:
    """x [M, K] times a dense weight [K, N] of its dtype, accumulated in float32; f32 [M, N]."""
    # Left alone, a GPU would round float32 operands to the 10 bits of TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, weight_kn, precision=precision, preferred_element_type=jnp.float32)


def psumbook(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """The specification as a gather: the Psumbook of x [M, K], looked up, summed, scaled.

    Returns f32 [M, N]. Materializes m M J N lookups: for small shapes, to read and test against.
    """
    M, K = x.shape
    spec, N = w.spec, w.shape[1]
    J, G = K // spec.vector_length, K // spec.group_size
    x_mjv = x.astype(jnp.float32).reshape(M, J, spec.vector_length)
    books_civ = w.codebooks.astype(jnp.float32)
    entries_cmji = jnp.einsum(
        "mjv,civ->cmji", x_mjv, books_civ, precision=jax.lax.Precision.HIGHEST
    )
    codes_cjn = unpack_codes(w.codes, spec.bits)
    found_cmjn = jnp.take_along_axis(entries_cmji, codes_cjn[:, None], axis=3)
    groups_mgn = found_cmjn.sum(axis=0).reshape(M, G, J // G, N).sum(axis=2)
    return (groups_mgn * w.scales.astype(jnp.float32)[None]).sum(axis=1)
