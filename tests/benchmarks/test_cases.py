"""Operands and the answers that judge results."""

import jax.numpy as jnp
import numpy as np

from benchmarks import compiling
from benchmarks.cases import SAMPLED_ROWS, Item, host_rows, make_case


def test_sampled_answers_agree_with_the_reference():
    case_key = Item("", "m2v4b4g32", 1, 128, (160, 192)).case
    case = make_case(case_key, *compiling.case(case_key))
    assert case.sampled.shape == (len(SAMPLED_ROWS), len(case.columns))
    whole = np.asarray(case.whole)[:, case.columns]
    np.testing.assert_allclose(case.sampled, whole, rtol=1e-4, atol=1e-4)


def test_rows_of_x_are_prefixes():
    assert host_rows(64, "bfloat16").dtype == jnp.bfloat16
    assert host_rows(64, "float32").shape == (4096, 64)
