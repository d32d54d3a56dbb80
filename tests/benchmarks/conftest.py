"""Rows as the benchmark writes them, with times that nobody measured."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import plan, tables

Row = dict[str, Any]


def _row(kernel, spec, M, K, N, us, **fields) -> Row:
    base = {"kernel": kernel, "spec": spec, "M": M, "K": K, "N": N, "x": "bfloat16"}
    return base | {"us": us, "rel_err": 2e-4} | fields


@pytest.fixture
def about() -> Row:
    """A head."""
    return {"device": "a GPU", "hbm_bytes_per_second": 3e12}


@pytest.fixture
def row() -> Callable[..., Row]:
    """Makes one row of (kernel, spec, M, K, N, us), and further fields by name."""
    return _row


@pytest.fixture
def measured_rows() -> list[Row]:
    """The public operation 4 times faster than dense, at 0.6 of CodeGEMM's time."""
    rows = []
    for K, N in tables.SHAPES:
        for M in (1, 2, 8, 64, 4096):
            rows.append(_row("dense_bf16", "bf16", M, K, N, 40.0))
            rows += [_row("codebook_matmul", spec, M, K, N, 10.0) for spec in plan.SPECS]
        rows.append(_row("official_codegemm", "m2v8g128", 1, K, N, 10.0 / 0.6))
        rows.append(_row("aqlm_2x8", f"m2v8g{K}", 1, K, N, 20.0))
    return rows
