"""Kernels of others, measured where their modules can be imported: CodeGEMM's, AQLM's, cuBLAS's.

The first two are built by the user: `codegemm_kernel` from the repository naver-aics/codegemm, the
package `aqlm` from PyPI. They run in PyTorch and in float16, on copies of weights as everything
else. cuBLAS, which PyTorch calls for a dense product in bf16, is there to judge XLA's choice.

Letters: M rows, K input and N output features, m codebooks, b bits a code, v weights a code.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.cases import (
    FOOTPRINT,
    SAMPLED_ROWS,
    Case,
    Item,
    device_rows,
    relative,
)
from jaxcodec.pallas_kernels.timing import RUNS, kernel_time
from jaxcodec.spec import CodebookSpec

# Name of a kernel to the module that it needs.
MODULES = {
    "official_codegemm": "codegemm_kernel",
    "aqlm_2x8": "aqlm",
    "aqlm_1x16": "aqlm",
    "dense_bf16_torch": "torch",
}
AQLM_CODEBOOKS = {"aqlm_2x8": (2, 8), "aqlm_1x16": (1, 16)}  # m, b
AQLM_VECTOR_LENGTH = 8


def measure(case: Case | None, item: Item) -> dict[str, Any]:
    """Times and error of a rival; what runs on its own weights takes no case."""
    if item.kernel in AQLM_CODEBOOKS:
        return aqlm(item)
    assert case is not None
    return {"official_codegemm": official_codegemm, "dense_bf16_torch": dense_bf16_torch}[
        item.kernel
    ](case, item)


def available(kernel: str) -> bool:
    """Whether the module of a rival can be imported."""
    return importlib.util.find_spec(MODULES[kernel]) is not None


def aqlm_spec(kernel: str, K: int) -> str:
    """The format of an AQLM kernel: one scale an output feature."""
    m, b = AQLM_CODEBOOKS[kernel]
    return str(CodebookSpec(m, AQLM_VECTOR_LENGTH, K, b))


def official_codegemm(case: Case, item: Item) -> dict[str, Any]:
    """CodeGEMM as its linear layer runs it, on a case's weights.

    One row: the gather kernel, with the zeroing of its output. More: dequantize, then multiply.
    """
    import torch  # isort: skip  # pyrefly: ignore[missing-import]
    import codegemm_kernel  # isort: skip  # pyrefly: ignore[missing-import]

    half = lambda array: torch.from_dlpack(array).half()
    g = CodebookSpec.parse(item.spec).group_size
    x = half(device_rows(item.M, item.K, item.x))
    output = torch.zeros((1, 1, item.N), dtype=torch.half, device="cuda")

    def gather(codes, scales, codebooks):
        output.zero_()
        codegemm_kernel.codegemm_gemv(x[None], output, codes, scales, codebooks, g)
        return output[0]

    def multiply(codes, scales, codebooks):
        return x @ codegemm_kernel.codegemm_dequant(codes, scales, codebooks, g)

    calls = []
    for (w,) in case.copies:
        codes = torch.from_dlpack(jax.lax.bitcast_convert_type(w.codes, "int32"))
        arguments = codes, half(w.scales), half(w.codebooks)
        calls.append(functools.partial(gather if item.M == 1 else multiply, *arguments))
    return _times(calls) | {"rel_err": _error(calls[0](), case, item)}


def dense_bf16_torch(case: Case, item: Item) -> dict[str, Any]:
    """PyTorch's dense product in bf16, which is cuBLAS's; its result is rounded to bf16."""
    import torch  # pyrefly: ignore[missing-import]

    x = torch.from_dlpack(device_rows(item.M, item.K, item.x))
    weights = [torch.from_dlpack(w) for (w,) in case.copies]
    calls = [functools.partial(torch.matmul, x, weight) for weight in weights]
    return _times(calls) | {"rel_err": _error(calls[0](), case, item)}


def aqlm(item: Item) -> dict[str, Any]:
    """An AQLM kernel for one row, on random weights of its own format.

    Its result is compared with float64 on all columns.
    """
    import torch  # pyrefly: ignore[missing-import]
    from aqlm.inference_kernels import (  # pyrefly: ignore[missing-import]
        get_forward_pass_kernel,
    )

    K, N = item.K, item.N
    m, b = AQLM_CODEBOOKS[item.kernel]
    v, low = AQLM_VECTOR_LENGTH, -(2 ** (b - 1))
    draw = lambda *shape: torch.randn(shape, dtype=torch.half, device="cuda") / K**0.5
    x, scales = draw(1, K) * K**0.5, torch.ones((N, 1, 1, 1), dtype=torch.half, device="cuda")
    integer = torch.int8 if b == 8 else torch.int16
    draw_codes = lambda: torch.randint(low, -low, (N, K // v, m), dtype=integer, device="cuda")
    codes, codebooks = draw_codes(), draw(m, 2**b, 1, v)
    run = get_forward_pass_kernel(codebooks, False)
    books = codebooks[:, :, 0].double()
    vectors = torch.stack([books[c][codes[:, :, c].long() % 2**b] for c in range(m)]).sum(0)
    wanted = x.double() @ vectors.reshape(N, K).T
    actual = run(x, codes, codebooks, scales, None).double()
    error = float((actual - wanted).norm() / wanted.norm())
    size = codes.nbytes + codebooks.nbytes
    copies = [(codes, codebooks)]
    copies += [(draw_codes(), codebooks.clone()) for _ in range(int(FOOTPRINT / size))]
    calls = [functools.partial(run, x, *copy, scales, None) for copy in copies]
    return _times(calls) | {"rel_err": error}


def _error(y: Any, case: Case, item: Item) -> float:
    """Relative error of y [M, N] on sampled rows and columns, against float64."""
    rows = [row for row in SAMPLED_ROWS if row < item.M]
    actual = y[rows].double().cpu().numpy()[:, case.columns]
    return relative(actual, case.sampled[: len(rows)])


def _times(calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
    """CUPTI's kernel time, as of everything else, and that of replays of a CUDA graph."""
    import torch  # pyrefly: ignore[missing-import]

    us, launches = kernel_time(calls, lambda _: torch.cuda.synchronize())
    graph_us = _graph_time(calls)
    torch.cuda.empty_cache()  # most of the memory is JAX's
    return {"us": us, "us_in_graph": graph_us, "launches": launches}


def _graph_time(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call, gaps included, in replays of a CUDA graph of all of them."""
    import torch  # pyrefly: ignore[missing-import]

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
