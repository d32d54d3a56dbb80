"""Codes chosen anew at given codebooks and scales, one after the other, for least activation error.

Minimises sum_n dW[:, n]^T H dW[:, n] over the codes, where dW = W - W' and H = X^T X / tokens is
the Hessian of a linear's input. F = H dW is kept up to date, so that a candidate costs one product
with its centroid: with codebook c at position j left out, u = F_j + s H_jj C_old, code i adds

    s^2 C_i^T H_jj C_i - 2 s C_i . u

to the objective. Columns n do not depend on each other and go side by side.

Letters: W [K, N]; m codebooks of S = 2**b centroids, v weights a code, g weights a scale;
J = K // v code positions, h hypotheses a column, n columns of a tile, B positions of a block.
Source: AQLM (arXiv 2401.06118) section 3.2, phase 1, for the search; GPTQ (arXiv 2210.17323)
section 3.3, step 2, for the lazy updates: within a block at once, beyond it as one product.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxcodec.spec import CodebookSpec

# Weights of a block: GPTQ's 128. The update beyond it is then bound by arithmetic, not by memory.
BLOCK = 128
# Scores of all candidates that are held at once: 256 MiB of float32.
SCORES = 2**26
# Products are float32 throughout: the gain of a code is a small difference of large sums.
PRECISION = "highest"


@functools.partial(jax.jit, static_argnames=("spec", "beam"))
def beam_search(
    W: jax.Array,
    H: jax.Array,
    codes_mjn: jax.Array,
    books: jax.Array,
    scales_gn: jax.Array,
    key: jax.Array,
    spec: CodebookSpec,
    beam: int = 1,
) -> jax.Array:
    """The codes after one pass over all positions, in a random order; the objective never rises.

    At a position the codebooks have their turns from the last to the first.
    A column starts from one hypothesis, its codes; the `beam` best live on from code to code
    within a block of positions, and the best one alone leaves it. With `beam` 1 the search is
    coordinate descent.

    Args:
      W: f32 [K, N].
      H: f32 [K, K], symmetric and positive semi-definite.
      codes_mjn: int32 [m, J, N], the codes to start from.
      books: f32 [m, S, v].
      scales_gn: f32 [K // g, N].
      key: PRNG key of the order of the positions.
      beam: hypotheses a column.

    Returns:
      int32 [m, J, N].
    """
    (K, N), v = W.shape, spec.vector_length
    J = K // v
    order = jax.random.permutation(key, J)
    H = H.reshape(J, v, J, v)[order][:, :, order].reshape(K, K)
    scales_jn = jnp.repeat(scales_gn, spec.group_size // v, axis=0)[order]
    columns = (W.reshape(J, v, N)[order].reshape(K, N), codes_mjn[:, order], scales_jn)
    with jax.named_scope("beam_search"):
        tiles = -(-N * beam * spec.codebook_size // SCORES)
        search = functools.partial(_search, H, books, beam=beam)
        codes_mjn = _in_tiles(search, columns, tiles)
    return codes_mjn[:, jnp.argsort(order)]


def positions_in_block(J: int, v: int) -> int:
    """The largest divisor of J positions whose weights are at most a block."""
    return max(B for B in range(1, max(BLOCK // v, 1) + 1) if J % B == 0)


def _in_tiles(search, columns: tuple[jax.Array, ...], tiles: int) -> jax.Array:
    """search(*columns) along their last axis, a tile of it at a time."""
    N = columns[0].shape[-1]
    n = -(-N // tiles)

    def split(x: jax.Array) -> jax.Array:
        # A tile takes every tiles-th column, so that columns spread over devices stay there.
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * tiles - N)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], n, tiles), -1, 0)

    found = jax.lax.map(lambda tile: search(*tile), jax.tree.map(split, columns))
    return jnp.moveaxis(found, 0, -1).reshape(*found.shape[1:-1], n * tiles)[..., :N]


def _search(
    H: jax.Array,
    books: jax.Array,
    W: jax.Array,
    codes_mjn: jax.Array,
    scales_jn: jax.Array,
    beam: int,
) -> jax.Array:
    """One pass over the positions from first to last."""
    (_, J, n), v = codes_mjn.shape, books.shape[-1]
    B = positions_in_block(J, v)
    H_jvk = H.reshape(J, v, J * v)
    dW = W - _decode(codes_mjn, books, scales_jn).reshape(W.shape)
    F_jvn = jnp.dot(H, dW, precision=PRECISION).reshape(J, v, n)

    def block(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes_mjn, F_jvn = state
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * B, slice_size=B)
        H_bvk, scales_bn, codes_mbn = cut(H_jvk), cut(scales_jn), cut(codes_mjn, axis=1)
        H_bvbv = cut(H_bvk.reshape(B, v, J, v), axis=2)
        found_mbn = _search_block(H_bvbv, books, codes_mbn, scales_bn, cut(F_jvn), beam)
        change = _decode(found_mbn, books, scales_bn) - _decode(codes_mbn, books, scales_bn)
        F_jvn -= jnp.einsum("bvk,bvn->kn", H_bvk, change, precision=PRECISION).reshape(F_jvn.shape)
        codes_mjn = jax.lax.dynamic_update_slice_in_dim(codes_mjn, found_mbn, i * B, axis=1)
        return codes_mjn, F_jvn

    return jax.lax.fori_loop(0, J // B, block, (codes_mjn, F_jvn))[0]


def _search_block(
    H_bvbv: jax.Array,
    books: jax.Array,
    codes_mbn: jax.Array,
    scales_bn: jax.Array,
    F_bvn: jax.Array,
    beam: int,
) -> jax.Array:
    """Codes of a block [m, B, n], given F there; H [B, v, B, v] is that of the block's weights."""
    (m, B, n), h = codes_mbn.shape, beam

    def choose(i: jax.Array, state):
        added_hn, codes_mbhn, F_bvhn = state
        # The last codebook first: 2 to 6 % less error after four rounds than the first one first,
        # less on larger matrices (docs/experiments.md).
        p, c = i // m, m - 1 - i % m
        H_vv, book, s = H_bvbv[p, :, p], books[c], scales_bn[p][None, None, :]
        old_hn = codes_mbhn[c, p]
        F_vhn = F_bvhn[p]
        gain_shn = _gain(F_vhn, H_vv, book, old_hn, s)
        added_hn, picked_hn = _least(added_hn[None] + gain_shn, h)
        code_hn, parent_hn = picked_hn // h, picked_hn % h
        if h > 1:
            old_hn, codes_mbhn, F_bvhn = (
                _of_parents(x, parent_hn) for x in (old_hn, codes_mbhn, F_bvhn)
            )
        dw_vhn = s * jnp.moveaxis(book[code_hn] - book[old_hn], -1, 0)
        F_bvhn -= jnp.einsum("bvw,whn->bvhn", H_bvbv[:, :, p], dw_vhn, precision=PRECISION)
        return added_hn, codes_mbhn.at[c, p].set(code_hn), F_bvhn

    # All hypotheses are the same one at first: the others must not be picked.
    added_hn = jnp.where(jnp.arange(h)[:, None] > 0, jnp.inf, jnp.zeros((h, n)))
    start = (added_hn, _copies(codes_mbn, h), _copies(F_bvn, h))
    _, codes_mbhn, _ = jax.lax.fori_loop(0, B * m, choose, start)
    return codes_mbhn[:, :, 0]


def _gain(
    F_vhn: jax.Array, H_vv: jax.Array, book: jax.Array, old_hn: jax.Array, s: jax.Array
) -> jax.Array:
    """What each code adds to the objective in place of the old one, [S, h, n]; 0 for that."""
    Hbook = jnp.dot(book, H_vv, precision=PRECISION)
    norms_s = jnp.sum(Hbook * book, axis=1)
    u_vhn = F_vhn + s * jnp.moveaxis(Hbook[old_hn], -1, 0)
    dots_shn = jnp.einsum("sv,vhn->shn", book, u_vhn, precision=PRECISION)
    score_shn = jnp.square(s) * norms_s[:, None, None] - 2 * s * dots_shn
    # Of the old code: -s^2 C^T H C - 2 s C . F once u is written out.
    C_vhn = jnp.moveaxis(book[old_hn], -1, 0)
    score_hn = -jnp.square(s[0]) * norms_s[old_hn] - 2 * s[0] * jnp.sum(C_vhn * F_vhn, axis=0)
    is_old = jnp.arange(book.shape[0])[:, None, None] == old_hn[None]
    return jnp.where(is_old, 0.0, score_shn - score_hn[None])


def _least(total_shn: jax.Array, h: int) -> tuple[jax.Array, jax.Array]:
    """The h least of each column [h, n], least first, and their places in [S * h]."""
    flat = total_shn.reshape(-1, total_shn.shape[-1])
    place = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    values, places = [], []
    for _ in range(h):
        # One reduction for both: XLA may round what it fuses into a second one differently.
        where = jnp.argmin(flat, axis=0)[None].astype(jnp.int32)
        values.append(jnp.take_along_axis(flat, where, axis=0)[0])
        places.append(where[0])
        flat = jnp.where(place == where, math.inf, flat)
    return jnp.stack(values), jnp.stack(places)


def _of_parents(x: jax.Array, parent_hn: jax.Array) -> jax.Array:
    """x [..., h, n] of the hypotheses that the new ones came from."""
    parent = parent_hn.reshape((1,) * (x.ndim - 2) + parent_hn.shape)
    return jnp.take_along_axis(x, parent, axis=-2)


def _copies(x: jax.Array, h: int) -> jax.Array:
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], h, x.shape[-1]))


def _decode(codes_mjn: jax.Array, books: jax.Array, scales_jn: jax.Array) -> jax.Array:
    """W' [J, v, n]."""
    vectors_jnv = sum(book[codes] for book, codes in zip(books, codes_mjn, strict=True))
    return jnp.moveaxis(vectors_jnv, -1, 1) * scales_jn[:, None, :]
