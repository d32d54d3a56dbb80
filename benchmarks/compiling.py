"""Programs of the benchmark, compiled in threads.

Letters: M rows, K input and N output features.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import rivals
from benchmarks.cases import (
    SAMPLED_ROWS,
    CaseKey,
    Item,
    errors,
    exact_rows,
    implementation,
    make_weights,
    multiplication,
)
from jaxcodec.pallas_kernels.timing import UNTUNED, turn

# More gain little: a process compiles one Mosaic kernel at a time.
WORKERS = 6
PRODUCTS_OF_XLA = ("dense_bf16", "dequantize", "reference")


class Compiler:
    """Compiles what items need, and keeps it until it is taken."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
        self._futures: dict[Any, concurrent.futures.Future] = {}

    def compile(self, items: Sequence[Item]) -> None:
        """Compile all programs of items, and wait; `take` tells what failed.

        Programs whose products XLA tunes by running candidates come last, one after another.
        """
        tuned = []
        for item in items:
            if item.kernel not in rivals.MODULES:
                self._submit(("judge", item), judge, item)
                if _is_tuned(item):
                    tuned.append(item)
                else:
                    self._submit(("timed", item), timed, item)
        self.compile_cases(item.case for item in items if item.kernel not in rivals.AQLM_CODEBOOKS)
        with turn():
            for item in tuned:
                self._submit(("timed", item), timed, item)
                concurrent.futures.wait(self._futures.values())

    def compile_cases(self, keys: Iterable[CaseKey]) -> None:
        """Compile the programs of cases, each but once, and wait."""
        for key in keys:
            self._submit(("case", key), case, key)
        concurrent.futures.wait(self._futures.values())

    def take(self, kind: str, key: Item | CaseKey) -> Any:
        """What was compiled: "timed" or "judge" of an item, which are then dropped, or "case".

        Raises:
          Exception: whatever its compilation raised.
        """
        future = self._futures[kind, key]
        if kind != "case":
            del self._futures[kind, key]
        return future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, key: Any, function: Callable, argument: Any) -> None:
        if key not in self._futures:
            self._futures[key] = self._pool.submit(function, argument)


def timed(item: Item) -> jax.stages.Compiled:
    """The program to time, whose results are in x's dtype."""
    call = multiplication(item.kernel, jnp.dtype(item.x))
    return jax.jit(call).lower(_rows(item.M, item.case), _weights(item.case)).compile()


def judge(item: Item) -> jax.stages.Compiled:
    """The program that judges the float32 result, see `cases.errors`."""
    x, weights = _rows(item.M, item.case), _weights(item.case)
    wanted = jax.eval_shape(exact_rows, _rows(len(SAMPLED_ROWS), item.case), weights)
    program = jax.jit(functools.partial(errors, item.kernel, item.M))
    return program.lower(x, weights, wanted).compile(compiler_options=UNTUNED)


def case(key: CaseKey) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Programs that make the weights of a case, and multiply them in float32."""
    make = jax.jit(make_weights(key)).lower(_random_key()).compile()
    multiply = jax.jit(exact_rows).lower(_rows(len(SAMPLED_ROWS), key), _weights(key))
    return make, multiply.compile(compiler_options=UNTUNED)


def _is_tuned(item: Item) -> bool:
    try:
        return implementation(item) in PRODUCTS_OF_XLA
    except Exception:  # it will stand in the item's row
        return False


def _rows(M: int, key: CaseKey) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((M, key.K), jnp.dtype(key.x))


def _weights(key: CaseKey) -> Any:
    return jax.eval_shape(make_weights(key), _random_key())


def _random_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
