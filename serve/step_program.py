"""What runs on the device: three programs, their state in and their state out.

`prefill` writes chunks of prompts into the cache, and `score` chunks of responses that are given,
with the log probability of each token. `decode` adds up to K tokens to rows of all
models that share weights: ordinary rows and icarus rows, whatever their adapters and sampling. A
row's last token, its length and whether it has ended stay on the device, so that a launch can
follow another before anybody has seen what that one made.

Letters: R rows of running sequences, B rows of a launch, T tokens a row of a prefill, P pages a
row, K most tokens a decode launch makes, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcodec.models.cache import KVCache, PageTable
from jaxcodec.models.transformer import Model
from jaxcodec.serve.rows import WIDTH, Columns, PrefillNumbers
from jaxcodec.serve.sampling import (
    Sampled,
    SamplingBatch,
    SamplingState,
    Variant,
    is_stop,
    sample,
    token_logprobs,
)

# While given tokens are scored: 64 MB of float32, in what the cache has left of the memory.
LOGITS_AT_ONCE = 2**24


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


class ModelTree:
    """How the leaves of a model make a model; equal structures are one object.

    A jitted call hashes its static arguments every time, and a tree of hundreds of variables takes
    longer to hash than the call to run.
    """

    _known: ClassVar[dict[Any, "ModelTree"]] = {}

    def __init__(self, tree: Any):
        self.tree = tree

    @classmethod
    def of(cls, model: Model) -> tuple["ModelTree", list[jax.Array]]:
        """A model's structure and its leaves."""
        leaves, tree = jax.tree.flatten(model)
        return cls._known.setdefault(tree, cls(tree)), leaves

    def model(self, leaves: Sequence[jax.Array]) -> Model:
        """The model of these leaves."""
        return jax.tree.unflatten(self.tree, leaves)


@functools.partial(jax.jit, static_argnames=("tree", "adapted"), donate_argnames=("cache",))
def prefill(
    leaves: list[jax.Array],
    cache: KVCache,
    batch: PrefillNumbers[jax.Array],
    tree: ModelTree,
    adapted: bool,
) -> KVCache:
    """The cache with the tokens of `batch` written; a row may read what another one writes.

    Args:
      adapted: static; whether slots mean anything.
    """
    start, count, slot = batch.numbers[:, :3].T
    table = PageTable(batch.numbers[:, 3:], start)
    module = tree.model(leaves).module
    _, cache = module(batch.tokens, cache, table, count, slots=slot if adapted else None)
    return cache


@functools.partial(jax.jit, static_argnames=("tree", "layout"), donate_argnames=("cache",))
def score(
    leaves: list[jax.Array],
    cache: KVCache,
    batch: PrefillNumbers[jax.Array],
    targets: jax.Array,
    encoder_slots: jax.Array,
    tree: ModelTree,
    layout: Layout,
) -> tuple[Made, KVCache]:
    """The log probabilities of tokens that are given, and the cache with those before them written.

    As `decode` would have it, token by token, if it chose them: the tokens of `batch` are run by
    the model that answers, and its logits at each are held against the next one.

    Args:
      targets: int32 [B, T], what follows each token of `batch`.
      encoder_slots: int32 [B], see `Columns`.
      layout: static; it must serve every row.

    Returns:
      `Made` of which K = 0 are new tokens, with log probabilities [B, T, ...]; the count of a row
      is that of its targets, or 0 if any logits of it are not finite.
    """
    start, count, slot = batch.numbers[:, :3].T
    model = tree.model(leaves)
    module = model.module
    hidden, cache = module(
        batch.tokens,
        cache,
        PageTable(batch.numbers[:, 3:], start),
        count,
        slots=None if model.bank is None else slot,
        streams=2 if layout.two_streams else 1,
        encoder_slots=encoder_slots if layout.own_encoders else None,
    )

    def position(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        logits = module.logits(at[0][None, None])[0]
        finite = jnp.all(logits < jnp.inf)  # see `sample`
        return finite, *(x[0] for x in token_logprobs(logits, at[1][None]))

    B, T = targets.shape
    positions = hidden.reshape(B * T, -1), targets.reshape(B * T)
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    made = jax.lax.map(position, positions, batch_size=min(at_once, B * T))
    finite, *logprobs = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), made)
    broken = jnp.any(~finite & (jnp.arange(T)[None] < count[:, None]), axis=1)
    numbers = jnp.stack([jnp.where(broken, 0, count), broken.astype(jnp.int32)], axis=1)
    return Made(numbers, *logprobs), cache


