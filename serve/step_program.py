"""What runs on the device: two programs, their state in and their state out.

`prefill` writes chunks of prompts into the cache. `decode` adds up to K tokens to rows of all
models that share weights: ordinary rows and icarus rows, whatever their adapters and sampling. A
row's last token, its length and whether it has ended stay on the device, so that a launch can
follow another before anybody has seen what that one made.

Letters: R rows of running sequences, B rows of a launch, T tokens a row of a prefill, P pages a
row, K most tokens a decode launch makes, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcodec.models.cache import KVCache, PageTable
from jaxcodec.models.transformer import Model
from jaxcodec.serve.rows import WIDTH, Columns, PrefillNumbers
from jaxcodec.serve.sampling import (
    SamplingBatch,
    SamplingState,
    Variant,
    is_stop,
    sample,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What the device knows of running sequences; the last row is padding's.

    Attributes:
      token: int32 [R + 1], the last one, which is not in the cache yet.
      length: int32 [R + 1], tokens in the cache.
      ended: bool [R + 1], nothing follows `token`.
      sampling: see `SamplingState`.
    """

    token: jax.Array
    length: jax.Array
    ended: jax.Array
    sampling: SamplingState

    @classmethod
    def zeros(cls, rows: int, vocab_size: int) -> "RowState":
        """Room for R = `rows` sequences."""
        numbers = jnp.zeros((2, rows + 1), jnp.int32)
        sampling = SamplingState.zeros(rows, vocab_size)
        return cls(numbers[0], numbers[1], jnp.zeros(rows + 1, bool), sampling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """What a decode launch made.

    Attributes:
      numbers: int32 [B, K + 2]: the tokens, how many of them there are, and whether the logits
        after them were not finite, which ended the row.
      logprob, top_ids, top_logprobs: as in `Sampled`, for each token [B, K, ...].
    """

    numbers: jax.Array
    logprob: jax.Array | None
    top_ids: jax.Array | None
    top_logprobs: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the rows of a decode launch have in common; static.

    Attributes:
      two_streams: there are icarus rows.
      own_encoders: there are rows whose adapter writes their cache.
    """

    two_streams: bool = False
    own_encoders: bool = False


class Structure:
    """How the leaves of a model make a model; equal structures are one object.

    A jitted call hashes its static arguments every time, and a tree of hundreds of variables takes
    longer to hash than the call to run.
    """

    _known: ClassVar[dict[Any, "Structure"]] = {}

    def __init__(self, tree: Any):
        self.tree = tree

    @classmethod
    def of(cls, model: Model) -> tuple["Structure", list[jax.Array]]:
        """A model's structure and its leaves."""
        leaves, tree = jax.tree.flatten(model)
        return cls._known.setdefault(tree, cls(tree)), leaves

    def model(self, leaves: Sequence[jax.Array]) -> Model:
        """The model of these leaves."""
        return jax.tree.unflatten(self.tree, leaves)


@functools.partial(jax.jit, static_argnames=("structure", "adapted"), donate_argnames=("cache",))
def prefill(
    leaves: list[jax.Array],
    cache: KVCache,
    batch: PrefillNumbers,
    structure: Structure,
    adapted: bool,
) -> KVCache:
    """The cache with the tokens of `batch` written; a row may read what another one writes.

    Args:
      adapted: static; whether slots mean anything.
    """
    start, count, slot = batch.numbers[:, :3].T
    table = PageTable(batch.numbers[:, 3:], start)
    module = structure.model(leaves).module
    _, cache = module(batch.tokens, cache, table, count, slots=slot if adapted else None)
    return cache


@functools.partial(
    jax.jit,
    static_argnames=("structure", "layout", "variant", "steps"),
    donate_argnames=("cache", "state"),
)
def decode(
    leaves: list[jax.Array],
    cache: KVCache,
    state: RowState,
    numbers: jax.Array,
    sampling: SamplingBatch,
    structure: Structure,
    layout: Layout,
    variant: Variant,
    steps: int,
) -> tuple[Made, KVCache, RowState]:
    """Add tokens to rows until each has its budget or has ended.

    Args:
      numbers: int32 [B, WIDTH + P], see `RowTable.launch`.
      layout, variant: static; they must serve every row.
      steps: K, static; no row's budget is larger.
    """
    row = Columns(*numbers[:, :WIDTH].T)
    model = structure.model(leaves)
    module = model.module
    slots = None if model.bank is None else row.slot
    encoder_slots = row.encoder_slot if layout.own_encoders else None
    fresh = row.fresh > 0

    def advance(carry):
        cache, token, length, ended, count, broken, sampling_state, made = carry
        active = ~ended & (count < row.budget)
        hidden, cache = module(
            token[:, None],
            cache,
            PageTable(numbers[:, WIDTH:], length),
            active.astype(jnp.int32),
            slots=slots,
            streams=2 if layout.two_streams else 1,
            encoder_slots=encoder_slots,
        )
        logits = module.logits(hidden)[:, 0]
        sampled, sampling_state = sample(
            logits, sampling, sampling_state, row.row, length + 1, active, variant
        )
        good = active & ~sampled.broken
        at = jnp.where(good, count, steps)  # beyond the last, where nothing is written
        made = jax.tree.map(
            lambda all, new: all.at[jnp.arange(B), at].set(new, mode="drop"), made, sampled
        )
        token = jnp.where(good, sampled.token, token)
        length, count = length + active, count + good
        broken |= active & sampled.broken
        ended |= active & (sampled.broken | is_stop(token, sampling))
        return cache, token, length, ended, count, broken, sampling_state, made

    B = len(numbers)
    none = jnp.zeros(B, jnp.int32)
    nothing = jax.eval_shape(
        lambda logits: sample(logits, sampling, state.sampling, row.row, none, none > 0, variant)[
            0
        ],
        jax.ShapeDtypeStruct((B, model.config.vocab_size), jnp.float32),
    )
    carry = (
        cache,
        jnp.where(fresh, row.token, state.token[row.row]),
        jnp.where(fresh, row.length, state.length[row.row]),
        ~fresh & state.ended[row.row],
        none,
        none > 0,
        state.sampling,
        jax.tree.map(lambda s: jnp.zeros((B, steps, *s.shape[1:]), s.dtype), nothing),
    )
    cache, token, length, ended, count, broken, sampling_state, made = jax.lax.while_loop(
        lambda carry: jnp.any(~carry[3] & (carry[4] < row.budget)), advance, carry
    )
    state = RowState(
        state.token.at[row.row].set(token),
        state.length.at[row.row].set(length),
        state.ended.at[row.row].set(ended),
        sampling_state,
    )
    packed = jnp.concatenate([made.token, count[:, None], broken[:, None]], axis=1)
    return Made(packed, made.logprob, made.top_ids, made.top_logprobs), cache, state
