"""Kernel time on a GPU, as CUPTI counts it: what a call launches, without the gaps between."""

import contextlib
import fcntl
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jax.experimental.mosaic.gpu import profiler

RUNS = 5  # of which the median is told
# Compiler options of what is never timed: XLA then runs no candidates of its own on the GPU, which
# another process may be measuring.
UNTUNED = {"xla_gpu_autotune_level": 0}
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


def kernel_time(
    calls: Iterable[Callable[[], Any]], wait: Callable[[Any], Any], runs: int = RUNS
) -> tuple[float, float]:
    """Microseconds and kernels of one call, by CUPTI: the sum over all that it launches.

    Each run makes all calls in turn, one launch after another; gaps between launches do not count.
    Calls on weights that together exceed the L2 cache read them from memory, as a model does.

    Raises:
      RuntimeError: CUPTI saw no kernel, or not the same number in every run.
    """
    calls = list(calls)
    wait(calls[-1]())
    # `profiler.measure` times one jitted function; these are calls of any framework in turn.
    library = profiler.mosaic_gpu_lib
    if library is None:
        raise RuntimeError("This jaxlib has no CUPTI.")
    cupti = library._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        for _ in range(runs):
            wait([call() for call in calls])
    finally:
        kernels = cupti._cupti_get_timings(True)
    if not kernels or len(kernels) % runs:
        raise RuntimeError(f"CUPTI saw {len(kernels or ())} kernels in {runs} equal runs.")
    count = len(kernels) // runs
    sums = [sum(ms for _, ms in kernels[i * count : (i + 1) * count]) for i in range(runs)]
    return 1e3 * statistics.median(sums) / len(calls), count / len(calls)
