"""A decoder-only Transformer, and the record of one: its sizes, formats and weights.

Letters: S streams, B rows, T tokens in this call, D hidden, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcodec.models.attention import Attention
from jaxcodec.models.cache import KVCache, PageTable
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import (
    MLP,
    AdapterBank,
    Embedding,
    Linear,
    LinearFactory,
    RMSNorm,
    Slots,
)
from jaxcodec.spec import CodebookSpec

Specs = tuple[tuple[str, CodebookSpec], ...]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, linear: LinearFactory, layer: int):
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, linear.dtype)
        self.self_attn = Attention(config, linear, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, linear.dtype)
        self.mlp = MLP(config, linear, layer)

    def __call__(
        self,
        x_sbtd: jax.Array,
        cache: KVCache,
        table: PageTable,
        keep: jax.Array,
        counts: jax.Array,
        slots: Slots,
    ) -> tuple[jax.Array, KVCache]:
        with jax.named_scope("self_attn"):
            normed = self.input_layernorm(x_sbtd)
            attended, cache = self.self_attn(normed, cache, table, keep, counts, slots)
            x_sbtd = x_sbtd + attended
        with jax.named_scope("mlp"):
            return x_sbtd + self.mlp(self.post_attention_layernorm(x_sbtd), slots), cache


class Transformer(nnx.Module):
    """Embedding, blocks, norm and head; names of parameters are those of Hugging Face."""

    def __init__(self, config: ModelConfig, linear: LinearFactory):
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(V, D, dtype=linear.dtype, rngs=linear.rngs)
        self.layers = nnx.List([Block(config, linear, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(D, config.norm_eps, linear.dtype)
        self.tied = config.tie_embeddings
        if not self.tied:
            self.lm_head = Linear(D, V, dtype=linear.dtype, rngs=linear.rngs)

    def __call__(
        self,
        tokens_bt: jax.Array,
        cache: KVCache,
        table: PageTable,
        counts: jax.Array,
        *,
        slots: jax.Array | None = None,
        streams: int = 1,
        encoder_slots: jax.Array | None = None,
        write_from: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Run tokens at positions `table.length[b] + t` and write their keys and values.

        Args:
          tokens_bt: int32 [B, T].
          counts: int32 [B], tokens of each row that are real; the rest is padding.
          slots: int32 [B], the adapter of each row; None for none.
          streams: 1, or 2 for an encoder stream that writes the cache beside a decoder stream that
            carries the adapters.
          encoder_slots: int32 [B], with two streams the adapter of each row's encoder; None where
            all encoders are the frozen base.
          write_from: int32 [B], the first token of each row to be written; None for 0.

        Returns:
          (hidden states [B, T, D] of the last stream, the new cache).
        """
        t = jnp.arange(tokens_bt.shape[1])[None, :]
        first = 0 if write_from is None else write_from[:, None]
        keep = (t >= first) & (t < counts[:, None])
        with jax.named_scope("embed"):
            x_btd = self.embed_tokens(tokens_bt)
            x_sbtd = jnp.broadcast_to(x_btd, (streams, *x_btd.shape))
        by_stream = (encoder_slots, slots) if streams == 2 else (slots,)
        for i, block in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                x_sbtd, cache = block(x_sbtd, cache, table, keep, counts, by_stream)
        return x_sbtd[-1], cache

    def logits(self, x_btd: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V] of the next token."""
        with jax.named_scope("logits"):
            x_btd = self.norm(x_btd)
            if self.tied:
                return self.embed_tokens.logits(x_btd)
            kernel = self.lm_head.kernel[...].astype(x_btd.dtype)
            return jnp.matmul(x_btd, kernel, preferred_element_type=jnp.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["config", "specs", "bank"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Transformer's weights with all that is needed to run them: an ordinary jit argument.

    Attributes:
      config: sizes and switches.
      weights: the variables, as `nnx.split` gives them.
      specs: (path, spec) of every linear that is stored as codebooks, sorted by path.
      bank: room for adapters in the linears, or None.
    """

    config: ModelConfig
    weights: nnx.State
    specs: Specs = ()
    bank: AdapterBank | None = None

    @property
    def module(self) -> Transformer:
        """A Flax module with these weights; to change it does not change the model."""
        graphdef = _structure(self.config, self.specs, self.bank)
        return nnx.merge(graphdef, self.weights, copy=True)

    @property
    def embedding(self) -> jax.Array:
        """The table [V, D] of the tokens' embeddings."""
        return dict(nnx.to_flat_state(self.weights))["embed_tokens", "weight"].get_value()

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of embeddings and activations."""
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))


def init_model(
    config: ModelConfig,
    key: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    specs: Specs = (),
    bank: AdapterBank | None = None,
) -> Model:
    """A model of random weights; adapters in the bank, if any, are zero."""
    module = _build(config, specs, bank, dtype, key)
    return Model(config, nnx.state(module), specs, bank)


def abstract_model(
    config: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
    specs: Specs = (),
    bank: AdapterBank | None = None,
) -> Model:
    """The same with shapes and dtypes (`jax.ShapeDtypeStruct`) in place of arrays."""
    module = nnx.eval_shape(lambda: _build(config, specs, bank, dtype, jax.random.key(0)))
    return Model(config, nnx.state(module), specs, bank)


def linear_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (K, N)) of every linear of the blocks, in order."""
    for path, variable in nnx.to_flat_state(abstract_model(config).weights):
        if path[0] == "layers" and path[-1] == "kernel":
            yield ".".join(map(str, path[:-1])), variable.get_value().shape


def _build(
    config: ModelConfig,
    specs: Specs,
    bank: AdapterBank | None,
    dtype: jnp.dtype,
    key: jax.Array,
) -> Transformer:
    return Transformer(config, LinearFactory(dict(specs), bank, dtype, nnx.Rngs(params=key)))


@functools.lru_cache(maxsize=64)  # a server holds a handful of structures; the trace needs them
def _structure(
    config: ModelConfig, specs: Specs, bank: AdapterBank | None
) -> nnx.GraphDef[Transformer]:
    module = nnx.eval_shape(lambda: _build(config, specs, bank, jnp.float32, jax.random.key(0)))
    return nnx.graphdef(module)
