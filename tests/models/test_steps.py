"""Prefill and decode together are the full forward, whatever the scheme, batch or chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.cache import KVCache, identity_table
from jaxcodec.models.lora import ALL_TARGETS, set_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.steps import decode_step, forward, generate, prefill
from jaxcodec.models.transformer import Model

PROMPT, TOTAL, PAGE = 7, 12, 4
# Logits are of order 10; prefill, decode and forward are compiled apart and sum in other orders.
CLOSE = {"atol": 2e-4, "rtol": 0}


def decoded(
    model: Model,
    tokens: jax.Array,
    scheme: Scheme,
    base: Model | None = None,
    slots: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, TOTAL - PROMPT + 1, V] of prefill to the prompt's end, then a step a token."""
    B = tokens.shape[0]
    table = identity_table(B, TOTAL, PAGE)
    cache = KVCache.zeros(model.config, table.pages.size, PAGE, jnp.float32)
    counts = jnp.full((B,), PROMPT - 1)
    writer_slots = None if scheme == ICARUS else slots
    cache = prefill(base or model, cache, table, tokens[:, :PROMPT], counts, writer_slots)
    logits = []
    for t in range(PROMPT - 1, TOTAL):
        step_table = table.advanced(jnp.full((B,), t))
        step, cache = decode_step(model, cache, step_table, tokens[:, t], slots, scheme.streams)
        logits.append(step)
    return jnp.stack(logits, axis=1)


@pytest.mark.parametrize("scheme", [CONVENTIONAL, ICARUS, PREFILL_SHARE], ids=str)
def test_prefill_and_decode_are_the_forward(
    scheme: Scheme, base: Model, banked: Model, random_adapter, random_tokens
) -> None:
    tokens, counts = random_tokens((2, TOTAL)), jnp.full((2,), TOTAL)
    slots, writer, prompts = None, None, None
    if scheme == PREFILL_SHARE:
        model = jax.tree.map(lambda x: 1.1 * x, base)
        writer, prompts = base, jnp.full((2,), PROMPT)
    else:
        targets = {} if scheme == ICARUS else {"targets": ALL_TARGETS}
        model = set_adapter(banked, random_adapter(base, 3, **targets), 2)
        slots = jnp.array([2, 0])
    full = forward(model, tokens, counts, scheme, prompts, writer, slots)
    steps = decoded(model, tokens, scheme, writer, slots)
    np.testing.assert_allclose(steps, full[:, PROMPT - 1 :], **CLOSE)


def test_chunks_of_prefill_are_one_prefill(base: Model, random_tokens) -> None:
    tokens = random_tokens((2, 11))
    table = identity_table(2, 12, PAGE)
    empty = lambda: KVCache.zeros(base.config, 6, PAGE, jnp.float32)
    whole = prefill(base, empty(), table, tokens, jnp.array([11, 8]))
    first = prefill(base, empty(), table, tokens[:, :5], jnp.array([5, 5]))
    both = prefill(base, first, table.advanced(5), tokens[:, 5:], jnp.array([6, 3]))
    np.testing.assert_allclose(both.k, whole.k, atol=1e-5)
    np.testing.assert_allclose(both.v, whole.v, atol=1e-5)


def test_a_padded_batch_equals_its_rows_alone(base: Model, random_tokens) -> None:
    prompts = [random_tokens((n,), seed=n).tolist() for n in (3, 1, 11)]
    assert generate(base, prompts, 8) == [generate(base, [p], 8)[0] for p in prompts]


def test_generation_is_greedy_on_the_full_forward(base: Model, random_tokens) -> None:
    sequence = random_tokens((5,)).tolist()
    continuation = generate(base, [sequence], 6)[0]
    for token in continuation:
        logits = forward(base, jnp.asarray([sequence]), jnp.asarray([len(sequence)]))
        assert int(logits[0, -1].argmax()) == token
        sequence = [*sequence, token]


def test_no_position_sees_a_later_one(base: Model) -> None:
    """Token t is fed at position t: the gradient by embedding row t is that of position t."""

    def logits_at_4(embedding: jax.Array) -> jax.Array:
        weights = jax.tree.map(lambda x: x, base.weights)
        weights["embed_tokens"]["weight"].set_value(embedding)
        changed = Model(base.config, weights)
        return forward(changed, jnp.arange(10)[None, :], jnp.array([10]))[0, 4].sum()

    embedding = dict(nnx.to_flat_state(base.weights))["embed_tokens", "weight"].get_value()
    gradient = jax.grad(logits_at_4)(embedding)
    moved = jnp.abs(gradient[:10]).sum(axis=1) > 0
    np.testing.assert_array_equal(moved, [True] * 5 + [False] * 5)


def test_bad_arguments_are_refused(base: Model) -> None:
    with pytest.raises(ValueError, match="no adapter bank"):
        generate(base, [[1, 2]], 2, slots=[0])
    for prompts, new in (([], 2), ([[1]], 0)):
        with pytest.raises(ValueError, match="prompts and at least one new token"):
            generate(base, prompts, new)
    with pytest.raises(ValueError, match="at least one token"):
        generate(base, [[1], []], 2)
    with pytest.raises(ValueError, match="exceed the context of 128"):
        generate(base, [[1] * 120], 9)
    with pytest.raises(ValueError, match="prefill_share"):
        generate(base, [[1, 2]], 2, scheme=PREFILL_SHARE)
    with pytest.raises(ValueError, match="needs the base"):
        forward(base, jnp.ones((1, 3), jnp.int32), jnp.array([3]), PREFILL_SHARE)
