"""Multiply by codebook-quantized weights: the public operation, and the choice of its kernel.

    y[..., n] = sum_k x[..., k] W[k, n],   W = dequantize(w)

Letters: M rows of x, K input and N output features, m codebooks, v weights a code, g weights a
scale. Source: CodeGEMM (arXiv 2512.17970) section 3.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.pallas_kernels import dequantizer, tuning
from jaxcodec.pallas_kernels.kernels import KERNELS
from jaxcodec.pallas_kernels.partitioning import partitioned, partitioned_weight
from jaxcodec.pallas_kernels.reference import dense, psumbook, reference
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import FLOAT_DTYPES, CodebookTensor, dequantize

Weights = tuple[CodebookTensor, ...]


def dequantized(x: jax.Array, w: CodebookTensor) -> jax.Array:
    """x [M, K] times w rounded to x's dtype, as a dense model's weight would be; f32 [M, N].

    Accumulated in float32. A weight of bf16 differs from the reference's by at most 2^-9 of itself.
    """
    return dense(x, _dense_weight(w, x.dtype))


PLAIN: dict[str, Callable[[jax.Array, CodebookTensor], jax.Array]] = {
    "reference": reference,
    "dequantize": dequantized,
    "psumbook": psumbook,
}
# What one more weight costs apart: tables do not count the gaps between launches, of 1.5 us or
# more, and a weight may take two or three launches.
APART_US = 5.0
MOST_TOGETHER = 16  # weights of a launch, whose plans are made for a handful
IMPLEMENTATIONS = (*KERNELS, *PLAIN)
HOPPER = 9.0  # compute capability; wgmma, and the memory that tiles are cut for, are its alone


def codebook_matmul(
    x: jax.Array,
    w: CodebookTensor,
    bias: jax.Array | None = None,
    *,
    implementation: str | None = None,
    preferred_element_type: jnp.dtype | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiply x [..., K] by a codebook weight [K, N], accumulating in float32.

    Differentiable in x, bias, codebooks and scales, never in codes. Works under jit, vmap and grad,
    not under jvp. Kernels are chosen for the default device. With many rows, and where x and
    codebooks differ in dtype, sums of codebooks are kept in float16: they should lie within 2**-14
    to 2**15, and scales below 255.

    Args:
      x: bf16, f16 or f32 [..., K].
      w: weight [K, N].
      bias: [N], added before the result is rounded.
      implementation: None lets `choose` pick. By name: "psumbook_mosaic" gathers products of x,
        "mma_mosaic" and "wgmma_mosaic" gather codebook vectors into tensor-core operands
        (all three for Hopper GPUs), "dequantize" multiplies by the weight rounded to x's dtype,
        "reference" does so in float32, "psumbook" is the gather in jnp.
      preferred_element_type: dtype of the result; None for x's.
      interpret: run the named kernel's structure on a CPU, with JAX looking for races; means
        nothing to an implementation without a kernel.

    Returns:
      [..., N].

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      TypeError: an unsupported dtype.
      NotImplementedError: the named implementation cannot run here, and why.

    Source: CodeGEMM (arXiv 2512.17970) section 3.
    """
    biases = None if bias is None else (bias,)
    (y,) = codebook_matmuls(
        x,
        (w,),
        biases,
        implementation=implementation,
        preferred_element_type=preferred_element_type,
        interpret=interpret,
    )
    return y


