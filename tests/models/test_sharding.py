"""A model spread over four devices answers as it does on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.cache import KVCache, identity_table
from jaxcodec.models.lora import set_adapter
from jaxcodec.models.scheme import ICARUS
from jaxcodec.models.sharding import make_mesh, shard_cache, shard_model
from jaxcodec.models.steps import forward, prefill
from jaxcodec.models.transformer import Model, init_model, linear_shapes
from jaxcodec.spec import CodebookSpec


def test_dense_icarus_logits_do_not_depend_on_the_mesh(
    base: Model, banked: Model, random_adapter, random_tokens
) -> None:
    model = set_adapter(banked, random_adapter(base, 1), 1)
    arguments = (random_tokens((4, 8)), jnp.array([8, 8, 5, 8]), ICARUS, None, None)
    slots = jnp.array([0, 1, 1, 0])
    expected = forward(model, *arguments, slots)
    for model_parallel in (2, 4):
        sharded = shard_model(model, make_mesh(model_parallel))
        np.testing.assert_allclose(forward(sharded, *arguments, slots), expected, atol=2e-4)


def test_codebook_linears_split_like_dense_ones(config, key: jax.Array, random_tokens) -> None:
    model = init_model(config, key)
    spec = CodebookSpec.parse("m1v4b4g32")
    specs = tuple((path, spec) for path, _ in linear_shapes(model.config))
    model = init_model(config, key, specs=tuple(sorted(specs)))
    tokens, counts = random_tokens((2, 6)), jnp.array([6, 6])
    sharded = shard_model(model, make_mesh(2))
    variables = dict(nnx.to_flat_state(sharded.weights))
    codes = variables["layers", 0, "self_attn", "q_proj", "codes"].get_value()
    assert codes.sharding.shard_shape(codes.shape)[2] == codes.shape[2] // 2
    np.testing.assert_allclose(
        forward(sharded, tokens, counts), forward(model, tokens, counts), atol=2e-4
    )


def test_the_cache_splits_its_heads_and_keeps_its_content(base: Model, random_tokens) -> None:
    mesh = make_mesh(2)
    table = identity_table(2, 8, 4)
    empty = KVCache.zeros(base.config, 4, 4, jnp.float32)
    arguments = (table, random_tokens((2, 8)), jnp.array([8, 6]))
    sharded = prefill(shard_model(base, mesh), shard_cache(empty, mesh), *arguments)
    assert sharded.k.sharding.shard_shape(sharded.k.shape)[3] == base.config.num_kv_heads // 2
    expected = prefill(base, KVCache.zeros(base.config, 4, 4, jnp.float32), *arguments)
    np.testing.assert_allclose(sharded.k, expected.k, atol=2e-4)


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="4 devices do not divide into groups of 3"):
        make_mesh(3)
