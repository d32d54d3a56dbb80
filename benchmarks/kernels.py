"""Time the kernels that multiply few rows by a codebook weight, on one GPU.

    python -m benchmarks.kernels            # from the repository's root; under three minutes

Kernel time of everything that a call launches, by CUPTI, the median of 5 runs over distinct copies
of the weight that together exceed the L2 cache. Every result is compared with float64 on sampled
columns and with the float32 reference on all. A measurement that fails leaves its error in its row.

Letters: M rows, K input and N output features.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from jax.extend import backend

from jaxcodec.pallas_kernels import psumbook_mosaic
from jaxcodec.pallas_kernels.psumbook import choose, codebook_matmul, reference
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, random_codebook_tensor

SPECS = ("m1v4g128", "m2v8g128")
SHAPES = (
    LLAMA_8B["llama_8b_q_o"],
    LLAMA_8B["llama_8b_gate_up"],
    LLAMA_8B["llama_8b_down"],
    LLAMA_70B["llama_70b_gate_up"],
)
ROWS = (1, 2, 4)
FOOTPRINT = 300e6  # bytes of weights in rotation: six times the 50 MB L2 of an H100
MAX_COPIES = 48
RUNS = 5
# The reference writes gigabytes for each call, so that two copies leave nothing in the L2 either.
REFERENCE_COPIES = 2
# Columns compared with float64: those at both ends, where tiles end, and some in between.
EDGE_COLUMNS, RANDOM_COLUMNS = 128, 256
# Rounding the result to bf16 alone makes a relative error of 1.7e-3; a wrong sum makes far more.
WRONG = 1e-2
COLUMNS = ("psumbook_mosaic", "codebook_matmul", "dense_bf16", "reference")
RIVALS = ("official_codegemm", "aqlm_2x8")

Call = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One weight shape in one format: operands in rotation and the answers for the first of them.

    Attributes:
      spec: `m2v8g128`, or `bf16` for a dense weight.
      operands: (x bf16 [max(ROWS), K], weight [K, N]) for each copy.
      columns: indices of the columns that are compared with float64.
      sampled: float64 [max(ROWS), len(columns)].
      whole: float32 [max(ROWS), N].
    """

    spec: str
    K: int
    N: int
    operands: list[tuple[jax.Array, Any]]
    columns: np.ndarray
    sampled: np.ndarray
    whole: jax.Array

    def errors(self, y: jax.Array) -> tuple[float, float]:
        """Relative errors of y [M, N] in the Frobenius norm: sampled columns, all columns."""
        M = y.shape[0]
        return (
            _relative(np.asarray(y, np.float64)[:, self.columns], self.sampled[:M]),
            _relative(np.asarray(y, np.float32), np.asarray(self.whole[:M])),
        )


def _relative(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))


def codebook_case(text: str, K: int, N: int) -> Case:
    """Random codebook weights of one format and shape."""
    spec = CodebookSpec.parse(text)
    size = spec.bits_per_weight(K, N) / 8 * K * N
    make = jax.jit(lambda key: random_codebook_tensor(key, spec, K, N))
    multiply = jax.jit(lambda x, w: reference(x.astype(jnp.float32), w))
    return _case(text, K, N, size, make, multiply, _float64_columns)


def dense_case(K: int, N: int) -> Case:
    """Random bf16 weights of one shape."""
    make = jax.jit(lambda key: jax.random.normal(key, (K, N), jnp.bfloat16) / K**0.5)
    multiply = jax.jit(
        lambda x, w: jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    )
    float64 = lambda w, columns: np.asarray(w[:, columns], np.float64)
    return _case("bf16", K, N, 2 * K * N, make, multiply, float64)


def _case(spec, K, N, size, make, multiply, float64) -> Case:
    copies = int(np.clip(np.ceil(FOOTPRINT / size), 2, MAX_COPIES))
    x = jax.random.normal(jax.random.key(0), (copies, max(ROWS), K), jnp.bfloat16)
    operands = [(x[i], make(jax.random.key(i + 1))) for i in range(copies)]
    edges = np.r_[:EDGE_COLUMNS, N - EDGE_COLUMNS : N]
    columns = np.r_[edges, np.random.default_rng(0).integers(0, N, RANDOM_COLUMNS)]
    first_x, first_w = operands[0]
    sampled = np.asarray(first_x, np.float64) @ float64(first_w, columns)
    return Case(spec, K, N, operands, columns, sampled, multiply(first_x, first_w))


