"""The benchmark of sampling measures what it says."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sampling


def test_every_case_has_a_time() -> None:
    record = sampling.measure(2, 40)
    assert record.keys() == {
        "B",
        "V",
        *(f"{case}_ms" for case in (*sampling.CASES, "sorted_top_p")),
    }
    assert all(value > 0 for value in record.values())


def test_the_rival_leaves_what_top_p_leaves() -> None:
    logits = jax.random.normal(jax.random.key(0), (1, 40))
    probability = np.asarray(jax.nn.softmax(logits[0]))
    order = np.argsort(-probability)
    kept = order[: np.searchsorted(np.cumsum(probability[order]), 0.9) + 1]
    left = np.flatnonzero(np.isfinite(np.asarray(sampling._sorted_top_p(jnp.asarray(logits)))[0]))
    assert left.tolist() == sorted(kept.tolist())
