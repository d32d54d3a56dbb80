"""The next token of each row of a launch, chosen on the device.

What a request asks for is written once into a `SamplingTable` on the host, when it is given one of
the R rows of running requests; a launch takes its rows out of the table. What changes with every
token, or is too large to travel with every launch, is the `SamplingState` on the device.

Letters: R rows of running requests, B rows of a launch, V vocabulary, W words of V bits.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.serve.request import (
    INT_LIMIT,
    LOGIT_BIAS_LIMIT,
    LOGPROBS_LIMIT,
    STOP_TOKENS_LIMIT,
    SamplingParams,
)

# Stop tokens of a row: the request's, and the end-of-text tokens of its model (Llama 3 has three).
STOP_WIDTH = STOP_TOKENS_LIMIT + 8
NO_TOKEN = -1
# An entry of `SamplingState.counts`: this bit if the prompt holds the token, and below it how often
# the response does.
PROMPT_BIT = 1 << 15
MAX_COUNT = PROMPT_BIT - 1
WORD = 32  # bits


class Variant(enum.IntEnum):
    """How much of sampling a launch compiles: each does what those before it do, and more."""

    GREEDY = 0  # the largest logit: no counts, no random numbers, no log probabilities
    FULL = 1
    MASKED = 2  # with a mask of allowed tokens from the host


def variant_of(params: Iterable[SamplingParams]) -> Variant:
    """The least variant that serves all of these together."""
    needed = (
        Variant.MASKED if p.structured else Variant.GREEDY if p.greedy else Variant.FULL
        for p in params
    )
    return max(needed, default=Variant.GREEDY)


class Ints[T](NamedTuple):
    """The whole numbers of a row."""

    top_k: T
    seed: T  # the bits of a uint32
    wants_logprobs: T
    is_biased: T
    stop_from: T  # the first position that may take a stop token


class Floats[T](NamedTuple):
    """The other numbers of a row, named as in `SamplingParams`."""

    temperature: T
    top_p: T
    min_p: T
    repetition_penalty: T
    frequency_penalty: T
    presence_penalty: T


NEUTRAL_INTS = Ints(top_k=INT_LIMIT, seed=0, wants_logprobs=0, is_biased=0, stop_from=0)
NEUTRAL_FLOATS = Floats(
    temperature=0.0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingBatch[A: (np.ndarray, jax.Array)]:
    """How each row of a launch is sampled, packed: two small arrays travel faster than a dozen.

    A is numpy's array on the host, and JAX's within `sample`.

    Attributes:
      ints: int32 [B, fields of `Ints`, then STOP_WIDTH stop tokens, NO_TOKEN where fewer].
      floats: float32 [B, fields of `Floats`].
      masks: uint32 [B, W], bit t % 32 of word t // 32 set where token t is allowed; None for all.
    """

    ints: A
    floats: A
    masks: A | None = None

    @property
    def unpacked_ints(self) -> Ints[A]:
        """int32 [B] each."""
        return Ints(*self.ints[:, : len(Ints._fields)].T)

    @property
    def unpacked_floats(self) -> Floats[A]:
        """float32 [B] each."""
        return Floats(*self.floats.T)


class SamplingTable:
    """What the running requests ask for, on the host.

    Args:
      rows: R; a further row is padding's, greedy and never changed.
    """

    def __init__(self, rows: int):
        stops = np.full((rows + 1, STOP_WIDTH), NO_TOKEN, np.int32)
        ints = np.tile(np.array(NEUTRAL_INTS, np.int32), (rows + 1, 1))
        self._ints = np.concatenate([ints, stops], axis=1)
        self._floats = np.tile(np.array(NEUTRAL_FLOATS, np.float32), (rows + 1, 1))

    def enter(
        self, row: int, params: SamplingParams, seed: int, eos_ids: Iterable[int], prompt: int
    ) -> None:
        """Write a request into a row.

        Args:
          seed: in place of that in `params`, which may be None.
          eos_ids: of its model.
          prompt: tokens of its prompt.
        """
        eos = () if params.ignore_eos else eos_ids
        stops = sorted({*params.stop_tokens, *eos})
        if len(stops) > STOP_WIDTH:
            raise ValueError(f"There is room for {STOP_WIDTH} stop tokens, got {len(stops)}.")
        ints = Ints(
            top_k=INT_LIMIT if params.top_k is None else params.top_k,
            seed=np.uint32(seed).view(np.int32),
            wants_logprobs=params.logprobs is not None,
            is_biased=bool(params.logit_bias),
            stop_from=prompt + params.min_tokens,
        )
        self._ints[row] = [*ints, *stops, *[NO_TOKEN] * (STOP_WIDTH - len(stops))]
        self._floats[row] = [getattr(params, name) for name in Floats._fields]

    def batch(self, rows: np.ndarray, masks: np.ndarray | None = None) -> SamplingBatch[np.ndarray]:
        """The rows of a launch: int32 [B], R for padding. The arrays are new ones."""
        return SamplingBatch(self._ints[rows], self._floats[rows], masks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What the device keeps for the running requests; the last row is padding's.

    Attributes:
      counts: uint16 [R + 1, V], which tokens there were, see PROMPT_BIT; only rows of requests with
        penalties mean anything.
      bias_ids: int32 [R + 1, LOGIT_BIAS_LIMIT], V where fewer.
      bias: float32 [R + 1, LOGIT_BIAS_LIMIT].
    """

    counts: jax.Array
    bias_ids: jax.Array
    bias: jax.Array

    @classmethod
    def zeros(cls, rows: int, vocab_size: int) -> "SamplingState":
        """Room for R = `rows` requests."""
        biases = (rows + 1, LOGIT_BIAS_LIMIT)
        return cls(
            jnp.zeros((rows + 1, vocab_size), jnp.uint16),
            jnp.full(biases, vocab_size, jnp.int32),
            jnp.zeros(biases, jnp.float32),
        )


