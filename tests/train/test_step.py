"""A step is one step, whatever it is computed in; what decays, and how fast it learns."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcodec.models.scheme import CONVENTIONAL
from jaxcodec.train.data import Batch, read_examples
from jaxcodec.train.step import (
    eval_step,
    full_training,
    make_optimizer,
    make_schedule,
)


def test_full_training_overfits_and_leaves_the_model_that_it_started_from(
    run, differing, model, batch
):
    before = jax.tree.map(np.array, model)
    objective = full_training(model)
    state, losses = run(objective, batch, 60)
    assert losses[-1] < 0.1 < losses[0]
    chex.assert_trees_all_equal(before, model)
    trained = objective.artifact(state.trainable)
    changed = differing(model.weights, trained.weights)
    assert len(changed) == len(jax.tree.leaves(model))


def test_accumulated_micro_batches_equal_the_whole_batch(run, shallow_model, batch):
    # rows of unlike counts, so that a mean of means would be wrong
    counts = batch.counts - np.array([0, 1, 0, 0, 1, 2, 1, 0], np.int32)
    uneven = Batch(batch.tokens, counts, batch.prompt_lengths)
    # plain descent: Adam would blow up differences in the last bits of tiny gradients
    sgd = optax.sgd(0.1)
    objective = full_training(shallow_model)
    whole, parts = (run(objective, uneven, 2, sgd, n) for n in (1, 4))
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)
    chex.assert_trees_all_close(whole[0].trainable, parts[0].trainable, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused(run, model, batch):
    with pytest.raises(ValueError, match="8 rows does not divide into 3"):
        run(full_training(model), batch, accumulate=3)


def test_empty_rows_change_no_sum(model, pairs_file, tokenizer):
    examples = read_examples(pairs_file, tokenizer, 8)
    few = eval_step(model, None, examples.rows(np.arange(2)), CONVENTIONAL)
    filled = eval_step(model, None, examples.rows(np.array([0, 1, -1, -1])), CONVENTIONAL)
    chex.assert_trees_all_close(few, filled, rtol=1e-6)


def test_weight_decay_acts_on_matrices_alone(differing, codebook_model):
    optimizer = make_optimizer(make_schedule(1e-2, 0, 100), weight_decay=1.0, clip_norm=1.0)
    weights = full_training(codebook_model).trainable
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(weights), weights)
    decayed = {path.removeprefix("layers.") for path in differing(nothing, updates)}
    assert "embed_tokens.weight" in decayed
    assert "0.self_attn.k_proj.kernel" in decayed
    assert not {path for path in decayed if "codebooks" in path or "scales" in path}
    assert not {path for path in decayed if "norm" in path}


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    schedule = make_schedule(1.0, 10, 100)
    rates = np.array([schedule(i) for i in range(101)])
    assert 0 < rates[0] <= 0.11
    assert rates.argmax() == 10
    assert rates[100] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"warmup_steps \(--warmup-steps\) must lie in"):
        make_schedule(1.0, 100, 100)