def codebook_matmuls(
    x: jax.Array,
    weights: Sequence[CodebookTensor],
    biases: Sequence[jax.Array | None] | None = None,
    *,
    implementation: str | None = None,
    preferred_element_type: jnp.dtype | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Multiply one x [..., K] by several weights [K, N_i], such as those of q, k and v.

    Weights of one format and dtype share a launch; each keeps its own codebooks. Everything else
    is as in `codebook_matmul`.

    Returns:
      One [..., N_i] for each weight.
    """
    if isinstance(weights, CodebookTensor):
        raise TypeError("codebook_matmuls takes several weights; codebook_matmul takes one.")
    weights = tuple(weights)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown implementation {implementation!r}; there are {list(IMPLEMENTATIONS)}."
        )
    _check(x, weights, biases)
    dtype = jnp.dtype(preferred_element_type or x.dtype)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"The result must be bfloat16, float16 or float32, got {dtype}.")
    K = x.shape[-1]
    M = int(np.prod(x.shape[:-1]))
    rows = x.reshape(M, K)
    results: list[Any] = [None] * len(weights)
    for members in _alike(weights):
        group = tuple(weights[i] for i in members)
        # A bias is added before rounding, by the fusion that rounds.
        biased = any(biases[i] is not None for i in members)
        result = jnp.dtype(jnp.float32) if biased else dtype
        with jax.named_scope("codebook_matmul"):
            ys = _matmuls(implementation, result, interpret, rows, group)
            for i, y in zip(members, ys, strict=True):
                bias = biases[i]
                y = y if bias is None else y + bias.astype(jnp.float32)[None, :]
                results[i] = y.astype(dtype).reshape(*x.shape[:-1], y.shape[-1])
    return tuple(results)


def choose(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec, dtype: jnp.dtype) -> str:
    """The implementation for x [M, K] of `dtype` and `spec` weights [K, N] on the default device.

    The one rule: what was measured to be fastest for the shape on this kind of device, else the
    first kernel of `tuning.preferences` that can run; without one, a dense product in the dtype
    where there are tensor cores for it, else the reference.
    """
    dtype = jnp.dtype(dtype)
    entry = _entry(M, K, Ns, spec)
    tuned = [entry.kernel] if entry else []
    for name in [*tuned, *tuning.preferences(M, K, Ns, spec, dtype)]:
        if not _refusal(name, M, K, Ns, spec, dtype):
            return name
    on_gpu = _default_device().platform == "gpu"
    return "dequantize" if on_gpu and dtype.itemsize == 2 else "reference"


def faster_apart(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec, dtype: jnp.dtype) -> bool:
    """Whether each of several weights by itself was clearly faster than all in one launch."""
    together = _entry(M, K, Ns, spec)
    apart = [entry for N in Ns if (entry := _entry(M, K, [N], spec))]
    # Tables hold times of rows of 16 bits.
    if together is None or len(apart) < len(Ns) or jnp.dtype(dtype).itemsize != 2:
        return False
    return sum(entry.us for entry in apart) + APART_US * (len(Ns) - 1) < together.us


def _launches(
    implementation: str | None, x: jax.Array, weights: Weights
) -> list[tuple[str, Weights]]:
    """What multiplies weights of one spec on this device, and which of them together."""
    (M, K), Ns, spec = x.shape, [w.shape[1] for w in weights], weights[0].spec
    if implementation is not None:
        return [(implementation, weights)]
    if faster_apart(M, K, Ns, spec, x.dtype):
        return [(choose(M, K, [w.shape[1]], spec, x.dtype), (w,)) for w in weights]
    return [(choose(M, K, Ns, spec, x.dtype), weights)]


def _alike(weights: Weights) -> list[list[int]]:
    """Indices of weights that one launch can serve, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for i, w in enumerate(weights):
        groups.setdefault((w.spec, w.codebooks.dtype, w.scales.dtype), []).append(i)
    return [list(some) for all in groups.values() for some in itertools.batched(all, MOST_TOGETHER)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmuls(
    implementation: str | None,
    dtype: jnp.dtype,
    interpret: bool,
    x: jax.Array,
    weights: Weights,
) -> list[jax.Array]:
    return _batched(implementation, dtype, interpret)(x, weights)


@functools.cache
def _batched(implementation: str | None, dtype: jnp.dtype, interpret: bool):
    """With a rule for vmap: rows of a batch are rows, and weights come one by one."""
    multiply = functools.partial(_multiply, implementation, interpret)
    # The interpreter's ordered effects do not pass the partitioner.
    whole = lambda x, weights: list(multiply(x, weights, dtype))
    on_devices = whole if interpret else partitioned(multiply, dtype)

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, weights: Weights) -> list[jax.Array]:
        return on_devices(x, weights)

    @call.def_vmap
    def _(size: int, batched: tuple[bool, Any], x: jax.Array, weights: Weights):
        x_batched, weights_batched = batched
        if not any(jax.tree.leaves(weights_batched)):
            ys = call(x.reshape(-1, x.shape[-1]), weights)
            return [y.reshape(*x.shape[:-1], -1) for y in ys], [True] * len(weights)
        operands = jax.tree.map(
            lambda leaf, mapped: leaf if mapped else jnp.broadcast_to(leaf, (size, *leaf.shape)),
            (x, weights),
            (x_batched, weights_batched),
        )
        return jax.lax.map(lambda operand: call(*operand), operands), [True] * len(weights)

    return call


def _multiply(
    implementation: str | None,
    interpret: bool,
    x: jax.Array,
    weights: Weights,
    dtype: jnp.dtype,
) -> Sequence[jax.Array]:
    """What one device does: choose an implementation, or refuse the named one, and run it."""
    (M, K), spec = x.shape, weights[0].spec
    results = []
    for name, group in _launches(implementation, x, weights):
        Ns = [w.shape[1] for w in group]
        if name in PLAIN:
            results += [PLAIN[name](x, w).astype(dtype) for w in group]
            continue
        if reason := _refusal(name, M, K, Ns, spec, x.dtype, interpret):
            raise NotImplementedError(f"Implementation {name!r} cannot run: {reason}.")
        entry, kernel = _entry(M, K, Ns, spec), KERNELS[name]
        tiles = kernel.Tiling(**entry.tiles) if entry and entry.kernel == name else None
        results += kernel.matmul(x, group, tiles=tiles, out_dtype=dtype, interpret=interpret)
    return results


def _forward(implementation, dtype, interpret, x: jax.Array, weights: Weights):
    return _matmuls(implementation, dtype, interpret, x, weights), (x, weights)


def _backward(implementation, dtype, interpret, residuals: tuple[jax.Array, Weights], dys):
    """Every implementation means the reference's sum, so it has the reference's derivative.

    Where tensor cores multiplied forwards they do backwards, the weight and what comes back in x's
    dtype. Only one dequantized matrix exists at a time.
    """
    x, weights = residuals
    kinds = []
    for name, group in _launches(implementation, x, weights):
        exact = name in ("reference", "psumbook", "psumbook_mosaic")
        kinds += [jnp.dtype(jnp.float32) if exact else x.dtype] * len(group)
    gradients = [_gradients(x, *rest) for rest in zip(weights, dys, kinds, strict=True)]
    dx = functools.reduce(jnp.add, [dx for dx, _ in gradients])
    return dx.astype(x.dtype), tuple(dw for _, dw in gradients)


def _gradients(x: jax.Array, w: CodebookTensor, dy: jax.Array, dtype: jnp.dtype):
    """f32 dx [M, K], and those of codebooks and scales, from products of operands in `dtype`."""
    x, dy = x.astype(dtype), dy.astype(dtype)
    dx, dweight = dense(dy, _dense_weight(w, dtype).T), dense(x.T, dy)

    def weight(codebooks: jax.Array, scales: jax.Array) -> jax.Array:
        return dequantize(CodebookTensor(w.codes, codebooks, scales), jnp.float32)

    _, pull_back = jax.vjp(weight, w.codebooks, w.scales)
    no_gradient = cast(jax.Array, np.zeros(w.codes.shape, jax.dtypes.float0))
    return dx, CodebookTensor(no_gradient, *pull_back(dweight))


def _dense_weight(w: CodebookTensor, dtype: jnp.dtype) -> jax.Array:
    """The weight [K, N] in `dtype`, from the kernel for it where that can run."""
    on_hopper = _compute_capability(_default_device()) == HOPPER
    if not on_hopper or dequantizer.refusal(w.spec, w.codebooks.dtype, dtype):
        return dequantize(w, dtype)
    write = partitioned_weight(functools.partial(dequantizer.dequantize, dtype=dtype))
    return jax.custom_batching.sequential_vmap(write)(w)


_matmuls.defvjp(_forward, _backward)


def _check(x: jax.Array, weights: Weights, biases: Sequence[jax.Array | None]) -> None:
    if not weights:
        raise ValueError("Expected at least one weight, got none.")
    if len(biases) != len(weights):
        raise ValueError(f"Expected a bias (or None) a weight, {len(weights)}, got {len(biases)}.")
    for name, value in (("x", x), *(("bias", bias) for bias in biases if bias is not None)):
        if not hasattr(value, "dtype"):
            raise TypeError(f"{name} must be an array, got {type(value).__name__}.")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}.")
    for w, bias in zip(weights, biases, strict=True):
        _check_weight(w)
        K, N = w.shape
        if x.ndim == 0 or x.shape[-1] != K:
            raise ValueError(f"x must be [..., K] with K = {K} of w {[K, N]}, got {list(x.shape)}.")
        if bias is not None and bias.dtype not in FLOAT_DTYPES:
            raise TypeError(f"bias must be bfloat16, float16 or float32, got {bias.dtype}.")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"bias must be [N] with N = {N}, got {list(bias.shape)}.")


