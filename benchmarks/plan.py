"""What the benchmark measures, the most wanted first.

Letters: M rows, K input and N output features.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from benchmarks import rivals
from benchmarks.cases import DENSE, Item
from jaxcodec.pallas_kernels.shapes import (
    LLAMA_8B,
    LLAMA_8B_TOGETHER,
    LLAMA_70B,
    LLAMA_70B_TOGETHER,
)

SPECS = ("m1v4g128", "m2v8g128")
OTHER_SPECS = ("m1v8b16g128", "m3v8g128", "m4v8g128")
SHAPES = (*LLAMA_8B.values(), *LLAMA_70B.values())
GROUPS = (*LLAMA_8B_TOGETHER.values(), *LLAMA_70B_TOGETHER.values())
SOME_SHAPES = ((4096, 14336), (8192, 28672))
KERNEL_SHAPES = ((4096, 4096), *SOME_SHAPES)
# Rows of x in the order in which a run that ends early should have them.
ROWS_BY_WEIGHT = (1, 8, 64, 512, 4096, 32, 128, 16, 2, 4, 1024)
OTHER_ROWS = (1, 8)
GROUP_ROWS = (1, 8, 32, 128, 512)
FLOAT32_ROWS = (1, 8, 128)
OFFICIAL_ROWS = (2, 8, 64, 512, 4096)  # besides 1, on some shapes
# Where each kernel is a choice at all.
KERNEL_ROWS = {
    "psumbook_mosaic": (1, 2, 4, 8),
    "mma_mosaic": (1, 8, 16, 32, 64),
    "wgmma_mosaic": (32, 64, 128, 512, 4096),
    "dequantize": (64, 512, 4096),
}
# Where the compile of each kernel is timed, with nothing else running.
COMPILE_ROWS = {"psumbook_mosaic": 1, "mma_mosaic": 8, "wgmma_mosaic": 128}


def compiled_alone() -> list[Item]:
    """One item of each kernel and format."""
    K, N = SOME_SHAPES[0]
    return [Item(name, spec, M, K, (N,)) for name, M in COMPILE_ROWS.items() for spec in SPECS]


def items() -> list[Item]:
    """All measurements, in order; a rival's only where it can be imported."""
    first, *rest = ROWS_BY_WEIGHT
    parts = [_public([first]), compiled_alone(), _formats(), _float32(), _public(rest)]
    parts += [_groups(), _official(), _kernels()]
    return list(dict.fromkeys(itertools.chain(*parts)))


def _public(rows: Sequence[int]) -> Iterator[Item]:
    for M, (K, N) in itertools.product(rows, SHAPES):
        dense = [Item("dense_bf16", DENSE, M, K, (N,)), Item("dense_bf16_torch", DENSE, M, K, (N,))]
        yield from _installed(dense)
        yield from (Item("codebook_matmul", spec, M, K, (N,)) for spec in SPECS)
        if M == 1:
            yield from _installed(Item("official_codegemm", spec, 1, K, (N,)) for spec in SPECS)
            aqlm = ((name, rivals.aqlm_spec(name, K)) for name in rivals.AQLM_CODEBOOKS)
            yield from _installed(Item(name, spec, 1, K, (N,)) for name, spec in aqlm)


def _groups() -> Iterator[Item]:
    for M, (K, Ns) in itertools.product(GROUP_ROWS, GROUPS):
        yield Item("dense_bf16", DENSE, M, K, (sum(Ns),))
        for spec in SPECS:
            yield Item("codebook_matmul_group", spec, M, K, tuple(Ns))


def _formats() -> Iterator[Item]:
    for spec, M, (K, N) in itertools.product(OTHER_SPECS, OTHER_ROWS, SOME_SHAPES):
        yield Item("codebook_matmul", spec, M, K, (N,))


def _float32() -> Iterator[Item]:
    K, N = SOME_SHAPES[0]
    for spec, M, shape in itertools.product(SPECS, FLOAT32_ROWS, ((K, N), (N, K))):
        yield Item("codebook_matmul", spec, M, shape[0], (shape[1],), "float32")


def _official() -> Iterator[Item]:
    for M, (K, N), spec in itertools.product(OFFICIAL_ROWS, KERNEL_SHAPES, SPECS):
        yield from _installed([Item("official_codegemm", spec, M, K, (N,))])


def _kernels() -> Iterator[Item]:
    yield from compiled_alone()
    for name, rows in KERNEL_ROWS.items():
        for M, (K, N), spec in itertools.product(rows, KERNEL_SHAPES, SPECS):
            yield Item(name, spec, M, K, (N,))


def _installed(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        if item.kernel not in rivals.MODULES or rivals.available(item.kernel):
            yield item
