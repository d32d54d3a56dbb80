"""Tiny random models shared by the tests of models/."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ALL_TARGETS, ICARUS_TARGETS, Adapter, init_adapter, with_bank
from jaxcodec.models.transformer import Model, init_model

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_positions=128,
    windows=(None, 9),
    qk_norm=True,
)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Two layers, three query heads a KV head, one sliding window."""
    return CONFIG


@pytest.fixture(scope="session")
def base() -> Model:
    """A random dense model whose logits are far from uniform."""
    model = init_model(CONFIG, jax.random.key(1))
    return jax.tree.map(lambda x: 4 * x, model)


@pytest.fixture(scope="session")
def banked(base: Model) -> Model:
    """The base with room for three adapters, all zero."""
    return with_bank(base, AdapterBank(3, 4, ALL_TARGETS))


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    """Makes adapters of rank 4 with A and B far from zero."""
    return _random_adapter


@pytest.fixture(scope="session")
def random_tokens() -> Callable[..., jax.Array]:
    """Makes random tokens of the tiny vocabulary."""
    return _random_tokens


def _random_adapter(model: Model, seed: int, targets: tuple[str, ...] = ICARUS_TARGETS) -> Adapter:
    adapter = init_adapter(model, jax.random.key(seed), rank=4, alpha=8.0, targets=targets)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def _random_tokens(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size, jnp.int32)
