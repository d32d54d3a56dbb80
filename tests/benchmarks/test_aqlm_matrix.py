"""The comparison on one matrix, without the reference."""

import numpy as np
import pytest

from benchmarks import aqlm_matrix
from jaxcodec.quantize.additive import AdditiveOptions
from jaxcodec.spec import CodebookSpec

OPTIONS = aqlm_matrix.Options(out=None, size=(64, 32), rounds=2, steps=3, repeats=1)
SPEC = CodebookSpec.parse("m1v4b4g64")


@pytest.fixture(scope="module")
def problem():
    return aqlm_matrix.matrix(*OPTIONS.size, seed=0)


@pytest.fixture(scope="module")
def row(problem):
    W, H = problem
    how = AdditiveOptions(rounds=2, steps=3, tolerance=0.0)
    return aqlm_matrix.ours(W, H, SPEC, aqlm_matrix.EQUAL, how, OPTIONS)


def test_inputs_are_correlated_and_of_full_rank():
    _, H = aqlm_matrix.matrix(256, 8, seed=0)
    H = H.astype(np.float64)
    np.testing.assert_allclose(H, H.T, rtol=1e-6)
    assert np.linalg.eigvalsh(H).min() > 0
    diagonal = np.diagonal(H)
    assert diagonal.max() > 100 * np.median(diagonal)  # outliers
    correlation = H / np.sqrt(np.outer(diagonal, diagonal))
    assert np.abs(correlation - np.eye(256)).max() > 0.3


def test_the_objective_is_the_energy_of_the_outputs(problem):
    W, _ = problem
    rng = np.random.default_rng(0)
    X, W_ = rng.normal(size=(200, 64)), W + rng.normal(size=W.shape)
    expected = np.sum((X @ (W - W_)) ** 2) / np.sum((X @ W) ** 2)
    found = aqlm_matrix.relative_objective(W, X.T @ X / 200, W_)
    assert found == pytest.approx(expected, rel=1e-6)


def test_every_round_is_made_and_what_is_stored_is_measured(row):
    assert row["rounds_made"] == 2
    assert 0 < row["error"] < row["stages"][0]["error"] < 1
    # Float32 in the quantizer, float64 here.
    assert row["stored_error"] == pytest.approx(row["stages"][-1]["error"], rel=1e-4)


def test_without_the_reference_there_are_two_rows(row):
    equal, default = aqlm_matrix.measure(OPTIONS, "m1v4b4")
    assert (equal["quantizer"], default["quantizer"]) == (aqlm_matrix.EQUAL, aqlm_matrix.DEFAULT)
    assert (equal["spec"], equal["K"], equal["N"]) == (str(SPEC), *OPTIONS.size)
    assert equal["rounds_made"] == OPTIONS.rounds < default["rounds_made"]
    assert default["error"] < equal["error"]


def test_columns_of_a_missing_reference_are_empty(row):
    rows = [{"spec": str(SPEC), **row}]
    assert f"{row['error']:.6f}" in aqlm_matrix.summary(rows)
    alone = aqlm_matrix.summary(rows).splitlines()[-1].split()
    assert len(alone) == 7
    theirs = row | {"quantizer": aqlm_matrix.AQLM, "error": 2 * row["error"], "spec": str(SPEC)}
    assert "0.500" in aqlm_matrix.summary([*rows, theirs]).splitlines()[1]


def test_a_folder_without_aqlm_is_refused(problem, tmp_path):
    W, H = problem
    with pytest.raises(ImportError):
        aqlm_matrix.reference(tmp_path, W, H, SPEC, OPTIONS)


def test_both_take_the_same_format():
    arguments = aqlm_matrix._arguments(SPEC, OPTIONS, "cpu")
    assert (arguments.num_codebooks, arguments.nbits_per_codebook) == (1, 4)
    assert (arguments.in_group_size, arguments.scale_nbits) == (4, 0)
    assert arguments.max_epochs == OPTIONS.rounds
    assert arguments.relative_mse_tolerance is None
    to_the_end = aqlm_matrix._arguments(SPEC, OPTIONS, "cpu", to_the_end=True)
    assert (to_the_end.max_epochs, to_the_end.relative_mse_tolerance) == (1000, 0.01)
