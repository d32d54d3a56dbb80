"""Tuning a quantized model towards its teacher: floats alone, and codes with them."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.scheme import CONVENTIONAL
from jaxcodec.models.transformer import init_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import dequantize, random_codebook_tensor
from jaxcodec.train import pv_tuning as module
from jaxcodec.train.checkpoint import Checkpoints
from jaxcodec.train.data import Batch
from jaxcodec.train.ptq import quantize_model
from jaxcodec.train.pv_tuning import (
    PVOptions,
    changed_share,
    code_spacing,
    codebook_tensors,
    pv_tuning,
    recode,
)
from jaxcodec.train.step import (
    distillation,
    eval_step,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
)

STEPS = 50
# 512 tokens or more a step average little noise out of the codes' gradients; so they may hurry.
OPTIONS = PVOptions(max_code_change=0.01, code_learning_rate=0.2, beam=1)


def strings(seed, rows):
    """Random strings of the characters of sums, as a batch: text without end."""
    symbols = np.frombuffer(b"0123456789+=", np.uint8).astype(np.int32)
    tokens = np.random.default_rng(seed).choice(symbols, (rows, 16))
    return Batch(tokens, np.full(rows, 16, np.int32), np.ones(rows, np.int32))


@pytest.fixture(scope="module")
def teacher(shallow):
    """Random weights, but eight times as large, so that its predictions say something.

    All linears are 64 x 64: one shape to compile for.
    """
    square = dataclasses.replace(shallow, num_kv_heads=4, intermediate_size=64)
    model = init_model(square, jax.random.key(0))
    weights = jax.tree.map(lambda x: 8 * x if x.ndim == 2 else x, model.weights)
    return dataclasses.replace(model, weights=weights)


@pytest.fixture(scope="module")
def student(teacher):
    model, _ = quantize_model(teacher, CodebookSpec.parse("m1v4b4g32"), quiet=True)
    return model


class Run:
    """An objective, its compiled step, and steps of it on ever new strings."""

    def __init__(self, objective):
        schedules = [make_schedule(rate, 5, STEPS) for rate in (3e-3, 1.0)]
        floats = make_optimizer(schedules[0], weight_decay=0.0, clip_norm=1.0)
        self.objective = objective
        self.optimizer = objective.optimizer(floats, schedules[1])
        self.train_step = make_train_step(objective, self.optimizer)

    def start(self):
        # Committed to a device, as a restored state is: else jit compiles for that again.
        return jax.device_put(init_state(self.objective, self.optimizer), jax.devices()[0])

    def steps(self, state, count):
        """State, copied to the host, and metrics after each of `count` steps, on its batch."""
        for step in range(int(state.step), int(state.step) + count):
            state, metrics = self.train_step(state, self.objective.frozen, strings(step, 64))
            yield jax.tree.map(np.array, state), metrics

    def artifact(self, state):
        return self.objective.artifact(jax.tree.map(jnp.asarray, state.trainable))


@pytest.fixture(scope="module")
def floats_run(student, teacher):
    return Run(distillation(student, teacher))


@pytest.fixture(scope="module")
def pv_run(student, teacher):
    return Run(pv_tuning(student, teacher, OPTIONS))


@pytest.fixture(scope="module")
def tuned(pv_run):
    """All states and metrics of a run that nothing disturbed."""
    return list(pv_run.steps(pv_run.start(), STEPS))


def divergence(model, teacher):
    """KL on strings that no run trains on."""
    return float(eval_step(model, None, strings(1000, 64), CONVENTIONAL, teacher).mean)


@pytest.fixture(scope="module")
def tuned_floats(floats_run):
    return list(floats_run.steps(floats_run.start(), STEPS))


def test_floats_come_closer_to_the_teacher_and_codes_closer_still(
    student, teacher, floats_run, tuned_floats, pv_run, tuned
):
    floats = floats_run.artifact(tuned_floats[-1][0])
    codes = pv_run.artifact(tuned[-1][0])
    assert changed_share(student, floats) == 0 < changed_share(student, codes)
    before, after, further = (divergence(x, teacher) for x in (student, floats, codes))
    assert further < after < before


def test_a_step_that_changes_no_code_is_one_of_distillation(tuned_floats, tuned):
    (floats, _), (state, metrics) = tuned_floats[0], tuned[0]
    assert metrics["code_change"] == 0
    chex.assert_trees_all_close(state.trainable.floats, floats.trainable, atol=1e-6)


@pytest.mark.parametrize("text", ["m1v4b4g32", "m3v8b8g64"])
def test_codes_are_as_far_apart_as_their_nearest_neighbours(text, key):
    spec = CodebookSpec.parse(text)
    w = random_codebook_tensor(key, spec, 64, 48, jnp.float32)
    w = dataclasses.replace(
        w, codebooks=w.codebooks * 0.5 ** jnp.arange(len(w.codebooks))[:, None, None]
    )
    books, codes = np.asarray(w.codebooks), unpack(w.codes, spec.bits)
    nearest = []
    for book, chosen in zip(books, codes, strict=True):
        distances = np.linalg.norm(book[:, None] - book[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        nearest.append(np.mean(distances.min(axis=1)[chosen] ** 2))
    vectors = sum(book[chosen] for book, chosen in zip(books, codes, strict=True))
    wanted = np.sqrt(min(nearest) / np.mean(np.sum(vectors**2, axis=-1)))
    np.testing.assert_allclose(code_spacing(w), wanted, rtol=1e-5)


def test_some_groups_tell_what_all_do(key, monkeypatch):
    w = random_codebook_tensor(key, CodebookSpec.parse("m2v8b8g64"), 256, 48, jnp.float32)
    whole = code_spacing(w)
    monkeypatch.setattr(module, "SAMPLED_GROUPS", 300)
    code_spacing.clear_cache()
    some = code_spacing(w)
    code_spacing.clear_cache()
    assert some != whole
    np.testing.assert_allclose(some, whole, rtol=0.05)


@pytest.mark.parametrize("factor", [1e-25, 1.0])
def test_codebooks_that_say_nothing_do_not_count(key, factor):
    w = random_codebook_tensor(key, CodebookSpec.parse("m2v8b8g64"), 64, 48, jnp.float32)
    first = w.codebooks[0] * factor
    alone = code_spacing(dataclasses.replace(w, codes=w.codes[:1], codebooks=first[None]))
    twice = jnp.concatenate([first[:128], first[:128]])  # each vector stands there two times
    both = dataclasses.replace(w, codebooks=jnp.stack([first, jnp.zeros_like(first)]))
    np.testing.assert_allclose(code_spacing(both), alone, rtol=1e-5)
    assert code_spacing(dataclasses.replace(w, codes=w.codes[:1], codebooks=twice[None])) > 0.1
    assert code_spacing(dataclasses.replace(w, codebooks=jnp.zeros_like(w.codebooks))) == 0


def test_a_buffer_steps_by_its_share_of_the_spacing(pv_run, tuned):
    start, (state, _) = pv_run.start(), tuned[0]
    rate = OPTIONS.code_learning_rate * float(make_schedule(1.0, 5, STEPS)(0))
    for name, spacing in pv_run.objective.spacings.items():
        before, after = (np.asarray(x.trainable.buffers[name]) for x in (start, state))
        step = np.linalg.norm(after - before) / np.linalg.norm(before)
        np.testing.assert_allclose(step, rate * spacing, rtol=1e-4)


def test_no_step_changes_more_codes_than_it_may(pv_run, tuned):
    states = [pv_run.start(), *(state for state, _ in tuned)]
    codes = [{n: unpack(x, 4) for n, x in state.trainable.codes.items()} for state in states]
    groups = 16 * 64
    changed = [
        [np.sum(new[name] != old[name]) for name in old] for old, new in itertools.pairwise(codes)
    ]
    assert np.max(changed) <= math.ceil(OPTIONS.max_code_change * groups)
    shares = np.sum(changed, axis=1) / (len(codes[0]) * groups)
    np.testing.assert_allclose(shares, [m["code_change"] for _, m in tuned], rtol=1e-6)
    assert max(shares) > 0


def test_a_restored_run_goes_on_with_the_same_bits(pv_run, tuned, tmp_path):
    half = STEPS // 2
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(jax.tree.map(jnp.asarray, tuned[half - 1][0]), {})
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(pv_run.start())
    assert int(state.step) == half
    *_, (state, _) = pv_run.steps(state, STEPS - half)
    chex.assert_trees_all_equal(state, tuned[-1][0])


def test_what_is_trained_is_what_is_left_behind(pv_run, teacher, tuned):
    weights = jax.tree.map(jnp.asarray, tuned[-1][0].trainable)
    trained, _ = pv_run.objective.models(weights, teacher)
    left = pv_run.objective.artifact(weights)
    assert left.specs
    assert not trained.specs
    kernels = dict(nnx.to_flat_state(trained.weights))
    for name, w in codebook_tensors(left).items():
        path = [int(part) if part.isdigit() else part for part in name.split(".")]
        chex.assert_trees_all_equal(kernels[*path, "kernel"].get_value(), dequantize(w))


def test_the_gradient_of_a_weight_goes_to_its_buffer_and_to_its_floats(pv_run, teacher, student):
    weights, path = pv_run.objective.trainable, ("layers", 0, "mlp", "up_proj")
    factors = jax.random.normal(jax.random.key(1), (64, 64))

    def through_the_model(floats, buffers):
        whole = dataclasses.replace(weights, floats=floats, buffers=buffers)
        model, _ = pv_run.objective.models(whole, teacher)
        kernel = dict(nnx.to_flat_state(model.weights))[*path, "kernel"].get_value()
        return jnp.sum(kernel * factors)

    name = ".".join(map(str, path))
    floats, buffers = jax.grad(through_the_model, (0, 1))(weights.floats, weights.buffers)
    chex.assert_trees_all_close(buffers.pop(name), factors)
    assert not any(np.any(gradient) for gradient in buffers.values())
    w = codebook_tensors(student)[name]

    def directly(codebooks, scales):
        held = dataclasses.replace(w, codebooks=codebooks, scales=scales)
        return jnp.sum(dequantize(held) * factors)

    expected = jax.grad(directly, (0, 1))(w.codebooks, w.scales)
    gradients = dict(nnx.to_flat_state(floats))
    for field, gradient in zip(("codebooks", "scales"), expected, strict=True):
        chex.assert_trees_all_close(gradients[*path, field].get_value(), gradient, atol=1e-5)


def unpack(words, bits):
    """Codes [m, J, N] of packed words [m, W, N]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    parts = np.array(words)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return parts.reshape(len(parts), -1, parts.shape[-1])