def enter(
    state: SamplingState,
    row: int,
    params: SamplingParams,
    prompt: Sequence[int],
    response: Sequence[int],
) -> SamplingState:
    """The state with a request in a row; only those with `params.has_state` need it.

    Args:
      state: donated.
      response: what it has generated so far, if it comes back after preemption.
    """
    V = state.counts.shape[1]
    counts = np.zeros(V, np.uint16)
    if params.penalized:
        counts += np.minimum(np.bincount(response, minlength=V), MAX_COUNT).astype(np.uint16)
        counts[list(prompt)] |= PROMPT_BIT
    bias_ids = np.full(LOGIT_BIAS_LIMIT, V, np.int32)
    bias = np.zeros(LOGIT_BIAS_LIMIT, np.float32)
    bias_ids[: len(params.logit_bias)] = list(params.logit_bias)
    bias[: len(params.logit_bias)] = list(params.logit_bias.values())
    return _set_row(state, np.int32(row), (counts, bias_ids, bias))


@functools.partial(jax.jit, donate_argnames=("state",))
def _set_row(state: SamplingState, row: jax.Array, new: tuple[jax.Array, ...]) -> SamplingState:
    fields = state.counts, state.bias_ids, state.bias
    return SamplingState(*(x.at[row].set(y) for x, y in zip(fields, new, strict=True)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """One new token of each row.

    Attributes:
      token: int32 [B].
      broken: bool [B]: the logits of this row hold a NaN or plus infinity; its token means nothing.
      logprob: float32 [B], of the token under the model; None, as those below, for greedy.
      top_ids: int32 [B, K], the likeliest tokens under the model, best first, K = LOGPROBS_LIMIT or
        V if that is less.
      top_logprobs: float32 [B, K].
    """

    token: jax.Array
    broken: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample(
    logits: jax.Array,
    batch: SamplingBatch[jax.Array],
    state: SamplingState,
    rows: jax.Array,
    position: jax.Array,
    active: jax.Array,
    variant: Variant,
) -> tuple[Sampled, SamplingState]:
    """Choose a token of each row; no row's choice depends on another row.

    The order of things is that of `SamplingParams`. The random numbers of a row come from
    fold_in(key(seed), position), and belong to tokens of the vocabulary, so that they are the same
    in any batch and after preemption.

    Args:
      logits: float32 [B, V].
      rows: int32 [B], the rows of the state, R for padding.
      position: int32 [B], of the token that is being chosen.
      active: bool [B]; rows that are not leave the state as it is.
      variant: static; one that serves every row, see `variant_of`.
    """
    with jax.named_scope("sample"):
        # Not the largest: over thousands of logits XLA's max on a CPU passes over a NaN.
        broken = ~jnp.all(logits < jnp.inf, axis=-1)
        if variant == Variant.GREEDY:
            allowed = _without_early_stops(logits, batch, position)
            return Sampled(_argmax(allowed), broken), state
        ints = batch.unpacked_ints
        processed = processed_logits(logits, batch, state, rows, position, variant)
        random = batch.unpacked_floats.temperature > 0
        token = jax.lax.cond(
            jnp.any(random),
            lambda: _argmax(processed + _noise(ints.seed, position, random, logits.shape[1])),
            lambda: _argmax(processed),
        )
        logprobs = _logprobs(logits, token, ints)
        counts = _counted(state.counts, jnp.where(active, rows, len(state.counts)), token)
        return Sampled(token, broken, *logprobs), dataclasses.replace(state, counts=counts)


def processed_logits(
    logits: jax.Array,
    batch: SamplingBatch[jax.Array],
    state: SamplingState,
    rows: jax.Array,
    position: jax.Array,
    variant: Variant,
) -> jax.Array:
    """The logits [B, V] that a token is drawn from, or whose largest is taken; as in `sample`."""
    ints, floats = batch.unpacked_ints, batch.unpacked_floats
    V = logits.shape[1]
    logits = _biased(logits, ints, state, rows)
    logits = _penalized(logits, floats, state.counts[rows])
    logits = _without_early_stops(logits, batch, position)
    if variant == Variant.MASKED:
        assert batch.masks is not None
        logits = jnp.where(_bits(batch.masks, V), logits, -jnp.inf)
    random = floats.temperature > 0
    logits = logits / jnp.where(random, floats.temperature, 1)[:, None]
    truncates = random & ((ints.top_k < V) | (floats.top_p < 1) | (floats.min_p > 0))
    # Most of the work; launches without a row that needs it go without.
    return jax.lax.cond(
        jnp.any(truncates), lambda: _truncated(logits, ints, floats), lambda: logits
    )


def is_stop(token: jax.Array, batch: SamplingBatch[jax.Array]) -> jax.Array:
    """Whether a token int32 [B] is one of its row's stop tokens: bool [B].

    There is no need to ask for `min_tokens`: before, `sample` does not choose them.
    """
    return jnp.any(token[:, None] == _stop_ids(batch), axis=1)


def _biased(logits: jax.Array, ints: Ints, state: SamplingState, rows: jax.Array) -> jax.Array:
    B, V = logits.shape
    ids = jnp.where(ints.is_biased[:, None] > 0, state.bias_ids[rows], V)
    return logits.at[jnp.arange(B)[:, None], ids].add(state.bias[rows], mode="drop")


def _penalized(logits: jax.Array, floats: Floats, counts: jax.Array) -> jax.Array:
    """Logits [B, V] less the penalties for what `counts` [B, V] says there was."""
    repetition = floats.repetition_penalty[:, None]
    frequency, presence = floats.frequency_penalty[:, None], floats.presence_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    in_response = (counts & MAX_COUNT).astype(jnp.float32)
    return logits - frequency * in_response - presence * (in_response > 0)


def _without_early_stops(
    logits: jax.Array, batch: SamplingBatch[jax.Array], position: jax.Array
) -> jax.Array:
    B, V = logits.shape
    ids = _stop_ids(batch)
    early = (position < batch.unpacked_ints.stop_from)[:, None] & (ids != NO_TOKEN)
    ids = jnp.where(early, ids, V)
    return logits.at[jnp.arange(B)[:, None], ids].set(-jnp.inf, mode="drop")


def _stop_ids(batch: SamplingBatch[jax.Array]) -> jax.Array:
    """int32 [B, STOP_WIDTH]."""
    return batch.ints[:, len(Ints._fields) :]


def _bits(masks: jax.Array, count: int) -> jax.Array:
    """Words uint32 [B, W] as bool [B, count]."""
    bits = (masks[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(masks), -1)[:, :count] > 0


def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _noise(seed: jax.Array, position: jax.Array, random: jax.Array, V: int) -> jax.Array:
    """Gumbel noise [B, V] for rows that are random [B]: the largest of it plus logits is a draw."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(jax.lax.bitcast_convert_type(seed, jnp.uint32))
        return jax.random.gumbel(jax.random.fold_in(key, position), (V,))

    return jnp.where(random[:, None], jax.vmap(row)(seed, position), 0)


def _truncated(logits: jax.Array, ints: Ints, floats: Floats) -> jax.Array:
    """Logits [B, V] with -inf where top_k, top_p or min_p leaves a token out."""
    logits = jnp.where(_fewest(logits, jnp.ones_like(logits), ints.top_k), logits, -jnp.inf)
    probability = jax.nn.softmax(logits, axis=-1)
    # Sums of many small numbers may come short of 1, so that it takes all; or reach it early.
    kept = _fewest(logits, probability, floats.top_p) | (floats.top_p >= 1)[:, None]
    kept &= probability >= (floats.min_p * jnp.max(probability, axis=-1))[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _fewest(logits: jax.Array, weight: jax.Array, goal: jax.Array) -> jax.Array:
    """The fewest of the largest logits [B, V] whose weights reach a goal [B]: bool [B, V].

    Equal logits must have equal weights; those of lower number come first. The least logit that is
    needed is found bit by bit, in 32 sums: a sort takes a CPU many times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    top = jnp.uint32(1 << 31)
    order = jnp.where(logits < 0, ~bits, bits | top)  # as the numbers are ordered

    def reaches(least: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order >= least[:, None], weight, 0), axis=-1) >= goal

    def add_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        larger = least | (top >> i.astype(jnp.uint32))
        return jnp.where(reaches(larger), larger, least)

    least = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(len(logits), jnp.uint32))[:, None]
    equal = jnp.where(order == least, weight, 0)
    missing = goal - jnp.sum(jnp.where(order > least, weight, 0), axis=-1)
    before = jnp.cumsum(equal, axis=-1) - equal
    return (order > least) | ((order == least) & (before < missing[:, None]))


def _logprobs(
    logits: jax.Array, token: jax.Array, ints: Ints
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the token [B], and the likeliest [B, K] tokens with theirs; zeros where nobody asks."""
    B, K = len(logits), min(LOGPROBS_LIMIT, logits.shape[1])

    zeros = jnp.zeros(B), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K))
    wanted = jnp.any(ints.wants_logprobs > 0)
    return jax.lax.cond(wanted, lambda: token_logprobs(logits, token), lambda: zeros)


def token_logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Natural log probabilities under the model, of `logits` [B, V].

    Returns:
      (that of `token` int32 [B], the likeliest tokens int32 [B, K], theirs), as in `Sampled`.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logprobs, min(LOGPROBS_LIMIT, logits.shape[1]))
    return jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0], ids, top


def _counted(counts: jax.Array, rows: jax.Array, token: jax.Array) -> jax.Array:
    """Counts [R + 1, V] with one more of each row's token; rows beyond R count nothing."""
    more = (counts[rows, token] & MAX_COUNT) < MAX_COUNT
    return counts.at[rows, token].add(more.astype(jnp.uint16), mode="drop")
