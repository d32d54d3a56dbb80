"""Compile time and time of a whole decode step of Llama-3.1-8B, with random weights.

Letters: M rows of the batch.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import DENSE
from jaxcodec.models.cache import KVCache, PageTable, identity_table, pages_for
from jaxcodec.models.config import Llama3Rope, ModelConfig
from jaxcodec.models.steps import decode_step
from jaxcodec.models.transformer import Model, abstract_model, linear_shapes
from jaxcodec.pallas_kernels.timing import kernel_time
from jaxcodec.spec import CodebookSpec

# config.json of meta-llama/Llama-3.1-8B.
LLAMA_8B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    windows=(None,) * 32,
    rope_theta=500_000.0,
    rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
    norm_eps=1e-5,
)
SPEC = "m2v8g128"
BATCHES = (1, 8)
CONTEXT = 1024  # positions of the cache, all but the last few of which are in use
PAGE_SIZE = 16
STEPS, RUNS = 20, 5  # steps in one run, of whose times the median is told
INIT_STD = 0.02


def measure() -> Iterator[dict[str, Any]]:
    """Yield one flat record for each format and batch.

    `compile_seconds` is the time of the first step. `ms_per_step` is by the clock on the wall, over
    steps one after another, `kernel_ms` the sum of what one step launches, by CUPTI.
    """
    for spec in (SPEC, DENSE):
        model = random_model(LLAMA_8B, spec)
        for M in BATCHES:
            record: dict[str, Any] = {"kernel": "decode_step_llama_8b", "spec": spec, "M": M}
            try:
                record |= _measure(model, M)
            except Exception as error:  # the other measurements go on
                record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            yield record
        del model


def random_model(config: ModelConfig, spec: str) -> Model:
    """A model of random bf16 or codebook weights, made leaf by leaf on the device."""
    specs = ()
    if spec != DENSE:
        parsed = CodebookSpec.parse(spec)
        specs = tuple(sorted((path, parsed) for path, _ in linear_shapes(config)))
    abstract = abstract_model(config, jnp.bfloat16, specs)
    leaves, structure = jax.tree.flatten(abstract.weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        _random_leaf(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(abstract, weights=jax.tree.unflatten(structure, made))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_leaf(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(INIT_STD, dtype)


def _measure(model: Model, M: int) -> dict[str, Any]:
    table = identity_table(M, CONTEXT, PAGE_SIZE)
    table = PageTable(table.pages, jnp.full((M,), CONTEXT - 1, jnp.int32))
    pages = M * pages_for(CONTEXT, PAGE_SIZE)
    cache = KVCache.zeros(model.config, pages, PAGE_SIZE, model.dtype)
    tokens = jnp.asarray(np.arange(M), jnp.int32)
    start = time.perf_counter()

    def step() -> jax.Array:
        nonlocal cache
        logits, cache = decode_step(model, cache, table, tokens)
        return logits

    step().block_until_ready()
    first_seconds = time.perf_counter() - start

    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready([step() for _ in range(STEPS)])
        times.append((time.perf_counter() - start) / STEPS)
    seconds = statistics.median(times[1:])
    us, launches = kernel_time([step], jax.block_until_ready)
    return {
        "compile_seconds": round(first_seconds, 1),
        "ms_per_step": round(1e3 * seconds, 3),
        "tokens_per_second": round(M / seconds),
        "kernel_ms": round(us / 1e3, 3),
        "launches": launches,
    }