def _float64_columns(w: CodebookTensor, columns: np.ndarray) -> np.ndarray:
    """Columns of the dequantized weight, [K, len(columns)], from the definition, in numpy."""
    codes = np.asarray(w.codes[:, :, columns])
    books, scales = np.asarray(w.codebooks, np.float64), np.asarray(w.scales, np.float64)
    m, _, v = books.shape
    shifts = (8 * np.arange(4, dtype=np.uint32))[:, None]
    fields = (codes[:, :, None, :] >> shifts & np.uint32(255)).reshape(m, -1, len(columns))
    vectors_jnv = np.sum([books[c][fields[c]] for c in range(m)], axis=0)
    weight = vectors_jnv.transpose(0, 2, 1).reshape(-1, len(columns))
    return weight * np.repeat(scales[:, columns], w.shape[0] // scales.shape[0], axis=0)


def kernel_time(call: Call, operands: Sequence[tuple]) -> tuple[float, float, jax.Array]:
    """Microseconds and launches of one call, over all operands in turn, and the first result."""

    def rotate(operands):
        results = []
        for x, w in operands:
            if results:
                # Without an order XLA would merge work of different copies into one kernel.
                x, _ = jax.lax.optimization_barrier((x, results[-1]))
            results.append(call(x, w))
        return results

    measured = profiler.measure(jax.jit(rotate), aggregate=False, iterations=RUNS)
    results, runs = measured(operands)
    if not runs:
        raise RuntimeError("CUPTI saw no kernel.")
    milliseconds = statistics.median(sum(ms for _, ms in run) for run in runs)
    calls = len(operands)
    return 1e3 * milliseconds / calls, len(runs[0]) / calls, results[0]


def official_codegemm(case: Case, M: int) -> tuple[float, float, jax.Array]:
    """The CUDA kernel of CodeGEMM (module `codegemm_kernel`, built by the user); M = 1 only."""
    import codegemm_kernel  # pyrefly: ignore[missing-import]
    import torch  # pyrefly: ignore[missing-import]

    if M != 1:
        raise NotImplementedError("Its gather kernel takes one row.")
    g = CodebookSpec.parse(case.spec).group_size
    copies = []
    for x, w in case.operands:
        codes = jax.lax.bitcast_convert_type(w.codes, jnp.int32)
        halves = [a.astype(jnp.float16) for a in (x[:1][None], w.scales, w.codebooks)]
        tensors = [torch.from_dlpack(a).clone() for a in (codes, *halves)]
        output = torch.zeros((1, 1, case.N), dtype=torch.half, device="cuda")
        copies.append((*tensors, output))

    def call(codes, x, scales, codebooks, output):
        output.zero_()
        codegemm_kernel.codegemm_gemv(x, output, codes, scales, codebooks, g)

    us = _graph_time([functools.partial(call, *copy) for copy in copies])
    return us, 2.0, jnp.asarray(copies[0][-1][0].cpu().numpy())


def aqlm_2x8(case: Case, M: int) -> tuple[float, float, jax.Array]:
    """AQLM's 2x8 CUDA kernel (package `aqlm`) on codes of the same shape, one scale a column."""
    import torch  # pyrefly: ignore[missing-import]
    from aqlm.inference_kernels import (  # pyrefly: ignore[missing-import]
        get_forward_pass_kernel,
    )

    K, N = case.K, case.N
    draw = lambda *shape: torch.randn(shape, dtype=torch.half, device="cuda") / K**0.5
    calls = []
    for _ in case.operands:
        codes = torch.randint(-128, 128, (N, K // 8, 2), dtype=torch.int8, device="cuda")
        codebooks, scales = draw(2, 256, 1, 8), torch.ones_like(draw(N, 1, 1, 1))
        kernel = get_forward_pass_kernel(codebooks, False)
        x = torch.randn((M, K), dtype=torch.half, device="cuda")
        calls.append(functools.partial(kernel, x, codes, codebooks, scales, None))
    us = _graph_time(calls)
    # Its own random weights, which are compared with this module's dequantization right here.
    books = codebooks[:, :, 0].double()
    first, second = (books[c][codes[:, :, c].long() & 255] for c in range(2))
    weight = (first + second).reshape(N, K)
    wanted, actual = x.double() @ weight.T, calls[-1]().double()
    error = float((actual - wanted).norm() / wanted.norm())
    if error > WRONG:
        raise ArithmeticError(f"Its relative error is {error:.1e}.")
    return us, float("nan"), case.whole[:M]


def _graph_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call, in replays of a CUDA graph of all of them."""
    import torch  # pyrefly: ignore[missing-import]

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(RUNS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[1:])


def measurements(specs: Sequence[str], shapes: Sequence[tuple[int, int]]):
    """Yield (kernel, spec, M, K, N, thunk), the most wanted first within a shape.

    A thunk returns microseconds, launches, y and the case that judges y.
    """

    def timed(call: Call, case: Callable[[], Case], M: int, copies: int | None = None):
        operands = [(x[:M], w) for x, w in case().operands[:copies]]
        return *kernel_time(call, operands), case()

    def rival(function, case: Callable[[], Case], M: int):
        return *function(case(), M), case()

    for K, N in shapes:
        for spec in specs:
            case = functools.cache(functools.partial(codebook_case, spec, K, N))
            kernels = {
                "psumbook_mosaic": psumbook_mosaic.matmul,
                "codebook_matmul": codebook_matmul,
            }
            for name, call in kernels.items():
                for M in ROWS:
                    yield name, spec, M, K, N, functools.partial(timed, call, case, M)
            if importlib.util.find_spec("codegemm_kernel"):
                run = functools.partial(rival, official_codegemm, case, 1)
                yield "official_codegemm", spec, 1, K, N, run
            if spec.startswith("m2v8") and importlib.util.find_spec("aqlm"):
                yield "aqlm_2x8", spec, 1, K, N, functools.partial(rival, aqlm_2x8, case, 1)
            slow = functools.partial(timed, reference, case, max(ROWS), REFERENCE_COPIES)
            yield "reference", spec, max(ROWS), K, N, slow
        dense = functools.cache(functools.partial(dense_case, K, N))
        for M in ROWS:
            yield "dense_bf16", "bf16", M, K, N, functools.partial(timed, jnp.dot, dense, M)


def row(kernel: str, spec: str, M: int, K: int, N: int, thunk) -> dict[str, Any]:
    """One flat row of the results; a failure is a row with `error` and no `us`."""
    head = {"kernel": kernel, "spec": spec, "M": M, "K": K, "N": N, "us": None, "rel_err": None}
    start = time.perf_counter()
    try:
        us, launches, y, case = thunk()
        sampled, whole = case.errors(y)
        head |= {"us": round(us, 2), "rel_err": sampled, "rel_err_all_columns": whole}
        head |= {"launches": launches}
        if kernel == "codebook_matmul":
            head["implementation"] = choose(M, K, N, CodebookSpec.parse(spec), jnp.bfloat16)
        if not max(sampled, whole) <= WRONG:  # NaN included
            head |= {"us": None, "error": f"Wrong: took {us:.2f} us, relative error {whole:.1e}."}
    except Exception as error:  # the other measurements go on
        head["error"] = f"{type(error).__name__}: {str(error)[:500]}"
    return head | {"seconds": round(time.perf_counter() - start, 2)}


def head() -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    versions["backend"] = backend.get_backend().platform_version
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": shlex.join(["python", "-m", "benchmarks.kernels", *sys.argv[1:]]),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Microseconds, a line for each format, shape and M; dense stands beside every format."""
    cells = {(r["kernel"], r["spec"], r["M"], r["K"], r["N"]): r for r in rows}
    names = [*COLUMNS, *(name for name in RIVALS if any(r["kernel"] == name for r in rows))]
    lines = [f"{'us':<10}{'K x N':>13}{'M':>3}" + "".join(f"{name:>19}" for name in names)]
    for spec, M, K, N in dict.fromkeys(key[1:] for key in cells if key[1] != "bf16"):
        line = f"{spec:<10}{f'{K}x{N}':>13}{M:>3}"
        for name in names:
            cell = cells.get((name, "bf16" if name == "dense_bf16" else spec, M, K, N))
            us = cell and cell["us"]
            text = "" if cell is None else "error" if us is None else f"{us:.1f}"
            line += f"{text:>19}"
        lines.append(line)
    errors = [r for r in rows if "error" in r]
    lines += [f"{r['kernel']} {r['spec']} {r['M']} {r['K']}x{r['N']}: {r['error']}" for r in errors]
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int]:
    """Read `4096x14336` as (K, N)."""
    K, N = text.split("x")
    return int(K), int(N)


def main() -> None:
    """Measure everything, write the rows as they come, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="default: results/<device>/kernels.json")
    parser.add_argument("--specs", nargs="+", default=SPECS, help="formats, such as m2v8g128")
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=SHAPES, help="weights, such as 4096x14336"
    )
    parser.add_argument("--seconds", type=float, default=170, help="start nothing later than this")
    arguments = parser.parse_args()
    about, rows, start = head(), [], time.perf_counter()
    device = re.search(r"[A-Z]+\d+\w*", about["device"])
    folder = (device.group() if device else about["device"]).lower()
    out = arguments.out or pathlib.Path(__file__).parent / "results" / folder / "kernels.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for kernel, spec, M, K, N, thunk in measurements(arguments.specs, arguments.shapes):
        if time.perf_counter() - start > arguments.seconds:
            print(f"Stopped after {arguments.seconds:.0f} s; --seconds allows more.")
            break
        rows.append(row(kernel, spec, M, K, N, thunk))
        print(json.dumps(rows[-1]), flush=True)
        body = ",\n".join(json.dumps(r) for r in rows)
        out.write_text(f'{json.dumps(about)[:-1]},\n"rows": [\n{body}\n]}}\n')
    print(table(rows))


if __name__ == "__main__":
    main()
