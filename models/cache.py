"""The KV cache: pages of keys and values, and the tables that say which pages a row owns.

Letters: L layers, B rows, T tokens in this call, P pages a row, C = P * page positions a row,
G KV heads, A head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcodec.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Where the rows of a batch live in the cache.

    Attributes:
      pages: int32 [B, P], the page of positions [p * page, (p + 1) * page) of a row. An id that is
        not below the cache's number of pages means no page: writes to it are dropped.
      length: int32 [B], tokens of the row already in the cache.
    """

    pages: jax.Array
    length: jax.Array

    def advanced(self, count: jax.Array | int) -> "PageTable":
        """The same table after `count` more tokens a row (a number or int32 [B])."""
        return PageTable(self.pages, self.length + count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all rows, in pages.

    Attributes:
      k: [L, pages, page, G, A] keys, rotary embedding applied.
      v: [L, pages, page, G, A] values.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, config: ModelConfig, pages: int, page_size: int, dtype: jnp.dtype) -> "KVCache":
        """An empty cache of `pages` pages of `page_size` tokens."""
        shape = (config.num_layers, pages, page_size, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[2]

    def write(
        self,
        layer: int,
        table: PageTable,
        k_btga: jax.Array,
        v_btga: jax.Array,
        keep: jax.Array,
    ) -> "KVCache":
        """The cache after token t of row b is written at position `table.length[b] + t`.

        Args:
          keep: bool [B, T]; tokens where it is False, or which have no page, are not written.
        """
        position = table.length[:, None] + jnp.arange(k_btga.shape[1])[None, :]
        column, offset = position // self.page_size, position % self.page_size
        width = table.pages.shape[1]
        page = jnp.take_along_axis(table.pages, jnp.minimum(column, width - 1), axis=1)
        page = jnp.where(keep & (column < width), page, self.num_pages)
        with jax.named_scope("cache_write"):
            k = self.k.at[layer, page, offset].set(k_btga.astype(self.k.dtype), mode="drop")
            v = self.v.at[layer, page, offset].set(v_btga.astype(self.v.dtype), mode="drop")
        return KVCache(k, v)

    def read(self, layer: int, table: PageTable) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, C, G, A] of one layer, by position.

        What lies beyond a row's length, or has no page, is another row's or nobody's: the reader
        masks it.
        """
        B, P = table.pages.shape
        with jax.named_scope("cache_read"):
            k = self.k.at[layer, table.pages].get(mode="clip")
            v = self.v.at[layer, table.pages].get(mode="clip")
        flat = (B, P * self.page_size, *self.k.shape[3:])
        return k.reshape(flat), v.reshape(flat)


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def identity_table(batch: int, capacity: int, page_size: int) -> PageTable:
    """The table of plain generation and training: row b owns its own run of pages, all empty.

    Goes with a cache of `batch * pages_for(capacity, page_size)` pages.
    """
    P = pages_for(capacity, page_size)
    pages = jnp.arange(batch * P, dtype=jnp.int32).reshape(batch, P)
    return PageTable(pages, jnp.zeros((batch,), jnp.int32))
