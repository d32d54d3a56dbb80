"""Time the multiplication by codebook weights, with its rivals in the same run, on one GPU.

    python -m benchmarks.kernels                  # from the repository's root; under 9 minutes
    python -m benchmarks.kernels --decode-step    # a whole decode step of Llama-3.1-8B as well
    python -m benchmarks.kernels --resume         # only what the results lack

Runs side by side, each with `--resume` and shapes of its own, write to the same results and take
turns at the GPU. They do not tell how long compiling takes.

Kernel time of everything that a call launches, by CUPTI, over distinct copies of the weight that
together exceed the L2 cache; the median of 5 runs. The time is that of the result in x's dtype.
The relative error is that of the float32 result, before it is rounded: rounding to bf16 alone
makes 1.7e-3, of a dense product too. It is taken against float64 on sampled rows and columns, and
against the float32 reference on sampled rows and all columns. A rival's error is that of its
float16 result. A measurement that fails leaves its error in its row.

Letters: M rows, K input and N output features.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode_step, plan, rivals
from benchmarks.cases import (
    Case,
    CaseKey,
    Item,
    device_rows,
    implementation,
    make_case,
    relative,
)
from benchmarks.compiling import Compiler, timed
from benchmarks.head import head
from benchmarks.tables import report
from jaxcodec.checkpoints.files import replacement
from jaxcodec.pallas_kernels.timing import kernel_time, turn

SECONDS = 480  # start no measurement later than this
WRONG = 1e-2  # relative errors above this are no rounding
WARM_UP_N = 1024
CHUNK = 24  # measurements that are compiled together, and then made with nothing else running
BANDWIDTH_BYTES, BANDWIDTH_COPIES = 2**30, 4


class Benchmark:
    """Measures items one after another; weights stay on the device for later items."""

    def __init__(self):
        self._compiler = Compiler()
        self._cases: dict[CaseKey, Case] = {}
        self._compile_seconds: dict[Item, float] = {}

    def time_compiles(self, items: Sequence[Item]) -> None:
        """Compile and run once, with nothing else running, to tell the time that it takes."""
        self._compiler.compile_cases(item.case for item in items)
        for item in items:
            try:
                x, case = device_rows(item.M, item.K, item.x), self._case(item.case)
                timed(dataclasses.replace(item, Ns=(WARM_UP_N,)))  # imports, and whatever is kept
                start = time.perf_counter()
                jax.block_until_ready(timed(item)(x, case.copies[0]))
                self._compile_seconds[item] = round(time.perf_counter() - start, 2)
            except Exception as error:  # the same error will stand in the item's row
                print(f"{item}: {type(error).__name__}: {str(error)[:300]}", flush=True)

    def rows(self, items: Sequence[Item], deadline: float) -> Iterator[dict[str, Any]]:
        """One flat row for each item until the deadline, by `time.perf_counter`."""
        for chunk in itertools.batched(items, CHUNK):
            if time.perf_counter() > deadline:
                return
            start = time.perf_counter()
            self._compiler.compile(chunk)
            seconds = time.perf_counter() - start
            print(f"# {len(chunk)} measurements compiled in {seconds:.1f} s", flush=True)
            for item in chunk:
                if time.perf_counter() > deadline:
                    return
                with turn():
                    row = self.row(item)
                yield row

    def close(self) -> None:
        """End the threads that compile, and free the weights."""
        self._compiler.close()
        self._cases.clear()

    def row(self, item: Item) -> dict[str, Any]:
        """The row of an item that is compiled; a failure has `error` and no `us`."""
        row = fields_of(item) | {"us": None, "rel_err": None}
        start = time.perf_counter()
        try:
            measured = self._rival(item) if item.kernel in rivals.MODULES else self._ours(item)
            wrong = max(measured["rel_err"], measured.get("rel_err_all_columns", 0.0))
            if not wrong <= WRONG:  # NaN included
                us = measured.pop("us")
                measured["error"] = f"Wrong: took {us:.2f} us, relative error {wrong:.1e}."
            row |= {name: _short(value) for name, value in measured.items()}
        except Exception as error:  # the other measurements go on
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        if item in self._compile_seconds:
            row["compile_seconds"] = self._compile_seconds[item]
        return row | {"seconds": round(time.perf_counter() - start, 2)}

    def _ours(self, item: Item) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if item.kernel.startswith("codebook_matmul"):
            fields["implementation"] = implementation(item)
        program, judge = (self._compiler.take(kind, item) for kind in ("timed", "judge"))
        case = self._case(item.case)
        x = device_rows(item.M, item.K, item.x)
        calls = [lambda weights=weights: program(x, weights) for weights in case.copies]
        us, launches = kernel_time(calls, jax.block_until_ready)
        whole, y = judge(x, case.copies[0], case.whole)
        sampled = np.asarray(y, np.float64)[:, case.columns]
        error = relative(sampled, case.sampled[: len(sampled)])
        fields |= {"us": us, "rel_err": error, "rel_err_all_columns": float(whole)}
        return fields | {"launches": launches}

    def _rival(self, item: Item) -> dict[str, Any]:
        own_weights = item.kernel in rivals.AQLM_CODEBOOKS
        return rivals.measure(None if own_weights else self._case(item.case), item)

    def _case(self, key: CaseKey) -> Case:
        if key not in self._cases:
            self._cases[key] = make_case(key, *self._compiler.take("case", key))
        return self._cases[key]


def fields_of(item: Item) -> dict[str, Any]:
    """How a row names its item: `Ns` only where several weights share x."""
    fields = {name: getattr(item, name) for name in ("kernel", "spec", "M", "K", "N", "x")}
    return fields | ({"Ns": list(item.Ns)} if len(item.Ns) > 1 else {})


def _identity(row: dict[str, Any]) -> tuple:
    names = ("kernel", "spec", "M", "K", "N", "x")
    return (*(row[name] for name in names), tuple(row.get("Ns", ())))


def _short(value: Any) -> Any:
    """A number of four digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_bandwidth() -> float:
    """Bytes a second at which one reduction reads memory: what the HBM floor is reckoned with."""
    arrays = [jnp.full((BANDWIDTH_BYTES // 2,), i, jnp.bfloat16) for i in range(BANDWIDTH_COPIES)]
    program = jax.jit(jnp.max).lower(arrays[0]).compile()
    calls = [lambda array=array: program(array) for array in arrays]
    us, _ = kernel_time(calls, jax.block_until_ready)
    return 1e6 * BANDWIDTH_BYTES / us


class Results:
    """The head and the rows measured so far, in a JSON file to which several processes may add.

    Args:
      out: the file.
      about: the head of this run.
      resume: keep what an earlier run, or one beside this, has written: this run's head then goes
        to the list `resumed` of the file's.

    Raises:
      ValueError: the file is of another device.
    """

    def __init__(self, out: pathlib.Path, about: dict[str, Any], resume: bool = False):
        self._out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        with turn():
            if not (resume and out.exists()):
                self._write(about | {"rows": []})
                return
            found = self.read()
            if found["device"] != about["device"]:
                message = f"{out} is of {found['device']}, and this is {about['device']}"
                raise ValueError(f"{message}: name another file by --out.")
            found.setdefault("resumed", []).append(about)
            self._write(found)

    def read(self) -> dict[str, Any]:
        """The head, and `rows`."""
        return json.loads(self._out.read_text())

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Write one more row into the list `name`: `rows` or `decode_steps`."""
        with turn():
            found = self.read()
            found.setdefault(name, []).append(row)
            self._write(found)

    def _write(self, results: dict[str, Any]) -> None:
        """One field of the head a line, and one row a line."""
        head = {name: value for name, value in results.items() if name != "rows"}
        fields = "".join(f'"{name}": {json.dumps(value)},\n' for name, value in head.items())
        body = ",\n".join(json.dumps(row) for row in results["rows"])
        with replacement(self._out) as (path,):
            path.write_text(f'{{{fields}"rows": [\n{body}\n]}}\n')


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="default: results/<device>/kernels.json")
    parser.add_argument("--kernels", nargs="+", help="only these kernels, as the rows name them")
    parser.add_argument("--specs", nargs="+", help="only these formats, such as m2v8g128 and bf16")
    parser.add_argument("--rows", nargs="+", type=int, help="only these M")
    parser.add_argument("--shapes", nargs="+", help="only these K x N, such as 4096x14336")
    parser.add_argument("--resume", action="store_true", help="measure what the results lack")
    parser.add_argument("--decode-step", action="store_true", help="time a decode step as well")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no measurement later than this"
    )
    return parser.parse_args()


def wanted(item: Item, options: argparse.Namespace) -> bool:
    """Whether the command line asks for an item."""
    allowed = (
        (options.kernels, item.kernel),
        (options.specs, item.spec),
        (options.rows, item.M),
        (options.shapes, f"{item.K}x{item.N}"),
    )
    return all(chosen is None or value in chosen for chosen, value in allowed)


def main() -> None:
    """Measure everything, write the rows as they come, and print the tables."""
    start, options = time.perf_counter(), arguments()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are told
    about = head("kernels") | {"hbm_bytes_per_second": round(read_bandwidth())}
    device = re.search(r"[A-Z]+\d+\w*", about["device"])
    folder = (device.group() if device else about["device"]).lower()
    default = pathlib.Path(__file__).parent / "results" / folder / "kernels.json"
    results = Results(options.out or default, about, options.resume)
    measured = {_identity(row) for row in results.read()["rows"]}
    items = [item for item in plan.items() if wanted(item, options)]
    items = [item for item in items if _identity(fields_of(item)) not in measured]
    benchmark = Benchmark()
    if not options.resume:  # others may run beside it
        benchmark.time_compiles([item for item in plan.compiled_alone() if item in items])
    done = 0
    for row in benchmark.rows(items, start + options.seconds):
        done += 1
        results.add("rows", row)
        print(json.dumps(row), flush=True)
    benchmark.close()
    if options.decode_step:
        for step in decode_step.measure():
            results.add("decode_steps", step)
            print(json.dumps(step), flush=True)
    about = results.read()
    print(report(about, about.pop("rows")))
    if late := len(items) - done:
        print(f"{late} of {len(items)} not measured in {options.seconds:.0f} s; see --seconds.")


if __name__ == "__main__":
    main()
