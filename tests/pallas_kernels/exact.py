"""Operands of the kernels, and what they stand for, in numpy alone: nothing compiles for them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor


def operands(text: str, M: int, K: int, N: int, dtype=jnp.bfloat16, seed: int = 3):
    """Random x [M, K], and a weight [K, N] of variance 1 / K."""
    return draw((M, K), dtype), weight(text, K, N, dtype, seed)


def draw(shape: tuple[int, ...], dtype=jnp.float32, seed: int = 4) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def weight(text: str, K: int, N: int, dtype=jnp.bfloat16, seed: int = 3) -> CodebookTensor:
    """A random weight [K, N] of variance 1 / K."""
    spec, rng = CodebookSpec.parse(text), np.random.default_rng(seed)
    spec.check_shape(K, N)
    m, v = spec.num_codebooks, spec.vector_length
    codes = rng.integers(0, 2**32, (m, K // (v * spec.codes_per_word), N), dtype=np.uint32)
    books = rng.normal(size=(m, spec.codebook_size, v)) / np.sqrt(m)
    scales = rng.uniform(0.5, 1.5, (K // spec.group_size, N)) / np.sqrt(K)
    return CodebookTensor(*map(jnp.asarray, (codes, books.astype(dtype), scales.astype(dtype))))


def dense(w: CodebookTensor) -> np.ndarray:
    """The matrix [K, N] that a weight stands for, by the definition, in float64."""
    spec, codes = w.spec, np.asarray(w.codes)
    books, scales = (np.asarray(a, np.float64) for a in (w.codebooks, w.scales))
    shifts = spec.bits * np.arange(spec.codes_per_word, dtype=np.uint32)
    fields = codes[:, :, None] >> shifts[:, None] & np.uint32(spec.codebook_size - 1)
    codes = fields.reshape(spec.num_codebooks, -1, codes.shape[-1])
    vectors = np.sum([book[own] for book, own in zip(books, codes, strict=True)], axis=0)
    unscaled = vectors.transpose(0, 2, 1).reshape(w.shape)
    return unscaled * np.repeat(scales, spec.group_size, axis=0)


def product(x: jax.Array, w: CodebookTensor) -> np.ndarray:
    """x @ w in float64."""
    return np.asarray(x, np.float64) @ dense(w)


def relative_error(y, expected: np.ndarray) -> float:
    """||y - expected|| / ||expected||."""
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
