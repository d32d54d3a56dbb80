"""Measuring on a CPU with a faked clock: rows, errors, the file."""

import json
import math

import jax.numpy as jnp
import pytest

from benchmarks import kernels
from benchmarks.cases import DENSE, Item

TINY = {"M": 8, "K": 256, "Ns": (192,)}


@pytest.fixture
def bench(monkeypatch):
    """A benchmark on the CPU, whose clock says 12.5 us in 2 kernels after every call was made."""

    def kernel_time(calls, wait):
        wait([call() for call in calls])
        return 12.5, 2.0

    monkeypatch.setattr(kernels, "kernel_time", kernel_time)
    monkeypatch.setattr("benchmarks.cases.FOOTPRINT", 1e5)
    bench = kernels.Benchmark()
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("kernel", "spec", "Ns"),
    [
        ("dense_bf16", DENSE, (192,)),
        ("codebook_matmul", "m2v8g128", (192,)),
        ("codebook_matmul", "m1v8b16g128", (192,)),
        ("codebook_matmul_group", "m1v4g128", (192, 256)),
        ("dequantize", "m3v4g64", (192,)),
    ],
)
def test_row_is_flat_and_right(bench, kernel, spec, Ns):
    item = Item(kernel, spec, 8, 256, Ns)
    (measured,) = bench.rows([item], math.inf)
    assert "error" not in measured, measured
    assert (measured["kernel"], measured["spec"]) == (kernel, spec)
    assert (measured["M"], measured["K"], measured["N"]) == (8, 256, sum(Ns))
    assert (measured["us"], measured["launches"]) == (12.5, 2.0)
    # A weight rounded to bf16 alone makes 1.7e-3; the others do not round before the end.
    bound = 3e-3 if kernel == "dequantize" else 1e-5
    assert measured["rel_err"] < bound
    assert measured["rel_err_all_columns"] < bound
    assert json.loads(json.dumps(measured)) == measured


def test_row_of_float32(bench):
    (measured,) = bench.rows([Item("codebook_matmul", "m2v8g128", **TINY, x="float32")], math.inf)
    assert measured["x"] == "float32"
    assert measured["rel_err"] < 1e-6


def test_wrong_result_has_an_error_and_no_time(bench, monkeypatch):
    double = lambda kernel, dtype: lambda x, weights: (2 * jnp.dot(x, weights[0]),)
    monkeypatch.setattr("benchmarks.cases.multiplication", double)
    (measured,) = bench.rows([Item("dense_bf16", DENSE, **TINY)], math.inf)
    assert measured["us"] is None
    assert measured["error"].startswith("Wrong: took 12.50 us")


def test_failure_is_a_row(bench):
    (measured,) = bench.rows([Item("no_such_kernel", "m2v8g128", **TINY)], math.inf)
    assert measured["us"] is None
    assert "no_such_kernel" in measured["error"]


def test_compile_time_stands_in_the_row(bench):
    item = Item("codebook_matmul", "m1v4g128", **TINY)
    bench.time_compiles([item])
    (measured,) = bench.rows([item], math.inf)
    assert measured["compile_seconds"] > 0


def test_nothing_starts_after_the_deadline(bench):
    assert list(bench.rows([Item("codebook_matmul", "m1v4g128", **TINY)], 0.0)) == []


def test_results_are_written_as_they_come(tmp_path, about, row):
    out = tmp_path / "results" / "kernels.json"
    results, rows = kernels.Results(out, about), []
    for M in (1, 2):
        rows.append(row("dense_bf16", DENSE, M, 256, 128, 3.0))
        results.add("rows", rows[-1])
        assert json.loads(out.read_text()) == about | {"rows": rows}


def test_runs_side_by_side_share_their_results(tmp_path, about, row):
    out = tmp_path / "kernels.json"
    first = kernels.Results(out, about)
    second = kernels.Results(out, about | {"command": "the second"}, resume=True)
    rows = [row("dense_bf16", DENSE, M, 256, 128, 3.0) for M in (1, 2, 4)]
    for results, measured in zip((first, second, first), rows, strict=True):
        results.add("rows", measured)
    found = json.loads(out.read_text())
    assert found["rows"] == rows
    assert [run["command"] for run in found["resumed"]] == ["the second"]
    with pytest.raises(ValueError, match="another file"):
        kernels.Results(out, about | {"device": "another"}, resume=True)
    kernels.Results(out, about)
    assert json.loads(out.read_text())["rows"] == []
