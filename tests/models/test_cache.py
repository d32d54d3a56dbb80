"""Pages: what is written is read back, what has no page is dropped, rows do not meet."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.models.cache import KVCache, PageTable, identity_table, pages_for
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.steps import forward, prefill
from jaxcodec.models.transformer import Model

write = jax.jit(KVCache.write, static_argnames="layer")
read = jax.jit(KVCache.read, static_argnames="layer")


def test_pages_for_rounds_up() -> None:
    assert [pages_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_written_is_read_back_wherever_the_pages_lie(config: ModelConfig, key: jax.Array) -> None:
    shape = (2, 7, config.num_kv_heads, config.head_dim)
    k, v = np.asarray(jax.random.normal(key, (2, *shape)))
    cache = KVCache.zeros(config, 8, 4, jnp.float32)
    table = PageTable(jnp.array([[5, 0, 3], [1, 7, 8]]), jnp.array([2, 0]))
    cache = write(cache, 1, table, k, v, np.ones((2, 7), bool))
    read_k, read_v = map(np.asarray, read(cache, 1, table))
    written = np.asarray(cache.k)
    np.testing.assert_array_equal(read_k[0, 2:9], k[0])
    np.testing.assert_array_equal(read_v[1, :7], v[1])
    np.testing.assert_array_equal(written[0], 0)  # the other layer
    np.testing.assert_array_equal(written[1, [2, 4, 6]], 0)  # nobody's pages


def test_padding_and_missing_pages_are_not_written(config: ModelConfig, key: jax.Array) -> None:
    k = np.asarray(jax.random.normal(key, (2, 6, config.num_kv_heads, config.head_dim)))
    cache = KVCache.zeros(config, 4, 4, jnp.float32)
    table = PageTable(jnp.array([[0, 4], [4, 4]]), jnp.array([0, 0]))
    keep = np.arange(6)[None, :] < np.array([[3], [6]])
    written = np.asarray(write(cache, 0, table, k, k, keep).k)
    np.testing.assert_array_equal(written[0, 0, :3], k[0, :3])
    np.testing.assert_array_equal(written[0, 0, 3:], 0)
    np.testing.assert_array_equal(written[0, 1:], 0)


def test_tokens_beyond_the_table_are_dropped(config: ModelConfig, key: jax.Array) -> None:
    k = np.asarray(jax.random.normal(key, (1, 6, config.num_kv_heads, config.head_dim)))
    table = PageTable(jnp.array([[2]]), jnp.array([0]))
    cache = KVCache.zeros(config, 4, 4, jnp.float32)
    written = np.asarray(write(cache, 0, table, k, k, np.ones((1, 6), bool)).k)
    np.testing.assert_array_equal(written[0, 2], k[0, :4])
    np.testing.assert_array_equal(written[0, [0, 1, 3]], 0)


def test_a_freed_page_full_of_nan_harms_nobody(base: Model, random_tokens) -> None:
    tokens, counts = random_tokens((1, 10)), jnp.array([10])
    expected = forward(base, tokens, counts)
    cache = KVCache.zeros(base.config, 3, 4, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    table = identity_table(1, 12, 4)
    hidden, _ = jax.jit(lambda m, *a: m.module(*a))(base, tokens, cache, table, counts)
    np.testing.assert_allclose(base.module.logits(hidden), expected, atol=1e-4)


def test_prefill_writes_the_same_wherever_the_pages_lie(base: Model, random_tokens) -> None:
    tokens, counts = random_tokens((2, 10)), jnp.array([10, 6])
    scattered = PageTable(jnp.array([[5, 2, 0], [1, 4, 3]]), jnp.zeros((2,), jnp.int32))
    reads = []
    for table in (identity_table(2, 12, 4), scattered):
        cache = KVCache.zeros(base.config, 6, 4, jnp.float32)
        cache = prefill(base, cache, table, tokens, counts)
        reads.append(np.asarray(read(cache, 1, table)))
    for row, count in enumerate((10, 6)):
        np.testing.assert_array_equal(reads[0][0][row, :count], reads[1][0][row, :count])
