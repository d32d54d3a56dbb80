"""The next token of each row of a batch, chosen on the device.

Letters: B rows, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.serve.request import INT_LIMIT, SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch:
    """How each row of a batch is sampled.

    Attributes:
      temperature: float32 [B]; 0 for greedy.
      top_k: int32 [B]; V or more for all tokens.
      top_p: float32 [B], in (0, 1].
      seed: uint32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], rows: int
    ) -> "SamplingBatch":
        """The parameters of the first rows of a batch; the rest of the `rows` is greedy.

        Args:
          seeds: in place of those in `params`, which may be None.
        """
        temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        top_k, seed = np.full(rows, INT_LIMIT, np.int32), np.zeros(rows, np.uint32)
        for b, p in enumerate(params):
            temperature[b], top_p[b] = p.temperature, p.top_p
            top_k[b] = INT_LIMIT if p.top_k is None else p.top_k
        seed[: len(seeds)] = seeds
        return cls(*(jnp.asarray(field) for field in (temperature, top_k, top_p, seed)))


def sample(
    logits: jax.Array, sampling: SamplingBatch, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Choose a token of each row; no row's choice depends on another row.

    Temperature first, then top-k, then top-p of what is left. The random numbers of a row come
    from fold_in(key(seed), position), so that they are the same in any batch and after preemption.

    Args:
      logits: float32 [B, V].
      position: int32 [B], of the token that is being chosen.

    Returns:
      (int32 [B] tokens, bool [B]: the logits of this row hold a NaN or plus infinity, and its token
      means nothing).
    """
    with jax.named_scope("sample"):
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # The sort is most of the work; batches that are wholly greedy go without.
        tokens = jax.lax.cond(
            jnp.any(sampling.temperature > 0),
            lambda: jnp.where(
                sampling.temperature > 0,
                jax.vmap(_sample_row)(logits, sampling, position),
                greedy,
            ),
            lambda: greedy,
        )
        # max is NaN where any is
        return tokens, ~(jnp.max(logits, axis=-1) < jnp.inf)


def _sample_row(logits_v: jax.Array, row: SamplingBatch, position: jax.Array) -> jax.Array:
    order = jnp.argsort(logits_v, descending=True, stable=True)
    scaled = logits_v[order] / jnp.where(row.temperature > 0, row.temperature, 1)
    scaled = jnp.where(jnp.arange(scaled.shape[0]) < row.top_k, scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled)
    # A token stays while those more likely than it have not reached top_p: the first always.
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < row.top_p) | (row.top_p >= 1)  # sums of many small numbers may round up to 1
    scaled = jnp.where(kept, scaled, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(row.seed), position)
    return order[jax.random.categorical(key, scaled)].astype(jnp.int32)
