"""Multiply by a codebook-quantized weight: the public operation and what it means.

    y[..., n] = sum_k x[..., k] W[k, n],   W = dequantize(w)

The reference dequantizes and multiplies, in float32 throughout: x, codebooks and scales are exact
in float32, so the only rounding to a narrower dtype is that of the result, to x's. Every other
implementation means the same sum in another order. The Psumbook form never builds W: each codebook
vector is multiplied once with each segment of x, and a weight column only looks products up.

Letters: M rows of x, K input and N output features, m codebooks, v weights a code, g weights a
scale, J = K // v segments of x, G = K // g groups, c a codebook, i one of its 2**b vectors.
Source: Psumbook, CodeGEMM (arXiv 2512.17970) section 3.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.pack import unpack_codes
from jaxcodec.pallas_kernels import psumbook_mosaic
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import FLOAT_DTYPES, CodebookTensor, dequantize

# The gather reads the codes once for each 4 rows. At 8 rows that still costs far less than writing
# the dequantized weight to memory, as the reference does.
MOSAIC_ROWS = 8
HOPPER = 9.0  # compute capability


def codebook_matmul(
    x: jax.Array, w: CodebookTensor, implementation: str | None = None
) -> jax.Array:
    """Multiply x [..., K] by a codebook weight [K, N], accumulating in float32.

    Differentiable in x, codebooks and scales, never in codes. Works under jit, vmap and grad.

    Args:
      x: bf16, f16 or f32 [..., K].
      w: weight [K, N].
      implementation: None lets `choose` pick. By name: "reference" dequantizes and multiplies in
        float32, "dequantize" the same in x's dtype on tensor cores, "psumbook" gathers from a
        Psumbook in jnp, "mosaic" is the kernel for Hopper GPUs, "mosaic_interpreted" the same
        kernel interpreted on a CPU.

    Returns:
      [..., N] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      TypeError: an unsupported dtype.
      NotImplementedError: the named implementation cannot run here, and why.

    Source: CodeGEMM (arXiv 2512.17970) section 3.
    """
    _check(x, w)
    K, N = w.shape
    M = int(np.prod(x.shape[:-1]))
    name = choose(M, K, N, w.spec, x.dtype) if implementation is None else implementation
    _check_implementation(name, M, K, N, w.spec)
    with jax.named_scope("codebook_matmul"):
        y = _matmul(name, x.reshape(M, K), w)
    return y.reshape(*x.shape[:-1], N)


def choose(M: int, K: int, N: int, spec: CodebookSpec, dtype: jnp.dtype) -> str:
    """The implementation for x [M, K] of `dtype` and a `spec` weight [K, N] on the default device.

    The one rule: the gather kernel for at most `MOSAIC_ROWS` rows where it can run; else, where
    there are tensor cores for the dtype, one dense product in it; else the reference.
    """
    if M <= MOSAIC_ROWS and not _mosaic_refusal(M, K, N, spec):
        return "mosaic"
    on_gpu = _default_device().platform == "gpu"
    return "dequantize" if on_gpu and jnp.dtype(dtype).itemsize == 2 else "reference"


def reference(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """The specification: x [M, K] times the dequantized w [K, N], in float32, cast to x's dtype."""
    weight_kn = dequantize(w, jnp.float32)
    y = jnp.dot(x.astype(jnp.float32), weight_kn, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


def dequantized(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """x [M, K] times w dequantized and rounded to x's dtype, as a dense model's weight would be.

    Accumulated in float32. A weight of bf16 differs from the reference's by at most 2^-9 of itself.
    """
    # Left alone, a GPU would round float32 operands to the 10 bits of TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight_kn = dequantize(w, x.dtype)
    y = jnp.dot(x, weight_kn, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def psumbook(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """The specification as a gather: build the Psumbook of x [M, K], look up, sum, scale.

    Materializes m M J N lookups: for small shapes, to read and to test against.
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
    y = (groups_mgn * w.scales.astype(jnp.float32)[None]).sum(axis=1)
    return y.astype(x.dtype)


_IMPLEMENTATIONS: dict[str, Callable[[jax.Array, CodebookTensor], jax.Array]] = {
    "reference": reference,
    "dequantize": dequantized,
    "psumbook": psumbook,
    "mosaic": psumbook_mosaic.matmul,
    "mosaic_interpreted": functools.partial(psumbook_mosaic.matmul, interpret=True),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(name: str, x: jax.Array, w: CodebookTensor) -> jax.Array:
    return _IMPLEMENTATIONS[name](x, w)


def _forward(name: str, x: jax.Array, w: CodebookTensor):
    return _matmul(name, x, w), (x, w)


def _backward(name: str, residuals: tuple[jax.Array, CodebookTensor], dy: jax.Array):
    """Every implementation means the reference's sum, so it has the reference's derivative.

    The dense product in x's dtype is differentiated as it stands, to stay on tensor cores.
    """
    x, w = residuals
    product = dequantized if name == "dequantize" else reference

    def multiplied(x: jax.Array, codebooks: jax.Array, scales: jax.Array) -> jax.Array:
        return product(x, CodebookTensor(w.codes, codebooks, scales))

    _, pull_back = jax.vjp(multiplied, x, w.codebooks, w.scales)
    dx, dcodebooks, dscales = pull_back(dy)
    no_gradient = cast(jax.Array, np.zeros(w.codes.shape, jax.dtypes.float0))
    return dx, CodebookTensor(no_gradient, dcodebooks, dscales)


_matmul.defvjp(_forward, _backward)


def _check(x: jax.Array, w: CodebookTensor) -> None:
    ranks = (w.codes.ndim, w.codebooks.ndim, w.scales.ndim)
    if ranks != (3, 3, 2):
        raise ValueError(f"Codes, codebooks and scales need ranks (3, 3, 2), got {ranks}.")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}.")
    if w.codes.dtype != jnp.uint32:
        raise TypeError(f"Codes must be packed uint32, got {w.codes.dtype}.")
    for field in ("codebooks", "scales"):
        dtype = getattr(w, field).dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{field} must be bfloat16, float16 or float32, got {dtype}.")
    K, N = w.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K] with K = {K} of w {[K, N]}, got {list(x.shape)}.")
    if w.scales.shape[0] == 0 or w.scales.shape[1] != N:
        raise ValueError(f"scales must be [K // g, N] with N = {N}, got {list(w.scales.shape)}.")
    w.spec.check_shape(K, N)


def _check_implementation(name: str, M: int, K: int, N: int, spec: CodebookSpec) -> None:
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation {name!r}; there are {list(_IMPLEMENTATIONS)}.")
    reason = None
    if name == "mosaic":
        reason = _mosaic_refusal(M, K, N, spec)
    if name == "mosaic_interpreted":
        reason = psumbook_mosaic.refusal(M, K, N, spec)
    if reason:
        raise NotImplementedError(f"Implementation {name!r} cannot run: {reason}.")


def _mosaic_refusal(M: int, K: int, N: int, spec: CodebookSpec) -> str | None:
    device = _default_device()
    if _compute_capability(device) < HOPPER:
        return (
            f"it needs a GPU of compute capability {HOPPER} or more, and the default device is "
            f"{device.device_kind} of compute capability {_compute_capability(device)}"
        )
    return psumbook_mosaic.refusal(M, K, N, spec)


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def _compute_capability(device: jax.Device) -> float:
    """That of an NVIDIA GPU, such as 9.0; 0 for every other device."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # a CPU has none, an AMD GPU a name such as gfx942
        return 0.0
