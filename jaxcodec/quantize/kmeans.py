"""Codebooks of one matrix without data: residual k-means, then alternating least squares.

Minimises sum_kn (W[k, n] - s[k // g, n] * sum_c C_c[code(c, k // v, n), k % v])^2 over the codes,
the codebooks C_c and the scales s. Every reduction runs in a fixed order: the same key gives the
same bits on the same device.

Letters: W [K, N]; m codebooks of S = 2**b centroids, v weights a code, g weights a scale;
J = K // v code positions, G = K // g groups, P = J * N points (vectors of v weights).
Source: AQLM (arXiv 2401.06118) section 3.1 for residual k-means; CodeGEMM (arXiv 2512.17970) for
the L2 norm of a group as its scale.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcodec.pack import pack_codes
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize

# AQLM's limit of Lloyd iterations a codebook; the tolerance stops most runs earlier.
ITERATIONS = 100
# Stop once an iteration lowers the squared error by less than this fraction of it.
TOLERANCE = 1e-4
# Rounds of refining one codebook after the other, then the scales, on all points.
ROUNDS = 10
# Lloyd iterations look at this many points a centroid: beyond it the centroids barely move.
POINTS_PER_CENTROID = 256
# Points compared with all centroids at once: the distances to 256 centroids then stay in a CPU's
# cache (7 times faster than 65,536 points at once), and those to 65,536 centroids take 1 GiB.
CHUNK = 4096


def quantize_kmeans(
    W: jax.Array,
    spec: CodebookSpec,
    key: jax.Array,
    iterations: int = ITERATIONS,
    rounds: int = ROUNDS,
    dtype: jnp.dtype = jnp.bfloat16,
) -> CodebookTensor:
    """The matrix W [K, N] as codes, codebooks and scales, as close as k-means brings it.

    Args:
      W: any float dtype; the arithmetic is float32.
      spec: the format.
      key: PRNG key of the random choices, which are the first centroids and the sample of points.
      iterations: most Lloyd iterations for each of the m codebooks.
      rounds: rounds of refinement over all codebooks and scales; 0 for plain residual k-means.
      dtype: of codebooks and scales.

    Raises:
      ValueError: W is not a matrix of floats that `spec` can hold, or has a value that is not
        finite or that `dtype` cannot hold.
    """
    W = jnp.asarray(W)
    if W.ndim != 2 or not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W must be a float matrix [K, N], got {W.dtype} {list(W.shape)}.")
    spec.check_shape(*W.shape)
    check_finite(W, "W")
    largest, limit = float(jnp.max(_norms(W, spec.group_size))), float(jnp.finfo(dtype).max)
    if not largest <= limit:
        raise ValueError(
            f"A group of W has the norm {largest:.3g}, its scale, which {jnp.dtype(dtype).name} "
            f"(up to {limit:.3g}) cannot hold."
        )
    codes_mjn, books, scales_gn = _fit(W, key, spec, iterations, rounds, jnp.dtype(dtype))
    return CodebookTensor(pack_codes(codes_mjn, spec.bits), books, scales_gn).check("W")


def check_finite(W: jax.Array, name: str) -> None:
    """Refuse a weight that holds what is no number.

    Raises:
      ValueError: as said, with the name.
    """
    if bad := int(_count_not_finite(W)):
        raise ValueError(
            f"{name} holds {bad} values that are NaN or infinite; quantize finite weights."
        )


@jax.jit
def _count_not_finite(W: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(W))


def relative_error(W: jax.Array, w: CodebookTensor) -> float:
    """||W - dequantize(w)|| / ||W||, Frobenius norms in float32; 0 where both are zero."""
    if W.shape != w.shape:
        raise ValueError(f"W is {list(W.shape)}, the codebook tensor {list(w.shape)}.")
    return float(_relative_error(W, w))


@jax.jit
def _relative_error(W: jax.Array, w: CodebookTensor) -> jax.Array:
    W = W.astype(jnp.float32)
    norm = jnp.linalg.norm(W)
    error = jnp.linalg.norm(W - dequantize(w, jnp.float32))
    return jnp.where(error > 0, error / norm, 0.0)


@functools.partial(jax.jit, static_argnames=("spec", "iterations", "rounds", "dtype"))
def _fit(
    W: jax.Array,
    key: jax.Array,
    spec: CodebookSpec,
    iterations: int,
    rounds: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    W = W.astype(jnp.float32)
    m, N = spec.num_codebooks, W.shape[1]
    scales_gn = stored(_norms(W, spec.group_size), dtype)
    points, weights = _points(W, scales_gn, spec)
    codes, books = [], []
    rest = points
    for c in range(m):
        with jax.named_scope(f"kmeans{c}"):
            key_c = jax.random.fold_in(key, c)
            book = _lloyd(rest, weights, key_c, spec.codebook_size, iterations)
            books.append(stored(book, dtype))
            codes.append(_step(rest, weights, books[c])[0])
            rest = rest - books[c][codes[c]]

    def refine(_, state):
        codes, books, scales_gn = list(state[0]), list(state[1]), state[2]
        points, weights = _points(W, scales_gn, spec)
        for c in range(m):
            rest = points - _decode(codes, books, without=c)
            codes[c], sums, mass, _ = _step(rest, weights, books[c])
            books[c] = stored(_means(sums, mass, books[c]), dtype)
        scales_gn = _refit(W, _decode(codes, books), scales_gn, spec)
        return codes, books, stored(scales_gn, dtype)

    codes, books, scales_gn = jax.lax.fori_loop(0, rounds, refine, (codes, books, scales_gn))
    codes_mjn = jnp.stack(codes).reshape(m, -1, N)
    return codes_mjn, jnp.stack(books).astype(dtype), scales_gn.astype(dtype)


def _norms(W: jax.Array, g: int) -> jax.Array:
    """L2 norm of each group of g weights along K, [G, N]."""
    K, N = W.shape
    return jnp.linalg.norm(W.astype(jnp.float32).reshape(K // g, g, N), axis=1)


def stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The float32 value that `x` has once stored, so that later steps make up for the rounding."""
    # Not a cast there and back, which XLA may leave out.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _points(W: jax.Array, scales_gn: jax.Array, spec: CodebookSpec) -> tuple[jax.Array, jax.Array]:
    """Vectors of W / s [P, v], and what their squared errors weigh in that of W: s^2 [P]."""
    K, N = W.shape
    v, g = spec.vector_length, spec.group_size
    scales_jn = jnp.repeat(scales_gn, g // v, axis=0)
    # A group of zeros has scale 0: any code stands for it.
    inverse = jnp.where(scales_jn == 0, 0.0, 1 / jnp.where(scales_jn == 0, 1.0, scales_jn))
    points_jnv = W.reshape(K // v, v, N).transpose(0, 2, 1) * inverse[:, :, None]
    return points_jnv.reshape(-1, v), jnp.square(scales_jn).reshape(-1)


def _decode(
    codes: Sequence[jax.Array], books: Sequence[jax.Array], without: int | None = None
) -> jax.Array:
    """Sum of the chosen centroids [P, v] over all codebooks, or all but one."""
    total = jnp.zeros((codes[0].shape[0], books[0].shape[1]))
    for c, (code, book) in enumerate(zip(codes, books, strict=True)):
        if c != without:
            total += book[code]
    return total


def _refit(
    W: jax.Array, unscaled: jax.Array, scales_gn: jax.Array, spec: CodebookSpec
) -> jax.Array:
    """Scales [G, N] of least squared error for the unscaled vectors [P, v]: <W, Q> / <Q, Q>."""
    K, N = W.shape
    v, g = spec.vector_length, spec.group_size
    Q = unscaled.reshape(K // v, N, v).transpose(0, 2, 1).reshape(K // g, g, N)
    energy = jnp.sum(Q * Q, axis=1)
    best = jnp.sum(W.reshape(K // g, g, N) * Q, axis=1) / jnp.where(energy > 0, energy, 1.0)
    return jnp.where(energy > 0, best, scales_gn)


def _lloyd(
    points: jax.Array, weights: jax.Array, key: jax.Array, size: int, iterations: int
) -> jax.Array:
    """Centroids [size, v] of weighted points [P, v]; dead ones are moved to random points."""
    P = points.shape[0]
    sample = min(P, POINTS_PER_CENTROID * size)
    chosen = jax.random.choice(key, P, (sample,), replace=False)
    points, weights = points[chosen], weights[chosen]

    def unfinished(state):
        i, _, error, last = state
        return (i < iterations) & (error <= (1 - TOLERANCE) * last)

    def iterate(state):
        i, book, last, _ = state
        _, sums, mass, error = _step(points, weights, book)
        seeds = jax.random.randint(jax.random.fold_in(key, i), (size,), 0, sample)
        return i + 1, _means(sums, mass, points[seeds]), error, last

    # The sample is in random order: its first points are random centroids.
    first = points[jnp.arange(size) % sample]
    state = (jnp.int32(0), first, jnp.float32(jnp.finfo(jnp.float32).max), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, iterate, state)[1]


def _means(sums: jax.Array, mass: jax.Array, dead: jax.Array) -> jax.Array:
    """Centroids sums / mass [S, v]; the rows of `dead` where no point has chosen a centroid."""
    return jnp.where(mass > 0, sums / jnp.where(mass > 0, mass, 1.0), dead)


def _step(
    points: jax.Array, weights: jax.Array, book: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Give each point its nearest centroid, a chunk of points at a time.

    Returns codes [P], weighted sums of the points of each centroid [S, v], their weights [S, 1],
    and the weighted squared error.
    """
    (P, v), S = points.shape, book.shape[0]
    chunk = min(P, CHUNK)
    chunks = -(-P // chunk)
    pad = chunks * chunk - P  # points of weight 0
    points = jnp.pad(points, ((0, pad), (0, 0))).reshape(chunks, chunk, v)
    weights = jnp.pad(weights, (0, pad)).reshape(chunks, chunk, 1)

    def body(carry, chunk):
        x, weight = chunk
        code = _nearest(x, book)
        error = jnp.sum(weight * jnp.square(x - book[code]))
        weighted = weight * jnp.concatenate([x, jnp.ones_like(weight)], axis=1)
        return (carry[0] + _sums(weighted, code, S), carry[1] + error), code

    start = jnp.zeros((S, v + 1)), jnp.float32(0)
    (sums, error), codes = jax.lax.scan(body, start, (points, weights))
    return codes.reshape(-1)[:P], sums[:, :v], sums[:, v:], error


def _nearest(x: jax.Array, book: jax.Array) -> jax.Array:
    """int32 index of the centroid nearest to each point; the first of equals."""
    S = book.shape[0]
    # |x - c|^2 is least where x.c - |c|^2 / 2 is greatest.
    near = jnp.dot(x, book.T, precision="highest") - 0.5 * jnp.sum(book * book, axis=1)[None, :]
    # XLA's argmax runs one number at a time on a CPU; two float reductions are 7 times faster.
    best = jnp.max(near, axis=1, keepdims=True)
    index = jnp.arange(S, dtype=jnp.float32)[None, :]
    return jnp.min(jnp.where(near == best, index, float(S - 1)), axis=1).astype(jnp.int32)


def _sums(x: jax.Array, code: jax.Array, S: int) -> jax.Array:
    """Sum of the rows of x [P, V] that have each code, [S, V], always in the same order."""
    # A scatter is by far the faster on a CPU, and adds in any order on a GPU.
    return jax.lax.platform_dependent(
        x,
        code,
        cpu=functools.partial(jax.ops.segment_sum, num_segments=S),
        default=functools.partial(_sums_by_product, S=S),
    )


def _sums_by_product(x: jax.Array, code: jax.Array, S: int) -> jax.Array:
    one_hot = (code[:, None] == jnp.arange(S)[None, :]).astype(jnp.float32)
    return jnp.dot(one_hot.T, x, precision="highest")
