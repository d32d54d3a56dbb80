"""Blocks one after the other are the model, and what their linears read is what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.blocks import (
    SHARED_INPUTS,
    run_block,
    run_block_recording,
    take_block,
    with_blocks,
)
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.steps import forward
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.spec import CodebookSpec

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
    windows=(None, 4),
    attention_bias=True,
)
SPECS = (
    ("layers.1.mlp.down_proj", CodebookSpec.parse("m1v4b4g32")),
    ("layers.1.self_attn.q_proj", CodebookSpec.parse("m2v4b4g16")),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)


@pytest.fixture(scope="module")
def model() -> Model:
    return init_model(CONFIG, jax.random.key(0), specs=SPECS)


def test_blocks_in_a_row_are_the_model(model: Model) -> None:
    x = model.embedding[TOKENS]
    for layer in range(2):
        x = run_block(take_block(model, layer), x)
    np.testing.assert_allclose(
        model.module.logits(x), forward(model, TOKENS, jnp.array([12, 12])), atol=1e-5
    )


def test_a_block_keeps_its_window_and_its_formats(model: Model) -> None:
    first, second = take_block(model, 0), take_block(model, 1)
    assert (first.config.windows, first.specs) == ((None,), ())
    assert second.config.windows == (4,)
    assert [path for path, _ in second.specs] == ["mlp.down_proj", "self_attn.q_proj"]
    assert set(first.kernels) == set(SHARED_INPUTS)


def test_blocks_put_back_are_the_same_model(model: Model) -> None:
    again = with_blocks(model, {layer: take_block(model, layer) for layer in range(2)})
    assert again.specs == model.specs
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)


def test_recorded_inputs_times_weights_are_what_the_block_computes(model: Model) -> None:
    block = take_block(model, 0)
    x = jax.random.normal(jax.random.key(2), (2, 12, 32))
    y, inputs = run_block_recording(block, x)
    np.testing.assert_array_equal(y, run_block(block, x))
    assert inputs.keys() == set(SHARED_INPUTS.values())
    kernels = block.kernels
    product = lambda name: inputs[SHARED_INPUTS[name]] @ kernels[name]
    gated = jax.nn.silu(product("mlp.gate_proj")) * product("mlp.up_proj")
    np.testing.assert_allclose(inputs["mlp.down_proj"], gated, atol=1e-5)
    attended = product("self_attn.o_proj")
    np.testing.assert_allclose(y, x + attended + product("mlp.down_proj"), atol=1e-5)


def test_what_is_no_block_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="has 2 blocks; there is no 2"):
        take_block(model, 2)
    banked = dataclasses.replace(model, bank=AdapterBank(1, 2, ("q_proj",)))
    with pytest.raises(ValueError, match="without a bank"):
        take_block(banked, 0)
