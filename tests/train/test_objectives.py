"""What trains and what stays, scheme by scheme."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.layers import Codes
from jaxcodec.models.lora import ALL_TARGETS, init_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import init_model
from jaxcodec.train.step import (
    adapter_training,
    batch_logits,
    decode_module_training,
    eval_step,
    full_training,
)


def test_training_a_codebook_model_changes_every_float_and_no_code(
    run, differing, codebook_model, batch
):
    objective = full_training(codebook_model)
    state, losses = run(objective, batch)
    assert losses[-1] < losses[0]
    trained = objective.artifact(state.trainable)
    changed = differing(codebook_model.weights, trained.weights)
    codes = {
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(codebook_model.weights)
        if isinstance(variable, Codes)
    }
    assert len(codes) == 2
    assert not changed & codes
    assert len(changed) == len(jax.tree.leaves(codebook_model.weights)) - len(codes)


@pytest.mark.parametrize("scheme", [ICARUS, CONVENTIONAL])
def test_an_adapter_trains_and_the_base_does_not(run, codebook_model, batch, key, scheme):
    objective = adapter_training(codebook_model, init_adapter(codebook_model, key, 4), scheme)
    before = jax.tree.map(np.array, objective.frozen)
    state, losses = run(objective, batch, 4)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(before, objective.frozen)
    for path, (a, b) in state.trainable.weights.items():
        assert jnp.any(b != 0), path
        assert jnp.any(a != objective.trainable.weights[path][0]), path


@pytest.mark.parametrize("scheme", [ICARUS, CONVENTIONAL])
def test_an_adapter_before_its_first_step_is_the_identity(codebook_model, batch, key, scheme):
    adapter = init_adapter(codebook_model, key, 4)
    objective = adapter_training(codebook_model, adapter, scheme)
    model, base = objective.models(objective.trainable, objective.frozen)
    expected = forward(codebook_model, jnp.asarray(batch.tokens), jnp.asarray(batch.counts))
    chex.assert_trees_all_close(batch_logits(model, base, batch, scheme), expected, atol=1e-5)


def test_a_decode_module_that_equals_the_base_answers_as_the_base(model, batch):
    objective = decode_module_training(model, model)
    decode, base = objective.models(objective.trainable, objective.frozen)
    shared = eval_step(decode, base, batch, PREFILL_SHARE)
    chex.assert_trees_all_close(shared, eval_step(model, None, batch, CONVENTIONAL), rtol=1e-5)


def test_no_gradient_reaches_the_base_of_a_decode_module(model, batch):
    objective = decode_module_training(model, model)
    rest, base = objective.frozen

    def loss(floats):
        written = base.__class__(base.config, floats, base.specs, base.bank)
        decode, _ = objective.models(objective.trainable, (rest, base))
        return eval_step(decode, written, batch, PREFILL_SHARE).loss

    gradient = jax.grad(loss)(base.weights)
    assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_decode_module_trains_beside_a_codebook_base(run, codebook_model, model, batch):
    objective = decode_module_training(model, codebook_model)
    before = jax.tree.map(np.array, objective.frozen)
    _, losses = run(objective, batch)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(before, objective.frozen)


def test_masters_are_float32_and_the_artifact_has_the_dtype_of_the_base(config, key):
    model = init_model(config, key, jnp.bfloat16)
    objective = full_training(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(objective.trainable))
    chex.assert_trees_all_equal(objective.artifact(objective.trainable), model)


def test_an_icarus_adapter_on_k_proj_is_refused(model, key):
    adapter = init_adapter(model, key, 4, targets=ALL_TARGETS)
    adapter_training(model, adapter, CONVENTIONAL)
    with pytest.raises(ValueError, match="k_proj and v_proj, which write the shared KV cache"):
        adapter_training(model, adapter, ICARUS)


def test_prefill_share_trains_no_adapter(model, key):
    with pytest.raises(ValueError, match="trains a decode module"):
        adapter_training(model, init_adapter(model, key), PREFILL_SHARE)
