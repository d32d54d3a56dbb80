"""Sampling draws from the tokens it should, and a row never feels its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.serve.request import SamplingParams
from jaxcodec.serve.sampling import SamplingBatch, sample

V, DRAWS = 12, 512

sample_jit = jax.jit(sample)


def draw(logits: np.ndarray, params: SamplingParams, seeds: range = range(DRAWS)) -> np.ndarray:
    """One token for each seed, all from the same logits [V]."""
    batch = SamplingBatch.of([params] * len(seeds), seeds, len(seeds))
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(seeds), V))
    tokens, broken = sample_jit(rows, batch, jnp.zeros(len(seeds), jnp.int32))
    assert not broken.any()
    return np.asarray(tokens)


@pytest.fixture
def logits() -> np.ndarray:
    """Random logits with every probability well above 1 / DRAWS."""
    return np.asarray(jax.random.normal(jax.random.key(5), (V,))) * 0.5


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


def test_a_rows_token_depends_on_its_own_row_alone() -> None:
    rows = jax.random.normal(jax.random.key(0), (4, V))
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(),
        SamplingParams(temperature=0.5, top_k=4),
        SamplingParams(temperature=2.0, top_p=0.7),
    ]
    position = jnp.array([3, 9, 1, 4])
    together, _ = sample_jit(rows, SamplingBatch.of(params, [7, 8, 9, 7], 4), position)
    for b, seed in enumerate([7, 8, 9, 7]):
        alone = SamplingBatch.of([params[b]], [seed], 1)
        token, _ = sample_jit(rows[b : b + 1], alone, position[b : b + 1])
        assert token[0] == together[b]


def test_positions_and_seeds_draw_anew(logits: np.ndarray) -> None:
    params = SamplingParams(temperature=1.0)
    batch = SamplingBatch.of([params] * DRAWS, [3] * DRAWS, DRAWS)
    rows = jnp.broadcast_to(jnp.asarray(logits), (DRAWS, V))
    by_position, _ = sample_jit(rows, batch, jnp.arange(DRAWS))
    assert set(np.asarray(by_position)) == set(range(V))
    np.testing.assert_array_equal(draw(logits, params), draw(logits, params))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_broken_row_is_flagged_alone(value: float) -> None:
    rows = jax.random.normal(jax.random.key(0), (3, V)).at[1, 4].set(value)
    params = [SamplingParams(temperature=1.0)] * 3
    tokens, broken = sample_jit(rows, SamplingBatch.of(params, [1, 2, 3], 3), jnp.arange(3))
    assert broken.tolist() == [False, True, False]
    healthy = rows.at[1].set(0.0)
    expected, _ = sample_jit(healthy, SamplingBatch.of(params, [1, 2, 3], 3), jnp.arange(3))
    assert tokens[jnp.array([0, 2])].tolist() == expected[jnp.array([0, 2])].tolist()


def test_masked_tokens_are_no_fault() -> None:
    rows = jnp.full((1, V), -jnp.inf).at[0, 3].set(1.0)
    params = [SamplingParams(temperature=1.0)]
    tokens, broken = sample_jit(rows, SamplingBatch.of(params, [0], 1), jnp.zeros(1, jnp.int32))
    assert (tokens.tolist(), broken.tolist()) == ([3], [False])
