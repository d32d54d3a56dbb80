"""Every stage brings the outputs nearer, the same way every time, for any H of any inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.quantize.additive import (
    PRESETS,
    AdditiveOptions,
    damped,
    fit_floats,
    objective,
    quantize_additive,
    refine,
)
from jaxcodec.quantize.kmeans import quantize_kmeans
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize, random_codebook_tensor

K, N = 64, 48
SPEC = CodebookSpec.parse("m2v8b4g32")
KEY = jax.random.key(5)
OPTIONS = AdditiveOptions(iterations=10, refinements=2, rounds=3, steps=20)


def hessian(tokens: int) -> jax.Array:
    """Of inputs that are correlated and of different sizes."""
    sizes_key, mix_key, key = jax.random.split(jax.random.key(1), 3)
    sizes = jnp.exp(0.5 * jax.random.normal(sizes_key, (1, K)))
    X = jax.random.normal(key, (tokens, K)) @ jax.random.normal(mix_key, (K, K)) * sizes
    return X.T @ X / tokens


@pytest.fixture(scope="module")
def W() -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(2), (K, N))


@pytest.fixture(scope="module")
def H() -> jax.Array:
    return hessian(4 * K)


def relative(W: jax.Array, H: jax.Array, w: CodebookTensor) -> float:
    """tr(dW^T H dW) / tr(W^T H W) in float64."""
    W_, H_, Q = (np.asarray(x, np.float64) for x in (W, H, dequantize(w, jnp.float32)))
    dW = W_ - Q
    return np.trace(dW.T @ H_ @ dW) / np.trace(W_.T @ H_ @ W_)


@pytest.mark.parametrize(
    ("text", "beam"), [("m2v8b4g32", 1), ("m2v8b4g32", 2), ("m1v4b4g64", 1), ("m3v2b2g8", 1)]
)
def test_no_stage_is_worse_than_the_one_before(W, H, text: str, beam: int) -> None:
    options = dataclasses.replace(OPTIONS, beam=beam)
    w, stages = quantize_additive(W, H, CodebookSpec.parse(text), KEY, options, jnp.float32)
    errors = [stage.error for stage in stages]
    assert [stage.name for stage in stages[:3]] == ["kmeans", "adam", "beam_search"]
    assert (np.diff(errors) <= 1e-5 * errors[0]).all()
    assert errors[2] < 0.9 * errors[0]
    assert errors[-1] == pytest.approx(relative(W, damped(H, K, options.damping), w), rel=1e-3)


def test_rounding_to_half_precision_costs_next_to_nothing(W, H) -> None:
    w, stages = quantize_additive(W, H, SPEC, KEY, OPTIONS, jnp.bfloat16)
    assert w.dtype == jnp.bfloat16
    assert stages[-1].name == "rounded"
    assert stages[-1].error < 1.01 * stages[-2].error


def test_knowing_the_inputs_beats_not_knowing_them(W, H) -> None:
    blind, _ = quantize_additive(W, None, SPEC, KEY, OPTIONS)
    seeing, _ = quantize_additive(W, H, SPEC, KEY, OPTIONS)
    assert relative(W, H, seeing) < 0.8 * relative(W, H, blind)
    assert relative(W, jnp.eye(K), blind) < relative(W, jnp.eye(K), seeing)


def test_without_data_is_with_the_identity(W) -> None:
    options = dataclasses.replace(OPTIONS, damping=0.0)
    blind, stages = quantize_additive(W, None, SPEC, KEY, options)
    identity, _ = quantize_additive(W, jnp.eye(K), SPEC, KEY, options)
    jax.tree.map(np.testing.assert_array_equal, blind, identity)
    kmeans = quantize_kmeans(W, SPEC, jax.random.split(KEY)[0], 10, 2)
    assert stages[0].error == pytest.approx(relative(W, jnp.eye(K), kmeans), rel=1e-3)


def test_without_rounds_it_is_kmeans(W, H) -> None:
    options = dataclasses.replace(OPTIONS, rounds=0)
    w, stages = quantize_additive(W, H, SPEC, KEY, options)
    kmeans = quantize_kmeans(W, SPEC, jax.random.split(KEY)[0], 10, 2)
    jax.tree.map(np.testing.assert_array_equal, w, kmeans)
    assert [stage.name for stage in stages] == ["kmeans"]


def test_what_the_format_holds_exactly_stays_so(H) -> None:
    w = random_codebook_tensor(KEY, SPEC, K, N, jnp.float32)
    refined, stages = refine(dequantize(w), H, w, KEY, OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, refined, w)
    assert max(stage.error for stage in stages) < 1e-12


def test_one_key_gives_the_same_bits_and_another_does_not(W, H) -> None:
    first, again, other = (
        quantize_additive(W, H, SPEC, jax.random.key(seed), OPTIONS)[0] for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.codes, other.codes)


def test_powers_of_two_change_nothing_else(W, H) -> None:
    w, stages = quantize_additive(W, H, SPEC, KEY, OPTIONS)
    larger, larger_stages = quantize_additive(64 * W, 4 * H, SPEC, KEY, OPTIONS)
    np.testing.assert_array_equal(larger.codes, w.codes)
    np.testing.assert_array_equal(larger.codebooks, w.codebooks)
    np.testing.assert_array_equal(larger.scales, 64 * w.scales)
    assert larger_stages == stages


def test_columns_on_four_devices_get_the_same_codes(W, H) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    one, _ = quantize_additive(W, H, SPEC, KEY, OPTIONS)
    four, _ = quantize_additive(jax.device_put(W, sharding), H, SPEC, KEY, OPTIONS)
    np.testing.assert_array_equal(four.codes, one.codes)
    np.testing.assert_allclose(four.codebooks, one.codebooks, rtol=1e-2)


def test_adam_has_the_gradient_of_the_objective(W, H) -> None:
    """Its first step goes, by one learning rate, against the sign of every derivative."""
    w = quantize_kmeans(W, SPEC, KEY, 5, 0, jnp.float32)
    energy = jnp.sum(W * (H @ W))

    def loss(books: jax.Array, scales: jax.Array) -> jax.Array:
        return objective(W, H, CodebookTensor(w.codes, books, scales))

    expected = jax.grad(loss, argnums=(0, 1))(w.codebooks, w.scales)
    fitted = fit_floats(W, H, energy, w.codes, w.codebooks, w.scales, 1, 1e-4)
    for before, after, gradient in zip((w.codebooks, w.scales), fitted, expected, strict=True):
        step = after - before
        certain = np.abs(gradient) > 1e-3 * np.max(np.abs(gradient))
        np.testing.assert_array_equal(np.sign(step)[certain], -np.sign(gradient)[certain])


def test_steps_that_are_far_too_long_are_not_taken(W, H) -> None:
    w = quantize_kmeans(W, SPEC, KEY, 5, 2, jnp.float32)
    energy = jnp.sum(W * (H @ W))
    books, scales = fit_floats(W, H, energy, w.codes, w.codebooks, w.scales, 5, 100.0)
    np.testing.assert_array_equal(books, w.codebooks)
    np.testing.assert_array_equal(scales, w.scales)


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_inputs_will_do(W, tokens: int) -> None:
    H = hessian(tokens)
    w, stages = quantize_additive(W, H, SPEC, KEY, OPTIONS)
    assert stages[-1].error < 0.5 * stages[0].error
    # What the tokens do not see is not given up.
    assert relative(W, jnp.eye(K), w) < 1


def test_inputs_that_are_always_zero_will_do(W, H) -> None:
    dead = jnp.arange(K) < 8
    H = jnp.where(dead[:, None] | dead[None, :], 0, H)
    w, stages = quantize_additive(W, H, SPEC, KEY, OPTIONS)
    assert stages[-1].error < stages[0].error
    dW = W[:8] - dequantize(w, jnp.float32)[:8]
    assert jnp.linalg.norm(dW) < jnp.linalg.norm(W[:8])


def test_a_matrix_of_zeros_stays_zero(H) -> None:
    w, stages = quantize_additive(jnp.zeros((K, N)), H, SPEC, KEY, OPTIONS)
    assert not np.any(dequantize(w))
    assert {stage.error for stage in stages} == {0.0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda H: H.at[1, 2].set(jnp.nan), "H holds 1 values that are NaN or infinite"),
        (lambda H: H[:8], r"H must be \[K, K\] with K = 64, the inputs of W, got \[8, 64\]"),
        (lambda H: 0 * H, "of inputs that are not all zero"),
        (lambda H: H.at[3, 3].set(-1.0), "the least value of its diagonal is -1"),
    ],
)
def test_what_is_no_hessian_is_refused(W, H, change, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        quantize_additive(W, change(H), SPEC, KEY, OPTIONS)


def test_an_objective_beyond_float32_is_refused(W, H) -> None:
    w, _ = quantize_additive(W, None, SPEC, KEY, dataclasses.replace(OPTIONS, rounds=0))
    huge = dataclasses.replace(w, scales=jnp.full_like(w.scales, 1e30))
    for start, factor, what in ((w, 1e38, r"tr\(W\^T H W\) is"), (huge, 1, "after kmeans is")):
        with pytest.raises(ValueError, match=f"{what}.* too large for products in float32"):
            refine(W * jnp.float32(factor), H, start, KEY, OPTIONS)


@pytest.mark.parametrize(
    "change",
    [{"beam": 0}, {"rounds": -1}, {"rounds": 1.5}, {"tolerance": float("nan")}, {"damping": -1.0}],
)
def test_options_out_of_range_are_refused(change: dict) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be .*at least"):
        dataclasses.replace(PRESETS["default"], **change)