def _check_weight(w: CodebookTensor) -> None:
    if not isinstance(w, CodebookTensor):
        raise TypeError(f"A weight must be a CodebookTensor, got {type(w).__name__}.")
    ranks = (w.codes.ndim, w.codebooks.ndim, w.scales.ndim)
    if ranks != (3, 3, 2):
        raise ValueError(f"Codes, codebooks and scales need ranks (3, 3, 2), got {ranks}.")
    if w.codes.dtype != jnp.uint32:
        raise TypeError(f"Codes must be packed uint32, got {w.codes.dtype}.")
    for field in ("codebooks", "scales"):
        dtype = getattr(w, field).dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{field} must be bfloat16, float16 or float32, got {dtype}.")
    m, size, _ = w.codebooks.shape
    if w.codes.shape[0] != m:
        raise ValueError(f"codes are for m = {w.codes.shape[0]} codebooks, codebooks hold {m}.")
    if size < 2 or size & (size - 1):
        # A code could point past the end, and no kernel looks.
        raise ValueError(f"A codebook must hold 2**b vectors, one for every code, got {size}.")
    K, N = w.shape
    groups = w.scales.shape[0]
    if groups == 0 or K % groups or w.scales.shape[1] != N:
        raise ValueError(
            f"scales must be [K // g, N] with K = {K} and N = {N}, got {list(w.scales.shape)}."
        )
    w.spec.check_shape(K, N)


def _refusal(
    name: str,
    M: int,
    K: int,
    Ns: Sequence[int],
    spec: CodebookSpec,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> str | None:
    device = _default_device()
    capability = _compute_capability(device)
    if not interpret and capability != HOPPER:
        return (
            f"it needs a GPU of compute capability {HOPPER}, and the default device is "
            f"{device.device_kind} of compute capability {capability}"
        )
    reasons = (KERNELS[name].refusal(M, K, N, spec, dtype) for N in Ns)
    return next((reason for reason in reasons if reason), None)


def _entry(M: int, K: int, Ns: Sequence[int], spec: CodebookSpec) -> tuning.Entry | None:
    return tuning.table(_default_device().device_kind).entry(M, K, tuple(Ns), spec)


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def _compute_capability(device: jax.Device) -> float:
    """That of an NVIDIA GPU, such as 9.0; 0 for every other device."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # a CPU has none, an AMD GPU a name such as gfx942
        return 0.0
