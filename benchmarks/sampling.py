"""What choosing the next token costs, by what the rows of a launch ask for.

    python -m benchmarks.sampling --out benchmarks/results/cpu/sampling.json

Letters: B rows of a launch, V vocabulary.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.serve.request import SamplingParams, Structure
from jaxcodec.serve.sampling import (
    WORD,
    SamplingState,
    SamplingTable,
    Variant,
    enter,
    sample,
    variant_of,
)

CASES = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9),
    "top_k_top_p": SamplingParams(temperature=1.0, top_k=50, top_p=0.9),
    "penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1),
    "logprobs": SamplingParams(logprobs=5),
    "masked": SamplingParams(structured=Structure.regex("a")),
}
# The shipped model's vocabulary, Llama 2's and Llama 3's.
SHAPES = ((16, 4096), (64, 32_000), (1, 128_256), (64, 128_256))
RUNS = 7  # of whose times the median is told, after one that compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time sampling on JAX's default device.

    Attributes:
      out: JSON file of the times.
    """

    out: Path


def measure(B: int, V: int) -> dict[str, Any]:
    """Milliseconds of each case, and of the same truncation by a sort, on random logits."""
    logits = 3 * jax.random.normal(jax.random.key(0), (B, V))
    rows, position, active = jnp.arange(B), jnp.full(B, 7), jnp.ones(B, bool)
    compiled = jax.jit(sample, static_argnames="variant")
    record: dict[str, Any] = {"B": B, "V": V}
    for name, params in CASES.items():
        table, state = SamplingTable(B), SamplingState.zeros(B, V)
        for row in range(B):
            table.enter(row, params, row, (0,), 3)
            if params.has_state:
                state = enter(state, row, params, [1, 2, 3], [4, 5])
        variant, masks = variant_of([params]), None
        if variant == Variant.MASKED:
            masks = np.full((B, -(-V // WORD)), 0x5555_5555, np.uint32)
        batch = jax.device_put(table.batch(np.arange(B), masks))
        run = functools.partial(compiled, logits, batch, state, rows, position, active)
        record[f"{name}_ms"] = _milliseconds(functools.partial(run, variant=variant))
    record["sorted_top_p_ms"] = _milliseconds(functools.partial(_sorted_top_p, logits))
    return record


@jax.jit
def _sorted_top_p(logits: jax.Array) -> jax.Array:
    """What top_p = 0.9 leaves, the usual way: a sort, and sums over the sorted."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(descending, axis=-1)
    kept = jnp.sum(jnp.cumsum(probability, axis=-1) - probability < 0.9, axis=-1)
    least = jnp.take_along_axis(descending, kept[:, None] - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _milliseconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.sampling")
    content = {
        **head("sampling"),
        "records": [measure(B, V) for B, V in SHAPES],
    }
    write_json(options.out, content)


if __name__ == "__main__":
    main()
