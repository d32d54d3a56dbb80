"""Sampling draws from the tokens it should, and a row never feels its neighbours."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from jaxcodec.serve.request import SamplingParams, Structure
from jaxcodec.serve.sampling import (
    STOP_WIDTH,
    Sampled,
    SamplingState,
    SamplingTable,
    Variant,
    enter,
    is_stop,
    processed_logits,
    sample,
    variant_of,
)

V, DRAWS = 12, 512
EOS = (7,)

sample_jit = jax.jit(sample, static_argnames="variant")
processed_jit = jax.jit(processed_logits, static_argnames="variant")


def launch(
    logits: np.ndarray | jax.Array,
    params: Sequence[SamplingParams],
    *,
    seeds: Sequence[int] | None = None,
    position: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    responses: Sequence[Sequence[int]] | None = None,
    masks: np.ndarray | None = None,
    variant: Variant = Variant.FULL,
    function=sample_jit,
):
    """`sample`, or the function given, on rows that hold just these requests."""
    B, vocab_size = logits.shape
    prompts, responses = prompts or [[0]] * B, responses or [[]] * B
    table, state = SamplingTable(B), SamplingState.zeros(B, vocab_size)
    for row, p in enumerate(params):
        seed = row if seeds is None else seeds[row]
        table.enter(row, p, seed, EOS, len(prompts[row]))
        if p.has_state:
            state = enter(state, row, p, prompts[row], responses[row])
    if position is None:
        position = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    rows, at = np.arange(B), jnp.asarray(position, jnp.int32)
    arguments = [jnp.asarray(logits), table.batch(rows, masks), state, jnp.asarray(rows), at]
    if function is sample_jit:
        arguments.append(jnp.ones(B, bool))
    return function(*arguments, variant=variant)


def draw(logits: np.ndarray, params: SamplingParams, seeds: range = range(DRAWS)) -> np.ndarray:
    """One token for each seed, all from the same logits [V]."""
    rows = np.broadcast_to(logits, (len(seeds), V))
    sampled, _ = launch(rows, [params] * len(seeds), seeds=seeds)
    assert not sampled.broken.any()
    return np.asarray(sampled.token)


@pytest.fixture
def logits() -> np.ndarray:
    """Random logits with every probability well above 1 / DRAWS."""
    return np.asarray(jax.random.normal(jax.random.key(5), (V,))) * 0.5


def test_logits_become_those_of_transformers() -> None:
    file = Path(__file__).parents[1] / "fixtures" / "sampling.safetensors"
    with safe_open(file, "numpy") as content:
        cases = json.loads(content.metadata()["cases"])
        logits, expected, prompts, responses = (
            content.get_tensor(name) for name in ("logits", "processed", "prompt", "response")
        )
    for case in cases:
        case["logit_bias"] = {int(k): v for k, v in case.get("logit_bias", {}).items()}
    processed = launch(
        logits,
        [SamplingParams(**case) for case in cases],
        prompts=prompts.tolist(),
        responses=responses.tolist(),
        function=processed_jit,
    )
    np.testing.assert_array_equal(np.isfinite(processed), np.isfinite(expected))
    np.testing.assert_allclose(processed, expected, rtol=1e-6)


def test_frequency_and_presence_count_the_response_alone(logits: np.ndarray) -> None:
    # logit - count * frequency_penalty - (count > 0) * presence_penalty, as the OpenAI API says
    params = SamplingParams(temperature=1.0, frequency_penalty=0.3, presence_penalty=-0.7)
    processed = launch(
        logits[None],
        [params],
        prompts=[[1, 2, 2]],
        responses=[[2, 4, 4, 4]],
        function=processed_jit,
    )
    expected = logits.copy()
    expected[2] += -0.3 + 0.7
    expected[4] += -0.9 + 0.7
    np.testing.assert_allclose(processed[0], expected, rtol=1e-6)


def test_each_token_counts_towards_the_next(logits: np.ndarray) -> None:
    params = SamplingParams(frequency_penalty=2.0, logprobs=0)
    table, state = SamplingTable(2), SamplingState.zeros(2, V)
    table.enter(1, params, 0, EOS, 3)
    state = enter(state, 1, params, [1, 2, 3], [])
    rows, response = np.array([1, 2]), []  # the second row is padding
    for position in range(3, 8):
        at = jnp.full(2, position)
        sampled, state = sample_jit(
            jnp.broadcast_to(logits, (2, V)), table.batch(rows), state, rows, at,
            jnp.array([True, False]), variant=Variant.FULL,
        )  # fmt: skip
        penalty = 2.0 * np.bincount(response, minlength=V)
        assert sampled.token[0] == np.argmax(logits - penalty)
        response.append(int(sampled.token[0]))
    assert len(set(response)) == len(response)
    again = enter(SamplingState.zeros(2, V), 1, params, [1, 2, 3], response)
    np.testing.assert_array_equal(state.counts, again.counts)


def test_counts_do_not_run_over() -> None:
    params = SamplingParams(frequency_penalty=1e-3)
    table, state = SamplingTable(1), SamplingState.zeros(1, V)
    table.enter(0, params, 0, EOS, 1)
    state = enter(state, 0, params, [1], [3] * 40_000)
    full = state.counts[0, 3]
    row, logits = jnp.zeros(1, jnp.int32), jnp.zeros((1, V)).at[0, 3].set(1e3)
    _, state = sample_jit(
        logits, table.batch(row), state, row, row, jnp.array([True]), variant=Variant.FULL
    )
    assert state.counts[0, 3] == full
    assert state.counts[0, 1] > full  # the bit of the prompt


def test_zero_temperature_takes_the_likeliest(logits: np.ndarray) -> None:
    assert set(draw(logits, SamplingParams(top_p=0.5))) == {int(logits.argmax())}


def test_all_tokens_can_come_in_proportion(logits: np.ndarray) -> None:
    tokens = draw(logits, SamplingParams(temperature=0.7))
    expected = np.asarray(jax.nn.softmax(logits / 0.7))
    counted = np.bincount(tokens, minlength=V) / DRAWS
    # four standard deviations of a count among DRAWS
    assert (np.abs(counted - expected) < 4 * np.sqrt(expected / DRAWS)).all()


@pytest.mark.parametrize("k", [1, 3, V, 10 * V])
def test_top_k_draws_from_the_k_likeliest(logits: np.ndarray, k: int) -> None:
    tokens = draw(logits, SamplingParams(temperature=1.0, top_k=k))
    assert set(tokens) == set(np.argsort(-logits)[:k])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 1.0])
def test_top_p_draws_from_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    order = np.argsort(-logits)
    reached = np.cumsum(np.asarray(jax.nn.softmax(logits))[order])
    needed = min(int(np.searchsorted(reached, p)) + 1, V)
    assert set(draw(logits, SamplingParams(temperature=1.0, top_p=p))) == set(order[:needed])


def test_top_p_counts_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2] + [0.1 / 9] * 9, np.float32))
    # of the two left, the first has 4/7 > 0.5
    assert set(draw(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.5))) == {0}
    assert set(draw(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.6))) == {0, 1}


def test_ties_do_not_enlarge_top_k() -> None:
    tokens = draw(np.zeros(V, np.float32), SamplingParams(temperature=1.0, top_k=5))
    assert set(tokens) == set(range(5))


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=V, max_size=V),  # many are equal
    top_k=st.none() | st.integers(1, V + 1),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0, width=32, allow_subnormal=False),
)
def test_what_is_left_out_is_what_a_plain_loop_leaves_out(
    logits: list[int], top_k: int | None, top_p: float, min_p: float
) -> None:
    likely = sorted(range(V), key=lambda t: -logits[t])[:top_k]  # stable: lower numbers first
    total = sum(math.exp(logits[t]) for t in likely)
    expected, before = [], 0.0
    for t in likely:
        ratio = math.exp(logits[t] - logits[likely[0]])
        # where float32 and float64 may differ there is nothing to compare
        assume(abs(before - top_p) > 1e-5 and abs(ratio - min_p) > 1e-5)
        if before >= top_p or ratio < min_p:
            break
        expected.append(t)
        before += math.exp(logits[t]) / total
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = np.asarray([logits], np.float32)
    processed = launch(rows, [params], function=processed_jit)
    assert np.flatnonzero(np.isfinite(processed[0])).tolist() == sorted(expected)


MIXED = (
    SamplingParams(temperature=1.0),
    SamplingParams(),
    SamplingParams(temperature=0.5, top_k=4),
    SamplingParams(temperature=2.0, top_p=0.7, logprobs=3),
    SamplingParams(temperature=1.0, repetition_penalty=1.5, logit_bias={3: 2.0}),
    SamplingParams(min_tokens=30),
)


@pytest.mark.parametrize("others", [(), (0, 1), tuple(range(len(MIXED)))])
def test_a_rows_token_depends_on_its_own_row_alone(others: tuple[int, ...]) -> None:
    # also not on the branches that others make a launch take: truncation, penalties, masks
    rows = np.asarray(jax.random.normal(jax.random.key(0), (len(MIXED), V)))
    seeds, prompts = [7, 8, 9, 7, 6, 5], [[1, 2, 3]] * len(MIXED)
    for b, params in enumerate(MIXED):
        alone, _ = launch(
            rows[b : b + 1], [params], seeds=[seeds[b]], prompts=[prompts[b]],
            variant=variant_of([params]),
        )  # fmt: skip
        mates = [b, *others]
        words = np.full((len(mates), 1), 0xFFFFFFFF, np.uint32)
        together, _ = launch(
            rows[mates], [MIXED[i] for i in mates], seeds=[seeds[i] for i in mates],
            prompts=[prompts[i] for i in mates], masks=words, variant=Variant.MASKED,
        )  # fmt: skip
        assert together.token[0] == alone.token[0]


def test_positions_and_seeds_draw_anew(logits: np.ndarray) -> None:
    params = SamplingParams(temperature=1.0)
    rows = np.broadcast_to(logits, (DRAWS, V))
    by_position, _ = launch(rows, [params] * DRAWS, seeds=[3] * DRAWS, position=range(DRAWS))
    assert set(np.asarray(by_position.token)) == set(range(V))
    np.testing.assert_array_equal(draw(logits, params), draw(logits, params))
    high = draw(logits, params, range(2**32 - DRAWS, 2**32))
    assert set(high) == set(range(V))


@pytest.mark.parametrize("variant", Variant)
def test_stop_tokens_come_once_they_may(variant: Variant) -> None:
    logits = np.zeros((3, V), np.float32)
    logits[:, 7], logits[:, 4], logits[:, 2] = 3.0, 2.0, 1.0
    params = [
        SamplingParams(min_tokens=2, stop_tokens=(4,)),
        SamplingParams(min_tokens=1, stop_tokens=(4,)),
        SamplingParams(min_tokens=2, stop_tokens=(4,), ignore_eos=True),
    ]
    masks = np.full((3, 1), 0xFFFFFFFF, np.uint32)
    sampled, _ = launch(
        logits, params, prompts=[[1, 1]] * 3, position=[3] * 3, masks=masks, variant=variant
    )
    assert sampled.token.tolist() == [2, 7, 7]
    table = SamplingTable(3)
    for row, p in enumerate(params):
        table.enter(row, p, 0, EOS, 2)
    batch = table.batch(np.array([0, 1, 2, 3]))
    assert is_stop(jnp.array([4, 7, 7, 7]), batch).tolist() == [True, True, False, False]


def test_too_many_stop_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="room for"):
        SamplingTable(1).enter(0, SamplingParams(), 0, range(STOP_WIDTH + 1), 1)


def test_a_mask_leaves_what_it_allows() -> None:
    vocab_size = 70  # three words, the last not full
    rng = np.random.default_rng(0)
    allowed = rng.random((4, vocab_size)) < 0.3
    padded = np.zeros((4, 96), bool)
    padded[:, :vocab_size] = allowed
    masks = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    params = [SamplingParams(temperature=1.0, structured=Structure.regex("a"))] * 4
    logits = rng.standard_normal((4, vocab_size)).astype(np.float32)
    processed = launch(
        logits, params, masks=masks, variant=variant_of(params), function=processed_jit
    )
    np.testing.assert_array_equal(processed, np.where(allowed, logits, -np.inf))


def test_logprobs_are_the_models_own() -> None:
    logits = np.asarray(jax.random.normal(jax.random.key(1), (2, 40)))
    params = SamplingParams(temperature=0.3, top_k=2, logit_bias={0: 50.0}, logprobs=5)
    sampled: Sampled
    sampled, _ = launch(logits, [params, params])
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert sampled.token.tolist() == [0, 0]
    np.testing.assert_allclose(sampled.logprob, expected[:, 0], rtol=1e-5)
    best = np.argsort(-expected, axis=1)[:, :20]
    np.testing.assert_array_equal(sampled.top_ids, best)
    np.testing.assert_allclose(
        sampled.top_logprobs, np.take_along_axis(expected, best, axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_broken_row_is_flagged_alone(value: float, variant: Variant) -> None:
    rows = jax.random.normal(jax.random.key(0), (3, V)).at[1, 4].set(value)
    params = [SamplingParams(temperature=1.0, repetition_penalty=1.1)] * 3
    masks = np.full((3, 1), 0xFFFFFFFF, np.uint32)
    sampled, _ = launch(rows, params, masks=masks, variant=variant)
    assert sampled.broken.tolist() == [False, True, False]
    healthy, _ = launch(rows.at[1].set(0.0), params, masks=masks, variant=variant)
    others = np.array([0, 2])
    np.testing.assert_array_equal(sampled.token[others], healthy.token[others])


def test_masked_tokens_are_no_fault() -> None:
    rows = jnp.full((1, V), -jnp.inf).at[0, 3].set(1.0)
    for variant in (Variant.GREEDY, Variant.FULL):
        sampled, _ = launch(rows, [SamplingParams(temperature=1.0)], variant=variant)
        assert (sampled.token.tolist(), sampled.broken.tolist()) == ([3], [False])


def test_the_least_variant_serves_all() -> None:
    greedy, random = SamplingParams(), SamplingParams(temperature=1.0)
    structured = SamplingParams(structured=Structure.regex("a"))
    assert variant_of([]) == variant_of([greedy]) == Variant.GREEDY
    assert variant_of([greedy, random]) == Variant.FULL
    assert variant_of([random, structured, greedy]) == Variant.MASKED


def test_greedy_launches_neither_search_nor_draw() -> None:
    def trace(variant: Variant) -> str:
        rows = jnp.zeros(1, jnp.int32)
        batch, state = SamplingTable(1).batch(np.array([0])), SamplingState.zeros(1, V)
        arguments = jnp.zeros((1, V)), batch, state, rows, rows, rows > 0, variant
        return str(jax.make_jaxpr(sample, static_argnums=6)(*arguments))

    expensive = ("scan[", "random_bits[", "top_k[", "cond[")
    assert all(name in trace(Variant.FULL) for name in expensive)
    assert not any(name in trace(Variant.GREEDY) for name in expensive)


def test_a_nan_among_thousands_is_seen() -> None:
    """XLA's max on a CPU passes over some."""
    many = 4096
    rows = jnp.full((1, many), jnp.nan)
    batch = SamplingTable(1).batch(np.array([0]))
    zero = jnp.zeros(1, jnp.int32)
    sampled, _ = jax.jit(sample, static_argnames="variant")(
        rows, batch, SamplingState.zeros(1, many), zero, zero, zero == 0, variant=Variant.GREEDY
    )
    assert sampled.broken.all()
