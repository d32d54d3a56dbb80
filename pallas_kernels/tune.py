"""Measure every kernel's candidates on this GPU and remember the fastest: the command line.

    python -m jaxcodec.pallas_kernels.tune --shapes 4096x4096 4096x4096+1024+1024 --specs m2v8g128

A shape is K x N; with `+`, the outputs of several weights that share x, as q, k and v do. The
table is written after every measurement, and a later run goes on where this one was stopped.
Several runs side by side, each with shapes of its own, are faster: compiling takes most of the
time, and a process compiles one kernel at a time. They take turns at the GPU and share the table.
"""

import dataclasses
import datetime
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.pallas_kernels import tuning
from jaxcodec.pallas_kernels.kernels import KERNELS
from jaxcodec.pallas_kernels.reference import reference
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_8B_TOGETHER
from jaxcodec.pallas_kernels.timing import UNTUNED, kernel_time, turn
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, random_codebook_tensor

# Six times the 50 MB L2 of an H100, so that weights come from memory as they do in a model.
FOOTPRINT = 300e6
MAX_COPIES = 48
# Rounding the result to bf16 alone makes a relative error of 1.7e-3; a wrong sum makes far more.
MAX_ERROR = 4e-3
LIKELIEST = 2  # of the kernels that can run, in the order of `tuning.preferences`


def _text(K: int, Ns: Sequence[int]) -> str:
    return f"{K}x" + "+".join(map(str, Ns))


