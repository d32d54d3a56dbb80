"""What is measured, the operands it is measured on, and the answers that judge it.

Letters: M rows, K input and N output features, m codebooks, b bits a code, v weights a code.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.pallas_kernels.matmul import choose, codebook_matmul, codebook_matmuls
from jaxcodec.pallas_kernels.reference import reference
from jaxcodec.spec import WORD_BITS, CodebookSpec
from jaxcodec.tensor import CodebookTensor, random_codebook_tensor

DENSE = "bf16"  # the format of a weight that is not quantized
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)
FOOTPRINT = 300e6  # bytes of weights in rotation: six times the 50 MB L2 of an H100
MAX_COPIES = 320  # the smallest weight here, 1.1 MB, then still exceeds the footprint
# Rows (in order) and columns compared: at both ends, where tiles end, and some in between.
SAMPLED_ROWS = (*range(9), 15, 16, 31, 33, 63, 64, 100, 127, 300, 511, 512, 777, 1023, 2500, 4095)
EDGE_COLUMNS, RANDOM_COLUMNS = 64, 128

# Weights of one x: codebook tensors or dense arrays [K, N_i].
Weights = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class CaseKey:
    """Weights that belong to one x, and x's dtype; the fields are those of `Item`."""

    spec: str
    K: int
    Ns: tuple[int, ...]
    x: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
      kernel: name of the kernel, as the rows of the results spell it.
      spec: `m2v8g128`, or `bf16` for a dense weight.
      M: rows of x.
      K: input features.
      Ns: output features of each weight; more than one where a launch serves several.
      x: dtype of x.
    """

    kernel: str
    spec: str
    M: int
    K: int
    Ns: tuple[int, ...]
    x: str = "bfloat16"

    @property
    def case(self) -> CaseKey:
        """What it is measured on."""
        return CaseKey(self.spec, self.K, self.Ns, self.x)

    @property
    def N(self) -> int:
        """Output features of all weights."""
        return sum(self.Ns)


@dataclasses.dataclass(frozen=True)
class Case:
    """The weights of one format and shape, in rotation, with the answers for the first of them.

    Attributes:
      copies: weights, each a tuple with one for each N.
      columns: indices of the columns that are compared with float64, in all N's one after another.
      sampled: float64 [len(SAMPLED_ROWS), len(columns)].
      whole: float32 [len(SAMPLED_ROWS), N].
    """

    copies: list[Weights]
    columns: np.ndarray
    sampled: np.ndarray
    whole: jax.Array


@functools.cache
def host_rows(K: int, dtype: str) -> np.ndarray:
    """Random x [max(ROWS), K] of `dtype`, in host memory."""
    x = np.random.default_rng(K).standard_normal((max(ROWS), K), np.float32)
    return x.astype(jnp.dtype(dtype))


@functools.lru_cache(maxsize=32)
def device_rows(M: int, K: int, dtype: str) -> jax.Array:
    """The first M of `host_rows`, on the device."""
    return jax.device_put(host_rows(K, dtype)[:M])


def make_weights(case: CaseKey) -> Callable[[jax.Array], Weights]:
    """A function of a random key that makes the weights of a case: N_i of them, or one dense."""
    K, Ns = case.K, case.Ns

    def dense(key: jax.Array) -> Weights:
        return (jax.random.normal(key, (K, sum(Ns)), jnp.bfloat16) / K**0.5,)

    def codebooks(key: jax.Array) -> Weights:
        keys, spec = jax.random.split(key, len(Ns)), CodebookSpec.parse(case.spec)
        return tuple(random_codebook_tensor(k, spec, K, N) for k, N in zip(keys, Ns, strict=True))

    return dense if case.spec == DENSE else codebooks


def exact_rows(x: jax.Array, weights: Weights) -> jax.Array:
    """x [R, K] times all weights, in float32 throughout; float32 [R, N]."""
    x = x.astype(jnp.float32)
    if isinstance(weights[0], CodebookTensor):
        return jnp.concatenate([reference(x, w) for w in weights], axis=1)
    return jnp.dot(x, weights[0].astype(jnp.float32), precision="highest")


def make_case(
    key: CaseKey,
    make: Callable[[jax.Array], Weights],
    multiply: Callable[[jax.Array, Weights], jax.Array],
) -> Case:
    """Weights in rotation and answers, by the compiled `make_weights` and `exact_rows`."""
    first = make(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    copies = int(np.clip(np.ceil(FOOTPRINT / size), 2, MAX_COPIES))
    weights = [first, *(make(jax.random.key(i)) for i in range(1, copies))]
    jax.block_until_ready(weights)  # lest the clock sees how they are made
    N = sum(key.Ns)
    edges = np.r_[:EDGE_COLUMNS, N - EDGE_COLUMNS : N]
    columns = np.r_[edges, np.random.default_rng(0).integers(0, N, RANDOM_COLUMNS)]
    rows = host_rows(key.K, key.x)[list(SAMPLED_ROWS)]
    sampled = rows.astype(np.float64) @ float64_columns(first, columns)
    return Case(weights, columns, sampled, multiply(jax.device_put(rows), first))


def float64_columns(weights: Weights, columns: np.ndarray) -> np.ndarray:
    """Columns of what the weights stand for, side by side; [K, len(columns)], in numpy."""
    found, start = [], 0
    chosen = np.sort(columns)
    for w in weights:
        N = w.shape[1]
        inside = chosen[(chosen >= start) & (chosen < start + N)] - start
        found.append(_float64_columns(w, inside))
        start += N
    order = np.argsort(np.argsort(columns, kind="stable"), kind="stable")
    return np.concatenate(found, axis=1)[:, order]


def _float64_columns(w: Any, columns: np.ndarray) -> np.ndarray:
    if not isinstance(w, CodebookTensor):
        return np.asarray(w)[:, columns].astype(np.float64)
    codes = np.asarray(w.codes)[:, :, columns]
    books, scales = np.asarray(w.codebooks, np.float64), np.asarray(w.scales)[:, columns]
    m, size, _ = books.shape
    bits = size.bit_length() - 1
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)[:, None]
    fields = codes[:, :, None, :] >> shifts & np.uint32(size - 1)
    fields_mjn = fields.reshape(m, -1, len(columns))
    vectors_jnv = np.sum([books[c][fields_mjn[c]] for c in range(m)], axis=0)
    weight = vectors_jnv.transpose(0, 2, 1).reshape(-1, len(columns))
    return weight * np.repeat(scales.astype(np.float64), w.shape[0] // scales.shape[0], axis=0)


def implementation(item: Item) -> str:
    """The kernel that an item runs: its own, or what the public operation picks."""
    if not item.kernel.startswith("codebook_matmul"):
        return item.kernel
    spec = CodebookSpec.parse(item.spec)
    return choose(item.M, item.K, list(item.Ns), spec, jnp.dtype(item.x))


def multiplication(kernel: str, dtype: jnp.dtype | None) -> Callable[[jax.Array, Weights], tuple]:
    """The function x [M, K], weights -> results [M, N_i] in `dtype` that a kernel's name means."""
    if kernel == "dense_bf16":
        return lambda x, weights: (jnp.dot(x, weights[0], preferred_element_type=dtype),)
    if kernel == "codebook_matmul_group":
        return lambda x, weights: codebook_matmuls(x, weights, preferred_element_type=dtype)
    name = None if kernel == "codebook_matmul" else kernel
    return lambda x, weights: (
        codebook_matmul(x, weights[0], implementation=name, preferred_element_type=dtype),
    )


def errors(
    kernel: str, M: int, x: jax.Array, weights: Weights, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Relative error of a kernel's float32 result over all columns, and its sampled rows."""
    rows = [row for row in SAMPLED_ROWS if row < M]
    ys = multiplication(kernel, jnp.dtype(jnp.float32))(x, weights)
    y = jnp.concatenate([y[np.array(rows)] for y in ys], axis=1).astype(jnp.float32)
    wanted = wanted[: len(rows)]
    return jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted), y


def relative(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error in the Frobenius norm."""
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))
