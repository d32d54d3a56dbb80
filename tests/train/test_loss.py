"""Which tokens carry loss, and that the sums are cross entropy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxcodec.train import loss
from jaxcodec.train.data import Batch
from jaxcodec.train.loss import loss_sums, sum_over_positions, target_mask

next_token_loss = jax.jit(loss.next_token_loss)
kl_divergence = jax.jit(loss.kl_divergence)

BATCH = Batch(
    np.array([[5, 6, 7, 2, 0, 0], [3, 1, 4, 1, 5, 2], [0, 0, 0, 0, 0, 0]]),
    np.array([4, 6, 0]),
    np.array([2, 1, 1]),
)


def test_the_mask_covers_completion_and_eos_and_nothing_else():
    expected = [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert np.asarray(target_mask(BATCH)).astype(int).tolist() == expected


def test_the_loss_is_the_cross_entropy_of_the_masked_targets(key):
    logits = jax.random.normal(key, (3, 6, 9))
    sums = next_token_loss(logits, BATCH)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    terms = [(0, 1, 7), (0, 2, 2), *((1, t, BATCH.tokens[1, t + 1]) for t in range(5))]
    expected = -sum(log_p[b, t, token] for b, t, token in terms)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-6)
    assert float(sums.count) == len(terms)
    assert float(sums.mean) == pytest.approx(expected / len(terms), rel=1e-6)


def test_gradients_reach_only_positions_that_predict_a_counted_token(key):
    logits = jax.random.normal(key, (3, 6, 9))
    gradient = jax.grad(lambda x: next_token_loss(x, BATCH).loss)(logits)
    reached = np.asarray(jnp.any(gradient != 0, axis=-1))
    assert reached[:, :-1].tolist() == np.asarray(target_mask(BATCH)).tolist()
    assert not reached[:, -1].any()


def test_padding_may_hold_anything(key):
    logits = jax.random.normal(key, (3, 6, 9))
    wild = logits.at[2].set(jnp.nan).at[0, 4:].set(jnp.inf)
    chex.assert_trees_all_equal(next_token_loss(wild, BATCH), next_token_loss(logits, BATCH))


def test_sums_add_up_over_parts_of_a_batch(key):
    logits = jax.random.normal(key, (3, 6, 9))
    parts = [jax.tree.map(lambda x, b=b: x[b : b + 1], BATCH) for b in range(3)]
    sums = [next_token_loss(logits[b : b + 1], part) for b, part in enumerate(parts)]
    total = jax.tree.map(lambda *terms: sum(terms), *sums)
    chex.assert_trees_all_close(total, next_token_loss(logits, BATCH), rtol=1e-6)


def test_a_batch_without_targets_has_loss_zero():
    empty = Batch(BATCH.tokens, np.zeros(3, int), BATCH.prompt_lengths)
    assert float(next_token_loss(jnp.ones((3, 6, 9)), empty).mean) == 0


def test_the_right_token_counts_as_correct():
    logits = 10 * jax.nn.one_hot(jnp.roll(BATCH.tokens, -1, axis=1), 9)
    assert float(next_token_loss(logits, BATCH).accuracy) == 1


@pytest.mark.parametrize("at_once", [1, 3 * 9 * 2, 3 * 9 * 5, 10**6])
def test_sums_over_chunks_of_positions_are_those_of_all_logits(key, monkeypatch, at_once):
    """One position at once, two of five, all."""
    logits = jax.random.normal(key, (3, 6, 9))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    found = sum_over_positions(loss_sums, logits, BATCH, 9)
    chex.assert_trees_all_close(found, next_token_loss(logits, BATCH), rtol=1e-6)


def test_the_divergence_is_kullback_and_leiblers_on_the_counted_tokens(key):
    teacher, logits = 3 * jax.random.normal(key, (2, 2, 5, 7))
    tokens = np.zeros((2, 5), np.int32)
    batch = Batch(tokens, np.array([5, 3], np.int32), np.array([2, 1], np.int32))
    p, q = (scipy.special.softmax(np.array(x, np.float64), axis=-1) for x in (teacher, logits))
    counted = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    expected = sum(scipy.special.rel_entr(p[place], q[place]).sum() for place in counted)
    sums = kl_divergence(teacher, logits, batch)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    assert sums.count == len(counted)
    assert sums.correct == sum(p[place].argmax() == q[place].argmax() for place in counted)


def test_a_model_is_no_distance_from_itself_and_stays_there(key):
    logits = 3 * jax.random.normal(key, (2, 5, 7))
    full = np.full(2, 5, np.int32)
    batch = Batch(np.zeros((2, 5), np.int32), full, np.ones(2, np.int32))
    distance, (to_teacher, to_model) = jax.value_and_grad(
        lambda teacher, model: kl_divergence(teacher, model, batch).loss, (0, 1)
    )(logits, logits)
    assert distance == 0
    assert not np.any(to_teacher)
    np.testing.assert_allclose(to_model, 0, atol=1e-6)
    other = jax.grad(lambda teacher: kl_divergence(teacher, 2 * logits, batch).loss)(logits)
    assert not np.any(other)
