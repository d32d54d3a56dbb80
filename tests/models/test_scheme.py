"""What the three schemes promise: the base reproduced, its cache untouched, no gradient to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcodec.models.cache import KVCache, identity_table
from jaxcodec.models.lora import ALL_TARGETS, check_icarus, set_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.steps import decode_step, forward, generate, prefill
from jaxcodec.models.transformer import Model


@pytest.fixture(scope="module")
def adapted(base: Model, banked: Model, random_adapter) -> Model:
    """Slot 0 zero, slots 1 and 2 two different icarus adapters."""
    model = set_adapter(banked, random_adapter(base, 5), 1)
    return set_adapter(model, random_adapter(base, 6), 2)


def decoded_cache(model: Model, tokens: jax.Array, slots: jax.Array | None, streams: int):
    """Cache and last logits after decoding every token, from an empty cache."""
    B, T = tokens.shape
    table = identity_table(B, T, 4)
    cache = KVCache.zeros(model.config, table.pages.size, 4, jnp.float32)
    logits = jnp.zeros(())
    for t in range(T):
        logits, cache = decode_step(model, cache, table.advanced(t), tokens[:, t], slots, streams)
    return cache, logits


def test_zero_adapter_and_base_weights_reproduce_the_base(
    base: Model, banked: Model, random_tokens
) -> None:
    prompts = [random_tokens((n,), seed=n).tolist() for n in (9, 4)]
    expected = generate(base, prompts, 12)
    assert generate(banked, prompts, 12, ICARUS, slots=[0, 0]) == expected
    assert generate(banked, prompts, 12, CONVENTIONAL, slots=[0, 1]) == expected
    assert generate(base, prompts, 12, PREFILL_SHARE, base=base) == expected


def test_zero_adapter_logits_are_bitwise_those_of_no_adapter(banked: Model, random_tokens) -> None:
    tokens = random_tokens((3, 5))
    _, without = decoded_cache(banked, tokens, None, 2)
    _, zero = decoded_cache(banked, tokens, jnp.array([0, 1, 2]), 2)
    np.testing.assert_array_equal(without, zero)


def test_every_icarus_model_writes_bitwise_the_same_cache(adapted: Model, random_tokens) -> None:
    tokens = random_tokens((3, 6))
    plain, base_logits = decoded_cache(adapted, tokens, jnp.array([0, 0, 0]), 2)
    mixed, logits = decoded_cache(adapted, tokens, jnp.array([2, 0, 1]), 2)
    np.testing.assert_array_equal(plain.k, mixed.k)
    np.testing.assert_array_equal(plain.v, mixed.v)
    np.testing.assert_array_equal(base_logits[1], logits[1])
    assert jnp.abs(base_logits[0] - logits[0]).max() > 0.1


def test_a_row_writes_bitwise_the_same_cache_whatever_else_is_in_the_batch(
    adapted: Model, random_tokens
) -> None:
    tokens = random_tokens((3, 6))
    neighbours = tokens.at[1:].set(random_tokens((2, 6), seed=8))
    first, logits = decoded_cache(adapted, tokens, jnp.array([1, 0, 2]), 2)
    second, again = decoded_cache(adapted, neighbours, jnp.array([1, 2, 0]), 2)
    np.testing.assert_array_equal(first.k[:, :2], second.k[:, :2])  # the pages of row 0
    np.testing.assert_array_equal(first.v[:, :2], second.v[:, :2])
    np.testing.assert_array_equal(logits[0], again[0])


def test_two_compiled_programs_differ_by_rounding_alone(adapted: Model, random_tokens) -> None:
    """Prefill and decode multiply matrices of other heights, which may sum in another order.

    A sum of n float32 terms in another order moves by at most n * 2^-24 of its terms' size; the
    longest sum here, over the MLP, bounds what the largest key or value may differ by.
    """
    tokens = random_tokens((2, 8))
    table = identity_table(2, 8, 4)
    empty = KVCache.zeros(adapted.config, 4, 4, jnp.float32)
    prefilled = prefill(adapted, empty, table, tokens, jnp.array([8, 8]))
    one_stream, _ = decoded_cache(adapted, tokens, None, 1)
    two_streams, _ = decoded_cache(adapted, tokens, jnp.array([1, 2]), 2)
    for cache in (one_stream, two_streams):
        for ours, theirs in ((cache.k, prefilled.k), (cache.v, prefilled.v)):
            longest = adapted.config.intermediate_size
            bound = longest * 2**-24 * float(jnp.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0)


def test_an_adapter_that_writes_the_cache_is_refused(base: Model, random_adapter) -> None:
    check_icarus(random_adapter(base, 0))
    with pytest.raises(ValueError, match="k_proj and v_proj, which write the shared KV cache"):
        check_icarus(random_adapter(base, 0, ALL_TARGETS))


def test_icarus_decodes_as_if_a_key_adapter_were_not_there(
    base: Model, banked: Model, random_adapter, random_tokens
) -> None:
    """The encoder stream never sees an adapter, not even one that loading would have refused."""
    tokens, counts = random_tokens((1, 6)), jnp.array([6])
    keys_only = set_adapter(banked, random_adapter(base, 2, ("k_proj", "v_proj")), 1)
    logits = forward(keys_only, tokens, counts, ICARUS, slots=jnp.array([1]))
    np.testing.assert_array_equal(
        logits, forward(banked, tokens, counts, ICARUS, slots=jnp.array([1]))
    )


def gradient_by_type(model: Model, scheme: Scheme, **arguments) -> tuple[float, float]:
    """Largest gradient of (projections that write the cache, projections that read it)."""
    loss = lambda m: forward(m, scheme=scheme, **arguments).std()
    gradient = jax.grad(loss)(model).weights
    largest = {True: 0.0, False: 0.0}
    for path, variable in nnx.to_flat_state(gradient):
        if path[-1] == "kernel" and path[0] == "layers":
            writes = path[-2] in ("k_proj", "v_proj")
            value = float(jnp.abs(variable.get_value()).max())
            largest[writes] = max(largest[writes], value)
    return largest[True], largest[False]


def test_no_gradient_passes_through_the_cache_of_the_icarus_encoder(
    adapted: Model, random_tokens
) -> None:
    arguments = {"tokens": random_tokens((1, 8)), "counts": jnp.array([8])}
    writers, readers = gradient_by_type(adapted, ICARUS, slots=jnp.array([1]), **arguments)
    assert writers == 0.0
    assert readers > 0.0
    writers, _ = gradient_by_type(adapted, CONVENTIONAL, slots=jnp.array([1]), **arguments)
    assert writers > 0.0


def test_no_gradient_reaches_the_writer_of_a_shared_prompt(base: Model, random_tokens) -> None:
    tokens, counts, prompts = random_tokens((1, 8)), jnp.array([8]), jnp.array([5])
    loss = lambda m, b: forward(m, tokens, counts, PREFILL_SHARE, prompts, b)[:, 4:].std()
    decoder, writer = jax.grad(loss, argnums=(0, 1))(base, base)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(writer))
    kernel = decoder.weights["layers"][0]["self_attn"]["k_proj"]["kernel"].get_value()
    assert float(jnp.abs(kernel).max()) > 0  # it writes the keys of the response


def test_impossible_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="after a prompt that 'self' wrote"):
        Scheme("self", "base")
    with pytest.raises(ValueError, match="'base' or 'self', got 'other'"):
        Scheme("other", "self")  # pyrefly: ignore[bad-argument-type]


def test_a_row_with_the_same_adapter_in_both_streams_is_an_ordinary_one(
    banked: Model, random_adapter, random_tokens
) -> None:
    writing = random_adapter(banked, 7, targets=ALL_TARGETS)
    model = set_adapter(banked, writing, 1)
    tokens, length = random_tokens((2, 6)), 6
    table = identity_table(2, length, 4)
    encoder, decoder = jnp.array([1, 0]), jnp.array([1, 1])
    counts, empty = jnp.full((2,), length), KVCache.zeros(model.config, 4, 4, jnp.float32)
    hidden, cache = jax.jit(
        lambda: model.module(
            tokens, empty, table, counts, slots=decoder, streams=2, encoder_slots=encoder
        )
    )()
    ordinary = forward(model, tokens, counts, CONVENTIONAL, slots=decoder)
    icarus = forward(model, tokens, counts, ICARUS, slots=decoder)
    logits = model.module.logits(hidden)
    np.testing.assert_allclose(logits[0], ordinary[0], atol=2e-4)
    np.testing.assert_allclose(logits[1], icarus[1], atol=2e-4)
    base_cache = prefill(
        model, KVCache.zeros(model.config, 4, 4, jnp.float32), table, tokens, counts
    )
    np.testing.assert_allclose(cache.k[:, 2:], base_cache.k[:, 2:], atol=2e-4)
    assert not np.allclose(cache.k[:, :2], base_cache.k[:, :2], atol=1e-2)
