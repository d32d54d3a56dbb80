"""Compiling ahead: all programs of an engine at once, in threads, and kept on disk."""

import concurrent.futures
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Job(NamedTuple):
    """A program to compile.

    Attributes:
      program: a function that `jax.jit` has made.
      shape: what tells its calls apart, beside static arguments.
      arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`).
      static: arguments that are compiled in, hashable.
    """

    program: Any
    shape: Any
    arguments: tuple
    static: dict[str, Any]


class Programs:
    """Compiled programs; what was not compiled ahead is compiled when it is called."""

    def __init__(self):
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def run(self, program: Callable, shape: Any, *arguments, **static) -> Any:
        """Call a jitted function; see `Job`."""
        compiled = self._compiled.get((program, shape, *static.values()))
        return program(*arguments, **static) if compiled is None else compiled(*arguments)

    def compile(self, jobs: Iterable[Job]) -> int:
        """Compile what is not compiled yet; returns how many that were.

        Tracing holds Python's lock, so one thread does that; the others compile.
        """
        pending = {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for job in jobs:
                key = (job.program, job.shape, *job.static.values())
                if key not in self._compiled and key not in pending:
                    lowered = job.program.lower(*job.arguments, **job.static)
                    pending[key] = pool.submit(lowered.compile)
        self._compiled |= {key: future.result() for key, future in pending.items()}
        return len(pending)


def use_compilation_cache(directory: str | Path) -> None:
    """Keep compiled programs on disk, and find those of earlier runs there.

    This is a setting of the whole process: everything that JAX compiles from now on is kept.
    """
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Else what compiles quickly is left out, and a warm-up is made of many such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
