"""Grouped-query attention of one or two streams of queries over one read of the cache.

Letters: S streams, B rows, T tokens in this call, C cached positions, H query heads, G KV heads,
M = H // G query heads a KV head, A head_dim, D hidden.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcodec.models.cache import KVCache, PageTable
from jaxcodec.models.config import ModelConfig, rope_frequencies
from jaxcodec.models.layers import LinearFactory, RMSNorm, Slots, products


class Attention(nnx.Module):
    """Self-attention whose keys and values come from the first stream: the encoder.

    With one stream that is the ordinary layer. With two, the encoder's row and the decoder's row
    of each token ask the same keys and values (ICaRus, arXiv 2603.13281: Q_enc and Q_dec side by
    side in one grouped-query attention). A row that has the same adapter in both streams is an
    ordinary one, computed twice: so rows of every scheme fit one batch.
    """

    def __init__(self, config: ModelConfig, linear: LinearFactory, layer: int):
        D, A = config.hidden_size, config.head_dim
        bias = config.attention_bias
        path = f"layers.{layer}.self_attn"
        self.q_proj = linear(f"{path}.q_proj", D, config.num_heads * A, bias)
        self.k_proj = linear(f"{path}.k_proj", D, config.num_kv_heads * A, bias)
        self.v_proj = linear(f"{path}.v_proj", D, config.num_kv_heads * A, bias)
        self.o_proj = linear(f"{path}.o_proj", config.num_heads * A, D, False)
        if config.qk_norm:
            self.q_norm = RMSNorm(A, config.norm_eps, linear.dtype)
            self.k_norm = RMSNorm(A, config.norm_eps, linear.dtype)
        self.config = config
        self.layer = layer

    def __call__(
        self,
        x_sbtd: jax.Array,
        cache: KVCache,
        table: PageTable,
        keep: jax.Array,
        counts: jax.Array,
        slots: Slots,
    ) -> tuple[jax.Array, KVCache]:
        """Returns (output [S, B, T, D], the cache with this layer's new keys and values)."""
        S = x_sbtd.shape[0]
        position = table.length[:, None] + jnp.arange(x_sbtd.shape[2])[None, :]
        if S == 1:
            q, k, v = products([self.q_proj, self.k_proj, self.v_proj], x_sbtd)
        else:  # the decoder's row has no keys and values
            (q,) = products([self.q_proj], x_sbtd)
            k, v = products([self.k_proj, self.v_proj], x_sbtd[:1])
        q = self._heads(self.q_proj.adapt(q, x_sbtd, slots), "q_norm")
        k = self._heads(self.k_proj.adapt(k, x_sbtd[:1], slots[:1]), "k_norm")
        v = self._heads(self.v_proj.adapt(v, x_sbtd[:1], slots[:1]), None)[0]
        q, k = rotate(q, position, self.config), rotate(k, position, self.config)[0]
        if S == 2:  # the encoder is frozen: in training no gradient passes through its cache
            k, v = jax.lax.stop_gradient((k, v))
        cache = cache.write(self.layer, table, k, v, keep)
        k_bcga, v_bcga = cache.read(self.layer, table)
        window = self.config.windows[self.layer]
        out = attend(q, k_bcga, v_bcga, position, table.length + counts, window)
        return self.o_proj(out, slots), cache

    def _heads(self, y: jax.Array, norm: str | None) -> jax.Array:
        y = y.reshape(*y.shape[:-1], -1, self.config.head_dim)
        return getattr(self, norm)(y) if norm and self.config.qk_norm else y


def rotate(x_sbtha: jax.Array, position_bt: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary position embedding of each head; pairs are (i, i + A / 2), angles in float32.

    Source: RoFormer (arXiv 2104.09864) equation 34, in the half-split order of Hugging Face.
    """
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angle_bta = position_bt[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angle = angle_bta[None, :, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_sbtha.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_sbtha.dtype)


def attend(
    q_sbtha: jax.Array,
    k_bcga: jax.Array,
    v_bcga: jax.Array,
    position_bt: jax.Array,
    valid_b: jax.Array,
    window: int | None,
) -> jax.Array:
    """Causal attention of every stream's queries over the same keys and values.

    Args:
      position_bt: int32 position of each query; a query sees positions up to its own.
      valid_b: int32, positions of the row that hold tokens; the rest is never read.
      window: a query sees this many positions, its own included; None for all.

    Returns:
      [S, B, T, H * A] in the dtype of q; softmax in float32.
    """
    S, B, T, H, A = q_sbtha.shape
    C, G = k_bcga.shape[1:3]
    with jax.named_scope("attention"):
        cached = jnp.arange(C)[None, None, :]
        seen = (cached <= position_bt[..., None]) & (cached < valid_b[:, None, None])
        if window is not None:
            seen &= cached > position_bt[..., None] - window
        # A freed page may hold another row's NaN, and 0 * NaN is NaN: weightless is not enough.
        written = (jnp.arange(C)[None, :] < valid_b[:, None])[..., None, None]
        v_bcga = jnp.where(written, v_bcga, 0)
        q = q_sbtha.reshape(S, B, T, G, H // G, A)
        scores = jnp.einsum("sbtgma,bcga->sbgmtc", q, k_bcga, preferred_element_type=jnp.float32)
        # The smallest finite number, so that a row of padding that sees nothing is not NaN.
        floor = jnp.finfo(jnp.float32).min
        scores = jnp.where(seen[None, :, None, None], scores * A**-0.5, floor)
        weights = jax.nn.softmax(scores, axis=-1).astype(v_bcga.dtype)
        out = jnp.einsum("sbgmtc,bcga->sbtgma", weights, v_bcga)
    return out.reshape(S, B, T, H * A).astype(q_sbtha.dtype)
