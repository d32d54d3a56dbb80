"""Pure, jitted steps: prefill, decode, the training forward, and plain greedy generation.

Every request of every scheme runs alike. `prefill` lets the prompt's writer fill the cache for all
tokens of the prompt but the last; `decode_step` takes that last token, and then each new one, and
gives the logits of the next. So prefill needs no output head, and a model that only reads the
prompt's cache needs to run for one token of the prompt.

Letters: B rows, T tokens in this call, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.models.cache import KVCache, PageTable, identity_table, pages_for
from jaxcodec.models.scheme import CONVENTIONAL, PREFILL_SHARE, Scheme
from jaxcodec.models.transformer import Model

# Tokens in a page of plain generation and training; the tables are the identity, so any will do.
PAGE_SIZE = 16


@functools.partial(jax.jit, donate_argnames=("cache",))
def prefill(
    model: Model,
    cache: KVCache,
    table: PageTable,
    tokens: jax.Array,
    counts: jax.Array,
    slots: jax.Array | None = None,
) -> KVCache:
    """The cache after `tokens[b, :counts[b]]` are written from position `table.length[b]` on.

    Args:
      model: the writer of the prompt.
      cache: donated.
      tokens: int32 [B, T]; call again with `table.advanced(counts)` for a further chunk.
      counts: int32 [B], real tokens of each row.
      slots: int32 [B], adapter of each row; None for the writer's own weights.
    """
    _check_slots(model, slots)
    _, cache = model.module(tokens, cache, table, counts, slots=slots)
    return cache


@functools.partial(jax.jit, static_argnames=("streams",), donate_argnames=("cache",))
def decode_step(
    model: Model,
    cache: KVCache,
    table: PageTable,
    tokens: jax.Array,
    slots: jax.Array | None = None,
    streams: int = 1,
) -> tuple[jax.Array, KVCache]:
    """Logits after one more token of every row, and the cache with its keys and values.

    Args:
      model: the model that answers; with two streams, base and adapters in one.
      cache: donated.
      tokens: int32 [B], the token at position `table.length[b]`.
      slots: int32 [B], adapter of each row; None for none.
      streams: `Scheme.streams`: 2 runs the frozen encoder, which writes the cache, and the decoder,
        which carries the adapter, over one read of the weights and one of the cache.

    Returns:
      (float32 logits [B, V] of the next token, the new cache).
    """
    _check_slots(model, slots)
    counts = jnp.ones_like(tokens)
    module = model.module
    hidden, cache = module(tokens[:, None], cache, table, counts, slots=slots, streams=streams)
    return module.logits(hidden)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("scheme",))
def forward(
    model: Model,
    tokens: jax.Array,
    counts: jax.Array,
    scheme: Scheme = CONVENTIONAL,
    prompt_lengths: jax.Array | None = None,
    base: Model | None = None,
    slots: jax.Array | None = None,
) -> jax.Array:
    """Logits of every position at once, as `prefill` and `decode_step` would give them: to train.

    Args:
      model: the model in training. For icarus it is the base with an adapter in its bank: the
        encoder stream is the base, and no gradient passes through it.
      tokens: int32 [B, T].
      counts: int32 [B], real tokens of each row.
      scheme: who writes the cache.
      prompt_lengths: int32 [B], needed by prefill_share: the base writes positions before
        prompt_length - 1, the model itself the rest.
      base: the frozen writer of prompts for prefill_share; no gradient reaches it.
      slots: int32 [B], adapter of each row; None for none.

    Returns:
      float32 [B, T, V]; those at t predict token t + 1. For prefill_share, logits before
      prompt_length - 1 answer no question that serving asks.
    """
    states = hidden_states(model, tokens, counts, scheme, prompt_lengths, base, slots)
    return model.module.logits(states)


def hidden_states(
    model: Model,
    tokens: jax.Array,
    counts: jax.Array,
    scheme: Scheme = CONVENTIONAL,
    prompt_lengths: jax.Array | None = None,
    base: Model | None = None,
    slots: jax.Array | None = None,
) -> jax.Array:
    """What `forward` makes its logits of, [B, T, D]: for whoever has no room for all of them.

    Arguments and errors are those of `forward`; not jitted.
    """
    _check_slots(model, slots)
    B, T = tokens.shape
    table = identity_table(B, T, PAGE_SIZE)
    cache = KVCache.zeros(model.config, B * pages_for(T, PAGE_SIZE), PAGE_SIZE, model.dtype)
    write_from = None
    if scheme == PREFILL_SHARE:
        if base is None or prompt_lengths is None:
            raise ValueError("prefill_share needs the base model and prompt_lengths.")
        write_from = prompt_lengths - 1
        cache = jax.lax.stop_gradient(prefill(base, cache, table, tokens, write_from))
    elif base is not None:
        raise ValueError("Only prefill_share takes a base apart; icarus holds it in the model.")
    hidden, _ = model.module(
        tokens,
        cache,
        table,
        counts,
        slots=slots,
        streams=scheme.streams,
        write_from=write_from,
    )
    return hidden


def generate(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    slots: list[int] | None = None,
) -> list[list[int]]:
    """Greedy continuations of `prompts`, all of `max_new_tokens` tokens.

    The plain way, without a scheduler: one padded batch, each row with its own pages. The engine
    is compared with it.

    Raises:
      ValueError: nothing to do, an empty prompt, one beyond the model's context, or no base for
        prefill_share.
    """
    if not prompts or max_new_tokens < 1:
        raise ValueError(
            f"Expected prompts and at least one new token, got {len(prompts)} and {max_new_tokens}."
        )
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise ValueError("A prompt needs at least one token.")
    if longest + max_new_tokens > model.config.max_positions:
        raise ValueError(
            f"Prompt of {longest} and {max_new_tokens} new tokens exceed the context of "
            f"{model.config.max_positions} tokens."
        )
    if (scheme == PREFILL_SHARE) != (base is not None):
        raise ValueError("prefill_share, and no other scheme, takes a base model.")
    slots_b = None if slots is None else jnp.asarray(slots, jnp.int32)
    table = identity_table(len(prompts), longest + max_new_tokens, PAGE_SIZE)
    cache = KVCache.zeros(model.config, table.pages.size, PAGE_SIZE, model.dtype)
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    counts = jnp.asarray([len(p) - 1 for p in prompts], jnp.int32)
    writer_slots = None if scheme.prompt_writer == "base" else slots_b
    cache = prefill(base or model, cache, table, jnp.asarray(tokens), counts, writer_slots)
    table, last = table.advanced(counts), jnp.asarray([p[-1] for p in prompts], jnp.int32)
    generated = []
    for _ in range(max_new_tokens):
        logits, cache = decode_step(model, cache, table, last, slots_b, scheme.streams)
        last, table = jnp.argmax(logits, axis=-1).astype(jnp.int32), table.advanced(1)
        generated.append(last)
    return np.stack(generated, axis=1).tolist()


def _check_slots(model: Model, slots: jax.Array | None) -> None:
    if slots is not None and model.bank is None:
        raise ValueError("Adapter slots were given, but the model has no adapter bank.")
