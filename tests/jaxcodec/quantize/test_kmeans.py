"""k-means comes as near as the format lets it, the same way every time, on awkward matrices too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.quantize import kmeans
from jaxcodec.quantize.kmeans import quantize_kmeans, relative_error
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize

K, N = 128, 256


@pytest.fixture(scope="module")
def W() -> jax.Array:
    """Gaussian, with a spread of sizes over the outputs as trained weights have."""
    W_key, size_key = jax.random.split(jax.random.key(1))
    sizes = jnp.exp(0.5 * jax.random.normal(size_key, (1, N)))
    return 0.02 * sizes * jax.random.normal(W_key, (K, N))


def quantize(W: jax.Array, text: str, seed: int = 0, **options):
    return quantize_kmeans(W, CodebookSpec.parse(text), jax.random.key(seed), **options)


# What these settings reach, and 2 % of leeway.
@pytest.mark.parametrize(
    ("text", "error"),
    [("m1v4g128", 0.279), ("m2v4b4g32", 0.327), ("m3v2b2g128", 0.217)],
)
def test_the_error_is_small_and_is_what_is_reported(W: jax.Array, text: str, error: float) -> None:
    w = quantize(W, text)
    assert str(w.spec) == text
    assert w.dtype == jnp.bfloat16
    by_hand = np.linalg.norm(np.asarray(dequantize(w, jnp.float32)) - W) / np.linalg.norm(W)
    assert relative_error(W, w) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand < error


def test_a_further_codebook_and_refinement_lower_the_error(W: jax.Array) -> None:
    one, two, refined = (
        relative_error(W, quantize(W, text, rounds=rounds))
        for text, rounds in (("m1v4b4g32", 0), ("m2v4b4g32", 0), ("m2v4b4g32", 10))
    )
    assert one > 1.5 * two
    assert two > 1.01 * refined


def test_one_key_gives_the_same_bits_and_another_does_not(W: jax.Array) -> None:
    first, again, other = (quantize(W, "m2v8b4g128", seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.codes, other.codes)


def test_a_matrix_times_a_power_of_two_has_the_same_codes(W: jax.Array) -> None:
    w, larger = quantize(W, "m2v8b4g128"), quantize(64 * W, "m2v8b4g128")
    np.testing.assert_array_equal(larger.codes, w.codes)
    np.testing.assert_array_equal(larger.codebooks, w.codebooks)
    np.testing.assert_array_equal(larger.scales, 64 * w.scales)


def test_the_size_of_a_chunk_of_points_changes_nothing_but_rounding(
    W: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(W, "m1v4b4g128", iterations=5)
    monkeypatch.setattr(kmeans, "CHUNK", 1000)  # leaves a remainder
    kmeans._fit.clear_cache()
    chunked = quantize(W, "m1v4b4g128", iterations=5)
    kmeans._fit.clear_cache()
    assert relative_error(W, chunked) == pytest.approx(relative_error(W, whole), rel=1e-3)


def test_sums_are_the_same_on_a_cpu_and_on_a_gpu() -> None:
    x = jax.random.normal(jax.random.key(6), (500, 3))
    code = jax.random.randint(jax.random.key(7), (500,), 0, 16)
    np.testing.assert_allclose(
        kmeans._sums_by_product(x, code, 16), kmeans._sums(x, code, 16), rtol=1e-4, atol=1e-5
    )


def test_it_lowers_for_cuda() -> None:
    exported = jax.export.export(kmeans._fit, platforms=["cuda"])(
        jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16),
        jax.eval_shape(lambda: jax.random.key(0)),
        CodebookSpec.parse("m2v8g128"),
        kmeans.ITERATIONS,
        kmeans.ROUNDS,
        jnp.dtype(jnp.bfloat16),
    )
    # Sums must not be scattered there: a GPU adds those in any order.
    assert "stablehlo.scatter" not in exported.mlir_module()


def test_groups_and_whole_matrices_of_zeros_stay_zero(W: jax.Array) -> None:
    W = W.at[:32, :7].set(0)
    w = quantize(W, "m2v4b4g32")
    np.testing.assert_array_equal(dequantize(w)[:32, :7], 0)
    nothing = jnp.zeros((64, 8))
    assert relative_error(nothing, quantize(nothing, "m2v4b4g32")) == 0


def test_dead_centroids_come_back_to_life() -> None:
    """Most points are alike, so that random first centroids nearly all coincide and die."""
    key = jax.random.key(4)
    W = jnp.ones((64, 512)).at[:, :32].set(jax.random.normal(key, (64, 32)))
    w = quantize(W, "m1v4b4g64", dtype=jnp.float32)
    assert len(np.unique(np.asarray(w.codebooks[0]), axis=0)) == 16


def test_fewer_points_than_centroids_are_held_exactly() -> None:
    W = jax.random.normal(jax.random.key(5), (32, 4))
    assert relative_error(W, quantize(W, "m1v4g32", dtype=jnp.float32)) < 1e-5


def test_sixteen_bit_codes(W: jax.Array) -> None:
    w = quantize(W[:32, :32], "m1v2b16g32", iterations=2, rounds=1)
    assert w.codebooks.shape == (1, 65536, 2)
    assert relative_error(W[:32, :32], w) < 0.01


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weights_may_be_half_precision(W: jax.Array, dtype: jnp.dtype) -> None:
    w = quantize(W.astype(dtype), "m1v4b4g128", dtype=dtype)
    assert w.dtype == dtype
    assert relative_error(W, w) < 0.6


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_weights_that_are_not_finite_are_refused(W: jax.Array, value: float) -> None:
    with pytest.raises(ValueError, match="W holds 2 values that are NaN or infinite"):
        quantize(W.at[3, 4:6].set(value), "m1v4g128")


def test_scales_beyond_their_dtype_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"norm 8e\+05, its scale, which float16 \(up to 6.55e\+04\) cannot"
    ):
        quantize(jnp.full((64, 4), 1e5), "m1v4b2g64", dtype=jnp.float16)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((128,), jnp.float32, r"matrix \[K, N\], got float32 \[128\]"),
        ((128, 8), jnp.int32, r"matrix \[K, N\], got int32"),
        ((96, 8), jnp.float32, "K = 96 is not a multiple of g = 128"),
    ],
)
def test_what_is_no_matrix_for_the_spec_is_refused(shape, dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(jnp.zeros(shape, dtype), "m1v4g128")


def test_shapes_that_differ_have_no_error(W: jax.Array) -> None:
    w = quantize(W[:, :8], "m1v4b2g128")
    with pytest.raises(ValueError, match=r"W is \[128, 256\], the codebook tensor \[128, 8\]"):
        relative_error(W, w)
