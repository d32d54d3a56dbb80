"""Kernel time on a GPU, as CUPTI counts it: what a call launches, without the gaps between.

Letters: M rows, K input and N output features.
"""

import contextlib
import fcntl
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
from jax.experimental.mosaic.gpu import profiler

RUNS = 5  # of which the median is told
TURN = pathlib.Path(tempfile.gettempdir()) / "jaxcodec_gpu.lock"


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Hold the GPU against other processes of this machine that measure; waits for its turn.

    A process compiles one Mosaic kernel at a time, so that several side by side are faster; only
    one of them may time. A turn is not taken twice by one process.
    """
    with TURN.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rotation(call: Callable[..., Any], operands: Sequence[tuple]) -> jax.stages.Compiled:
    """Compile one program that makes `call(x, w)` for all operands in turn.

    Weights that together exceed the L2 cache are then read from memory, as a model's are.
    """

    # Traced once for all copies.
    call = jax.jit(call)

    def rotate(operands):
        results = []
        for x, w in operands:
            if results:
                # Without an order XLA would merge work of different copies into one kernel.
                x, _ = jax.lax.optimization_barrier((x, results[-1]))
            results.append(call(x, w))
        return results

    return jax.jit(rotate).lower(operands).compile()


def kernel_time(
    rotation: jax.stages.Compiled, operands: Sequence[tuple], runs: int = RUNS
) -> tuple[float, float, Any]:
    """Microseconds and launches of one call of a `rotation`, and the result for operands[0].

    Raises:
      RuntimeError: CUPTI saw no kernel, as without a GPU.
    """
    measured = profiler.measure(rotation, aggregate=False, iterations=runs)
    results, timings = measured(operands)
    if not timings:
        raise RuntimeError("CUPTI saw no kernel: kernel time needs an NVIDIA GPU.")
    timings = cast(list[list[tuple[str, float]]], timings if runs > 1 else [timings])
    milliseconds = statistics.median(sum(ms for _, ms in run) for run in timings)
    calls = len(operands)
    return 1e3 * milliseconds / calls, len(timings[0]) / calls, results[0]
