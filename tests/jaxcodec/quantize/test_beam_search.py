"""The search over codes is the one by brute force, only ever improves, and knows no tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.pack import pack_codes
from jaxcodec.quantize import beam_search as module
from jaxcodec.quantize.beam_search import beam_search, positions_in_block
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize

K, N = 64, 5
SPECS = ["m1v4b2g64", "m2v4b2g32", "m3v2b2g8"]


def problem(text: str, columns: int = N):
    """W, H of correlated inputs, and codes, books and scales that have little to do with W."""
    spec = CodebookSpec.parse(text)
    m, v = spec.num_codebooks, spec.vector_length
    keys = jax.random.split(jax.random.key(3), 5)
    X = jax.random.normal(keys[0], (4 * K, K)) @ jax.random.normal(keys[1], (K, K)) / K**0.5
    W = jax.random.normal(keys[2], (K, columns))
    codes = jax.random.randint(keys[3], (m, K // v, columns), 0, spec.codebook_size)
    books = jax.random.normal(keys[4], (m, spec.codebook_size, v)) / m**0.5
    scales = jnp.full((K // spec.group_size, columns), 0.9) + 0.1 * W[: K // spec.group_size]
    return spec, (W, X.T @ X / len(X), codes, books, scales)


def objective(W, H, codes, books, scales, spec: CodebookSpec) -> np.ndarray:
    """dW^T H dW of each column, in float64, through the format's own definition."""
    w = CodebookTensor(pack_codes(jnp.asarray(codes), spec.bits), books, scales)
    dW = np.asarray(W, np.float64) - np.asarray(dequantize(w), np.float64)
    return np.einsum("kn,kl,ln->n", dW, np.asarray(H, np.float64), dW)


def by_brute_force(arguments, key: jax.Array, spec: CodebookSpec, beam: int) -> np.ndarray:
    """Every candidate of every hypothesis gets its whole objective; one column at a time."""
    W, H, codes, books, scales = (np.asarray(x, np.float64) for x in arguments)
    m, v, S = spec.num_codebooks, spec.vector_length, spec.codebook_size
    J, B = K // v, positions_in_block(K // v, v)
    order = np.asarray(jax.random.permutation(key, J))
    found = np.array(codes, np.int32)

    def error(w: np.ndarray, s: np.ndarray, column: np.ndarray) -> float:
        vectors = sum(books[c][column[c]] for c in range(m))
        dw = w - vectors.reshape(-1) * np.repeat(s, spec.group_size)
        return dw @ H @ dw

    for n in range(W.shape[1]):
        best = found[:, :, n]
        for begin in range(0, J, B):
            hypotheses = [best]
            for j in order[begin : begin + B]:
                for c in reversed(range(m)):
                    candidates = []
                    for hypothesis in hypotheses:
                        for i in range(S):
                            candidate = hypothesis.copy()
                            candidate[c, j] = i
                            candidates.append(candidate)
                    candidates.sort(key=lambda x: error(W[:, n], scales[:, n], x))
                    hypotheses = candidates[:beam]
            best = hypotheses[0]
        found[:, :, n] = best
    return found


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("text", SPECS)
def test_it_finds_what_brute_force_finds(text: str, beam: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)  # several blocks
    spec, arguments = problem(text)
    key = jax.random.key(7)
    beam_search.clear_cache()
    found = beam_search(*arguments, key, spec, beam)
    expected = by_brute_force(arguments, key, spec, beam)
    beam_search.clear_cache()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("text", SPECS)
def test_no_column_ever_gets_worse_until_none_gets_better(text: str, beam: int) -> None:
    spec, (W, H, codes, books, scales) = problem(text)
    errors = [objective(W, H, codes, books, scales, spec)]
    for i in range(12):
        codes = beam_search(W, H, codes, books, scales, jax.random.key(i), spec, beam)
        errors.append(objective(W, H, codes, books, scales, spec))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert (errors[-1] < 0.5 * errors[0]).all()


def test_with_inputs_alike_one_codebook_takes_the_nearest_centroids() -> None:
    """H = I and m = 1: nothing depends on anything else, so one pass ends at the optimum."""
    spec, (W, _, codes, books, scales) = problem("m1v4b2g64")
    found = beam_search(W, jnp.eye(K), codes, books, scales, jax.random.key(0), spec)
    points = W.reshape(K // 4, 4, N).transpose(0, 2, 1)
    far = jnp.square(points[:, :, None] - scales[0][None, :, None, None] * books[0][None, None])
    np.testing.assert_array_equal(found[0], jnp.argmin(far.sum(-1), axis=-1))


@pytest.mark.parametrize("beam", [1, 3])
def test_what_the_codes_hold_exactly_is_left_alone(beam: int) -> None:
    spec, (_, H, codes, books, scales) = problem("m2v4b2g32")
    W = dequantize(CodebookTensor(pack_codes(codes, spec.bits), books, scales))
    found = beam_search(W, H, codes, books, scales, jax.random.key(0), spec, beam)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("beam", [1, 3])
def test_tiles_of_columns_change_nothing(beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, arguments = problem("m2v4b2g32", columns=11)
    whole = beam_search(*arguments, jax.random.key(1), spec, beam)
    monkeypatch.setattr(module, "SCORES", 4 * beam * spec.codebook_size)  # 4, 4 and 3 columns
    beam_search.clear_cache()
    tiled = beam_search(*arguments, jax.random.key(1), spec, beam)
    beam_search.clear_cache()
    np.testing.assert_array_equal(tiled, whole)


def test_columns_may_lie_on_several_devices() -> None:
    spec, (W, H, codes, books, scales) = problem("m2v4b2g32", columns=16)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = [
        jax.device_put(
            x,
            jax.sharding.NamedSharding(
                mesh, jax.sharding.PartitionSpec(*[None] * (x.ndim - 1), "data")
            ),
        )
        for x in (W, codes, scales)
    ]
    key = jax.random.key(1)
    found = beam_search(spread[0], H, spread[1], books, spread[2], key, spec, 2)
    assert found.sharding.shard_shape(found.shape)[2] == 4
    np.testing.assert_array_equal(found, beam_search(W, H, codes, books, scales, key, spec, 2))