@pytest.fixture(scope="module")
def linear():
    """A weight of m2v4b2g32, and a buffer that is not far from it."""
    w = random_codebook_tensor(
        jax.random.key(0), CodebookSpec.parse("m2v4b2g32"), 64, 24, jnp.float32
    )
    noise = 0.05 * jax.random.normal(jax.random.key(1), w.shape)
    return w, dequantize(w) + noise


def test_the_groups_farthest_off_get_the_nearest_codes(linear):
    w, phi = linear
    # As many hypotheses as a codebook has vectors: the search tries every pair.
    options = PVOptions(max_code_change=0.1, beam=4)
    codes, buffer, changed = recode(w, phi, options)
    old, new = unpack(w.codes, 2), unpack(codes, 2)
    books, scales = np.array(w.codebooks, np.float64), np.array(w.scales, np.float64)
    targets = np.array(phi, np.float64).reshape(16, 4, 24).swapaxes(1, 2)

    def distances(j, n):
        """Of all pairs of codes, [4, 4]."""
        pairs = scales[j // 8, n] * (books[0][:, None] + books[1][None])
        return np.sum((pairs - targets[j, n]) ** 2, axis=-1)

    places = list(itertools.product(range(16), range(24)))
    places.sort(key=lambda place: -distances(*place)[tuple(old[:, *place])])
    chosen = places[: math.ceil(0.1 * len(places))]
    expected = old.copy()
    for place in chosen:
        expected[:, *place] = np.unravel_index(distances(*place).argmin(), (4, 4))
    np.testing.assert_array_equal(new, expected)
    assert int(changed) == np.sum(np.any(new != old, axis=0)) > 0
    chex.assert_trees_all_equal(buffer, phi)


def test_no_group_ends_farther_from_its_buffer_which_may_start_anew(linear):
    w, phi = linear
    options = PVOptions(max_code_change=1.0, beam=1, delta_decay=1.0)
    codes, buffer, changed = recode(w, phi, options)
    new = dataclasses.replace(w, codes=codes)
    before, after = (np.square(phi - dequantize(x)).reshape(16, 4, 24).sum(1) for x in (w, new))
    assert np.all(after <= before + 1e-6)
    assert int(changed) == np.sum(after < before) > 0
    chex.assert_trees_all_close(buffer, dequantize(new), atol=1e-6)


def test_a_share_of_zero_changes_nothing(linear):
    codes, buffer, changed = recode(*linear, PVOptions(max_code_change=0.0))
    chex.assert_trees_all_equal((codes, buffer, changed), (linear[0].codes, linear[1], 0))


@pytest.mark.parametrize("tune", [distillation, pv_tuning])
def test_models_that_do_not_fit_are_refused(tune, shallow, shallow_model, codebook_model):
    with pytest.raises(ValueError, match="The model is dense.*quantize it first"):
        tune(shallow_model, shallow_model)

    def teacher(**changes):
        return dataclasses.replace(shallow_model, config=dataclasses.replace(shallow, **changes))

    with pytest.raises(ValueError, match="the teacher has 64 tokens, the model 128"):
        tune(codebook_model, teacher(vocab_size=64))
    with pytest.raises(ValueError, match="context of 32 tokens is shorter than the model's 128"):
        tune(codebook_model, teacher(max_positions=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_code_change": 1.5}, r"max_code_change must lie in \[0, 1\], got 1.5"),
        ({"delta_decay": -0.1}, "delta_decay must lie in"),
        ({"code_learning_rate": 0.0}, "code_learning_rate must be positive"),
        ({"code_learning_rate": math.inf}, "code_learning_rate must be .* finite, got inf"),
        ({"code_decay": 1.0}, r"code_decay must lie in \[0, 1\), got 1.0"),
        ({"beam": 0}, "beam must be at least 1"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        PVOptions(**changes)
