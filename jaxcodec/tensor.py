"""A weight matrix stored as codes into additive codebooks, and what it stands for.

    W[k, n] = scales[k // g, n] * sum_c codebooks[c, code(c, k // v, n), k % v]

Letters: m codebooks, b bits a code, v weights a code, g weights a scale, K input and N output
features. Source: AQLM (arXiv 2401.06118) section 3; CodeGEMM (arXiv 2512.17970) section 3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.pack import unpack_codes
from jaxcodec.spec import WORD_BITS, CodebookSpec

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
FIELDS = ("codes", "codebooks", "scales")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodebookTensor:
    """A codebook-quantized weight of shape [K, N]; every number of the format is in its shapes.

    Attributes:
      codes: uint32 [m, K // (v * 32 // b), N], 32 // b codes a word, the first in the low bits.
      codebooks: bf16, f16 or f32 [m, 2**b, v].
      scales: same dtype as codebooks, [K // g, N].
    """

    codes: jax.Array
    codebooks: jax.Array
    scales: jax.Array

    @property
    def spec(self) -> CodebookSpec:
        """The format, read off the shapes."""
        m, size, v = self.codebooks.shape
        K, _ = self.shape
        return CodebookSpec(m, v, K // self.scales.shape[0], (size - 1).bit_length())

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of the matrix that this stands for."""
        _, size, v = self.codebooks.shape
        bits = (size - 1).bit_length()
        _, words, N = self.codes.shape
        return words * (WORD_BITS // bits) * v, N

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the dequantized matrix."""
        return self.codebooks.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, codebooks and scales together."""
        return self.codes.nbytes + self.codebooks.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, codebooks and scales per weight."""
        K, N = self.shape
        return 8 * self.nbytes / (K * N)

    def check(self, name: str = "weight") -> "CodebookTensor":
        """Refuse arrays that do not form a codebook tensor; return self.

        Called by constructors and loaders, not on every unflatten.

        Raises:
          ValueError: wrong rank, dtype or shape, or a value that is not finite, naming `name`.
        """
        ranks = (self.codes.ndim, self.codebooks.ndim, self.scales.ndim)
        if ranks != (3, 3, 2):
            raise ValueError(
                f"{name}: codes, codebooks and scales must have ranks (3, 3, 2), got {ranks}."
            )
        if self.codes.dtype != jnp.uint32:
            raise ValueError(f"{name}: codes must be packed uint32, got {self.codes.dtype}.")
        if self.codebooks.dtype not in FLOAT_DTYPES or self.scales.dtype != self.codebooks.dtype:
            raise ValueError(
                f"{name}: codebooks and scales must share one of bfloat16, float16 and float32, "
                f"got {self.codebooks.dtype} and {self.scales.dtype}."
            )
        self._check_shapes(name)
        for field in ("codebooks", "scales"):
            bad = int(jnp.sum(~jnp.isfinite(getattr(self, field))))
            if bad:
                raise ValueError(f"{name}: {field} holds {bad} values that are NaN or infinite.")
        return self

    def _check_shapes(self, name: str) -> None:
        m, size, _ = self.codebooks.shape
        if self.codes.shape[0] != m:
            raise ValueError(
                f"{name}: codes are for m = {self.codes.shape[0]} codebooks, codebooks hold {m}."
            )
        if size < 2 or size & (size - 1):
            raise ValueError(f"{name}: a codebook must hold 2**b vectors, got {size}.")
        K, N = self.shape
        groups, scale_N = self.scales.shape
        if scale_N != N or groups == 0 or K % groups:
            raise ValueError(
                f"{name}: scales must be [K // g, N] with K = {K} and N = {N}, "
                f"got {list(self.scales.shape)}."
            )
        try:
            self.spec.check_shape(K, N)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def dequantize(w: CodebookTensor, dtype: jnp.dtype | None = None) -> jax.Array:
    """The matrix [K, N] that `w` stands for, summed and scaled in float32, cast to `dtype`.

    Differentiable in codebooks and scales. `dtype` defaults to the codebooks' own.
    """
    spec = w.spec
    K, N = w.shape
    with jax.named_scope("dequantize"):
        codes_mjn = unpack_codes(w.codes, spec.bits)
        books_mcv = w.codebooks.astype(jnp.float32)
        vectors_jnv = _look_up(books_mcv[0], codes_mjn[0])
        for c in range(1, spec.num_codebooks):
            vectors_jnv += _look_up(books_mcv[c], codes_mjn[c])
        unscaled_kn = vectors_jnv.transpose(0, 2, 1).reshape(-1, spec.group_size, N)
        scaled = unscaled_kn * w.scales.astype(jnp.float32)[:, None, :]
        return scaled.reshape(K, N).astype(w.dtype if dtype is None else dtype)


@jax.custom_vjp
def _look_up(book_cv: jax.Array, codes_jn: jax.Array) -> jax.Array:
    """Vectors [J, N, v] of the codes, whose gradient has the same bits every time."""
    return book_cv[codes_jn]


def _look_up_forward(book_cv: jax.Array, codes_jn: jax.Array):
    return book_cv[codes_jn], (codes_jn, book_cv.shape[0])


def _look_up_backward(residuals: tuple[jax.Array, int], dvectors_jnv: jax.Array):
    codes_jn, size = residuals
    v = dvectors_jnv.shape[-1]
    dbook_cv = jax.lax.platform_dependent(
        codes_jn.reshape(-1),
        dvectors_jnv.reshape(-1, v),
        cuda=functools.partial(_sum_sorted, size=size),
        default=functools.partial(_sum_in_order, size=size),
    )
    return dbook_cv, np.zeros(codes_jn.shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _sum_in_order(codes: jax.Array, vectors: jax.Array, *, size: int) -> jax.Array:
    """Sums [size, v] of the vectors of each code."""
    return jnp.zeros((size, vectors.shape[-1]), vectors.dtype).at[codes].add(vectors)


def _sum_sorted(codes: jax.Array, vectors: jax.Array, *, size: int) -> jax.Array:
    """The same without the atomics of a scatter on a GPU, which add in any order."""
    order = jnp.argsort(codes, stable=True)
    sums = jnp.cumsum(vectors[order], axis=0)
    ends = jnp.searchsorted(codes[order], jnp.arange(size, dtype=codes.dtype), side="right")
    at_ends = jnp.where((ends > 0)[:, None], sums[ends - 1], 0)
    return jnp.diff(at_ends, axis=0, prepend=0)


@functools.partial(jax.jit, static_argnames=("spec", "K", "N", "dtype"))
def random_codebook_tensor(
    key: jax.Array, spec: CodebookSpec, K: int, N: int, dtype: jnp.dtype = jnp.bfloat16
) -> CodebookTensor:
    """A random tensor [K, N] of unit-variance weights times 1/sqrt(K), for tests and benchmarks."""
    spec.check_shape(K, N)
    m, v, b = spec.num_codebooks, spec.vector_length, spec.bits
    codes_key, books_key, scales_key = jax.random.split(key, 3)
    codes = jax.random.bits(codes_key, (m, K // v * b // WORD_BITS, N), jnp.uint32)
    codebooks = jax.random.normal(books_key, (m, spec.codebook_size, v)) / np.sqrt(m)
    scales = jax.random.uniform(scales_key, (K // spec.group_size, N), minval=0.5, maxval=1.5)
    return CodebookTensor(codes, codebooks.astype(dtype), (scales / np.sqrt(K)).astype(dtype))