LLAMA_8B_SHAPES = tuple(
    _text(K, Ns)
    for K, Ns in [*((K, (N,)) for K, N in LLAMA_8B.values()), *LLAMA_8B_TOGETHER.values()]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Find the fastest kernel and tiles for shapes of a model on this GPU.

    Attributes:
      shapes: weights as K x N, or K x N1+N2 for several that share x; default Llama-3.1-8B's.
      specs: formats, such as m2v8g128.
      rows: numbers of rows of x; calls between two of them use the entry of the larger.
      out: the table; default: that of this device in the user's directory. codebook_matmul reads
        only tables in `tuning.user_directory()` ($JAXCODEC_TUNING, else ~/.cache/jaxcodec/tuning)
        under the device's name.
      again: measure what the table already has.
    """

    shapes: tuple[str, ...] = LLAMA_8B_SHAPES
    specs: tuple[str, ...] = ("m1v4g128", "m2v8g128")
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    out: Path | None = None
    again: bool = False


Shape = tuple[int, tuple[int, ...], CodebookSpec]  # K, the N of each weight, format
# Compiled candidates by kernel and tiles.
Candidates = dict[tuple[str, Any], Future[jax.stages.Compiled]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One entry to find: rows of x, and a launch of weights [K, N] in one format."""

    M: int
    K: int
    Ns: tuple[int, ...]
    spec: CodebookSpec

    @property
    def shape(self) -> Shape:
        """What the operands depend on besides M."""
        return self.K, self.Ns, self.spec

    @property
    def key(self) -> tuple[str, int, tuple[int, ...], int]:
        """As `tuning.Entry.key`."""
        return str(self.spec), self.K, self.Ns, self.M

    def __str__(self) -> str:
        return f"{self.spec} {_text(self.K, self.Ns)} M={self.M}"


def parse_shape(text: str) -> tuple[int, tuple[int, ...]]:
    """Read `4096x4096+1024+1024` as (K, (N, ...)).

    Raises:
      ValueError: not such a text.
    """
    try:
        K, Ns = text.split("x")
        return int(K), tuple(int(N) for N in Ns.split("+"))
    except ValueError:
        raise ValueError(f"A shape is K x N such as 4096x14336, got {text!r}.") from None


def tasks(options: Options) -> list[Task]:
    """Everything that the options ask for, all rows of a shape together.

    Raises:
      ValueError: no shapes, formats or rows, or some that cannot be.
    """
    for name in ("shapes", "specs", "rows"):
        if not getattr(options, name):
            raise ValueError(f"{name} must not be empty.")
    if (fewest := min(options.rows)) < 1:
        raise ValueError(f"rows must be at least 1, got {fewest}.")
    pairs = itertools.product(options.shapes, options.specs)
    found = []
    for shape, text in pairs:
        (K, Ns), spec = parse_shape(shape), CodebookSpec.parse(text)
        for N in Ns:
            spec.check_shape(K, N)
        found += [Task(M, K, Ns, spec) for M in options.rows]
    return found


def make_operands(key: jax.Array, shape: Shape, rows: Sequence[int]) -> tuple[dict, list]:
    """Random x bf16 [M, K] by M, each the first rows of the next, and weights [K, N]."""
    K, Ns, spec = shape
    keys = jax.random.split(key, len(Ns) + 1)
    weights = [random_codebook_tensor(k, spec, K, N) for k, N in zip(keys[1:], Ns, strict=True)]
    x = jax.random.normal(keys[0], (max(rows), K), jnp.bfloat16)
    return {M: x[:M] for M in rows}, weights


def copies(shape: Shape) -> int:
    """Sets of operands enough to defeat the L2."""
    K, Ns, spec = shape
    size = sum(spec.bits_per_weight(K, N) / 8 * K * N for N in Ns)
    return int(np.clip(np.ceil(FOOTPRINT / size), 2, MAX_COPIES))


def calls(task: Task) -> dict[tuple[str, Any], Callable[..., list[jax.Array]]]:
    """What to try, by kernel and tiles."""

    def multiply(kernel, tiles, x, weights):
        return kernel.matmul(x, weights, tiles=tiles, out_dtype=x.dtype)

    dtype = jnp.dtype(jnp.bfloat16)
    able = [
        (name, KERNELS[name])
        for name in tuning.preferences(task.M, task.K, task.Ns, task.spec, dtype)
        if not any(KERNELS[name].refusal(task.M, task.K, N, task.spec, dtype) for N in task.Ns)
    ]
    return {
        (name, tiles): functools.partial(multiply, kernel, tiles)
        for name, kernel in able[:LIKELIEST]
        for tiles in kernel.candidates(task.M, task.K, task.Ns, task.spec)
    }


class Programs:
    """What tuning one shape runs, being compiled by the threads of a pool.

    All of it is: a process that compiles while it holds the GPU keeps the others from measuring.
    Nothing is run on the GPU before it is this process's turn.

    Args:
      pool: of the threads.
      tasks: all of one shape.
    """

    def __init__(self, pool: Executor, tasks: Sequence[Task]):
        self.tasks = tasks
        shape, rows = tasks[0].shape, [task.M for task in tasks]
        make = functools.partial(make_operands, shape=shape, rows=rows)
        self._copies = copies(shape)
        key = jax.eval_shape(lambda: jax.random.key(0))
        xs, weights = jax.eval_shape(make, key)
        x = xs[max(rows)]
        self._make = pool.submit(compiled, make, (key,), UNTUNED)
        self._multiply = pool.submit(compiled, references, (x, weights), UNTUNED)
        results = jax.eval_shape(references, x, weights)
        self._candidates: dict[Task, Candidates] = {}
        self._judges = {}
        for task in tasks:
            outs = [jax.ShapeDtypeStruct((task.M, N), x.dtype) for N in task.Ns]
            self._judges[task] = pool.submit(compiled, worst_error, (outs, results), UNTUNED)
            operands = xs[task.M], weights
            self._candidates[task] = {
                key: pool.submit(compiled, call, operands) for key, call in calls(task).items()
            }

    def wait(self, task: Task) -> None:
        """Until all that `measure` runs is compiled, or has failed to."""
        wait((self._make, self._multiply, self._judges[task], *self._candidates[task].values()))

    @functools.cached_property
    def operands(self) -> list[tuple[dict[int, jax.Array], list[CodebookTensor]]]:
        """Copies of (x by M, weights), on the device."""
        make = self._make.result()
        return [make(jax.random.key(i)) for i in range(self._copies)]

    @functools.cached_property
    def wanted(self) -> list[jax.Array]:
        """What the first copy should give, f32 [M, N] of the most rows."""
        xs, weights = self.operands[0]
        return self._multiply.result()(xs[max(xs)], weights)

    def measure(self, task: Task) -> Iterator[tuning.Entry | str]:
        """An entry for each candidate that is right, a sentence for each that is not."""
        try:
            judge, wanted = self._judges[task].result(), self.wanted
        except Exception as error:  # no memory for these operands; other shapes go on
            yield f"{task}: {type(error).__name__}: {str(error)[:200]}"
            return
        operands = [(xs[task.M], weights) for xs, weights in self.operands]
        for (name, tiles), future in self._candidates[task].items():
            try:
                program = future.result()
                error = float(judge(program(*operands[0]), wanted))
                if not error <= MAX_ERROR:  # NaN included
                    raise ArithmeticError(f"relative error {error:.1e}")
                runs = [functools.partial(program, *each) for each in operands]
                us, _ = kernel_time(runs, jax.block_until_ready)
            except Exception as error:  # the other candidates go on
                yield f"{task}: {name} {tiles}: {type(error).__name__}: {str(error)[:200]}"
                continue
            yield tuning.Entry(*task.key, name, dataclasses.asdict(tiles), round(us, 2))


def references(x: jax.Array, weights: Sequence[CodebookTensor]) -> list[jax.Array]:
    """What the candidates should give, in float32."""
    return [reference(x, w) for w in weights]


def worst_error(results: Sequence[jax.Array], wanted: Sequence[jax.Array]) -> jax.Array:
    """The largest relative error of results [M, N] against the first M rows of what is wanted."""
    norm = jnp.linalg.norm
    pairs = [
        (y.astype(jnp.float32), full[: len(y)]) for y, full in zip(results, wanted, strict=True)
    ]
    return jnp.stack([norm(y - right) / norm(right) for y, right in pairs]).max()


def compiled(
    call: Callable[..., Any], operands: tuple, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """The program of a call for operands of these shapes."""
    return jax.jit(call).lower(*operands).compile(compiler_options=options)


def tune(options: Options) -> Path:
    """Measure what the table lacks; return its path, where no file is if nothing was measured.

    Raises:
      ValueError: a shape, format or number of rows that cannot be, or a file that is no table.
      RuntimeError: no NVIDIA GPU.
    """
    from rich.progress import track

    wanted, device = tasks(options), jax.devices()[0]
    if device.platform != "gpu":
        raise RuntimeError(f"Tuning measures a GPU, and the default device is {device}.")
    path = options.out or tuning.user_directory() / tuning.file_name(device.device_kind)
    known = {entry.key for entry in _entries(path)}
    head = {"device": device.device_kind, "jax": jax.__version__}
    head["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    missing = [task for task in wanted if options.again or task.key not in known]
    progress = iter(track(range(len(missing)), description="tuning"))
    for task, outcomes in _outcomes(missing):
        next(progress)
        if not outcomes:
            print(f"{task}: no kernel can run it.", file=sys.stderr)
        for failure in outcomes:
            if isinstance(failure, str):
                print(failure, file=sys.stderr)
        measured = [e for e in outcomes if isinstance(e, tuning.Entry)]
        if measured:
            best = min(measured, key=lambda entry: entry.us)
            with turn():  # another process may have written since
                others = [entry for entry in _entries(path) if entry.key != best.key]
                tuning.write(path, head, [*others, best])
            tried = ", ".join(f"{e.kernel} {e.us}" for e in measured)
            print(f"{task}: {best.kernel} {dict(best.tiles)} {best.us} us ({tried})")
    for _ in progress:  # the bar ends at its end
        pass
    return path


def _entries(path: Path) -> list[tuning.Entry]:
    return tuning.read(path) if path.exists() else []


def _outcomes(missing: Sequence[Task]) -> Iterator[tuple[Task, list[tuning.Entry | str]]]:
    """Measure shape after shape, while the candidates of the next are compiled."""
    shapes = [list(group) for _, group in itertools.groupby(missing, lambda task: task.shape)]
    pool = ThreadPoolExecutor()
    begun = (Programs(pool, tasks) for tasks in shapes)
    try:
        programs = next(begun, None)
        while programs:
            following = next(begun, None)
            for task in programs.tasks:
                programs.wait(task)
                with turn():
                    outcomes = list(programs.measure(task))
                yield task, outcomes
            programs = following
    finally:  # a run that is stopped waits for no compilation that has not begun
        pool.shutdown(cancel_futures=True)


def main() -> None:
    """Run the command line; bad input ends it with one sentence and status 1."""
    import tyro

    try:
        path = tune(tyro.cli(Options))
        print(f"Written to {path}." if path.exists() else "Nothing measured.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"jaxcodec.pallas_kernels.tune: {error}")


if __name__ == "__main__":
    main()