class _Rows(NamedTuple):
    """The rows of a launch between two tokens.

    Attributes:
      cache: of keys and values.
      token, length, ended: int32, int32, bool [B], as in `RowState`.
      count: int32 [B], tokens made.
      broken: bool [B], as in `Sampled`, of the row's last logits.
      sampling: of all R rows.
      made: `Sampled` of every token, [B, K, ...].
    """

    cache: KVCache
    token: jax.Array
    length: jax.Array
    ended: jax.Array
    count: jax.Array
    broken: jax.Array
    sampling: SamplingState
    made: Sampled

    @classmethod
    def entering(cls, cache: KVCache, state: RowState, row: Columns, made: Sampled) -> "_Rows":
        """As the host says if they are fresh, else as they were left."""
        fresh, at = row.fresh > 0, row.row
        return cls(
            cache,
            jnp.where(fresh, row.token, state.token[at]),
            jnp.where(fresh, row.length, state.length[at]),
            ~fresh & state.ended[at],
            jnp.zeros_like(at),
            jnp.zeros_like(fresh),
            state.sampling,
            made,
        )

    def active(self, budget: jax.Array) -> jax.Array:
        """Which rows take another token: bool [B]."""
        return ~self.ended & (self.count < budget)

    def after(
        self,
        active: jax.Array,
        new: Sampled,
        stops: jax.Array,
        cache: KVCache,
        sampling: SamplingState,
    ) -> "_Rows":
        """With a new token in those that are active, unless their logits are broken."""
        good = active & ~new.broken
        B, K = self.made.token.shape
        at = jnp.where(good, self.count, K)  # beyond the last, where nothing is written
        put = lambda all, one: all.at[jnp.arange(B), at].set(one, mode="drop")
        return _Rows(
            cache,
            jnp.where(good, new.token, self.token),
            self.length + active,
            self.ended | (active & (new.broken | stops)),
            self.count + good,
            self.broken | (active & new.broken),
            sampling,
            jax.tree.map(put, self.made, new),
        )

    def result(self) -> Made:
        """What the launch made, for the host."""
        made = self.made
        numbers = [made.token, self.count[:, None], self.broken[:, None].astype(jnp.int32)]
        packed = jnp.concatenate(numbers, axis=1)
        return Made(packed, made.logprob, made.top_ids, made.top_logprobs)

    def left(self, state: RowState, at: jax.Array) -> RowState:
        """The state of all rows, with these at `at` [B] as they are now."""
        return RowState(
            state.token.at[at].set(self.token),
            state.length.at[at].set(self.length),
            state.ended.at[at].set(self.ended),
            self.sampling,
        )


@functools.partial(
    jax.jit,
    static_argnames=("tree", "layout", "variant", "steps"),
    donate_argnames=("cache", "state"),
)
def decode(
    leaves: list[jax.Array],
    cache: KVCache,
    state: RowState,
    numbers: jax.Array,
    sampling: SamplingBatch,
    tree: ModelTree,
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
    model = tree.model(leaves)
    module = model.module

    def forward(cache: KVCache, token: jax.Array, length: jax.Array, active: jax.Array):
        hidden, cache = module(
            token[:, None],
            cache,
            PageTable(numbers[:, WIDTH:], length),
            active.astype(jnp.int32),
            slots=None if model.bank is None else row.slot,
            streams=2 if layout.two_streams else 1,
            encoder_slots=row.encoder_slot if layout.own_encoders else None,
        )
        return module.logits(hidden)[:, 0], cache

    def advance(rows: _Rows) -> _Rows:
        active = rows.active(row.budget)
        logits, cache = forward(rows.cache, rows.token, rows.length, active)
        sampled, state = sample(
            logits, sampling, rows.sampling, row.row, rows.length + 1, active, variant
        )
        return rows.after(active, sampled, is_stop(sampled.token, sampling), cache, state)

    logits = jax.ShapeDtypeStruct((len(numbers), model.config.vocab_size), jnp.float32)
    none = jnp.zeros_like(row.row)
    nothing, _ = jax.eval_shape(
        lambda logits: sample(logits, sampling, state.sampling, row.row, none, none > 0, variant),
        logits,
    )
    made = jax.tree.map(lambda s: jnp.zeros((len(none), steps, *s.shape[1:]), s.dtype), nothing)
    rows = jax.lax.while_loop(
        lambda rows: jnp.any(rows.active(row.budget)),
        advance,
        _Rows.entering(cache, state, row, made),
    )
    return rows.result(), rows.cache, rows.left(state, row.row)
