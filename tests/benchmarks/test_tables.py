"""Tables and targets of rows."""

import math

import pytest

from benchmarks import tables


def test_targets_name_their_worst_case(about, row, measured_rows):
    rows = [*measured_rows]
    rows.append(row("codebook_matmul", "m1v4g128", 32, 8192, 28672, None, error="Broken."))
    about = about | {"decode_steps": [{"kernel": "decode", "spec": "m2v8g128", "M": 1}]}
    about["decode_steps"][0]["compile_seconds"] = 40.0
    found = {t.what: t.line() for t in tables.targets(tables.Times(about, rows), about)}
    assert "pass  worst 0.6 " in found["M=1: time over official CodeGEMM"]
    assert "MISS  worst 0.5 " in found["M=1: time over AQLM 2x8"]
    assert "pass  worst 4 " in found["M=2,4,8, 70B: faster than dense"]
    assert "not measured" in found["M=32, 70B: faster than dense"]
    assert "MISS  worst 40 " in found["seconds to compile a decode step of 8B"]


def test_a_nan_error_never_passes(row):
    rows = [row("codebook_matmul", "m1v4g128", 1, 256, 128, 1.0)]
    target = tables.Target("error", 1e-3, False, [(0.01, rows[0]), (math.nan, rows[0])])
    assert "MISS" in target.line()


def test_report_shows_ratios_groups_and_errors(about, row, measured_rows):
    rows = [*measured_rows]
    group = row("codebook_matmul_group", "m2v8g128", 1, 4096, 5120, 10.0, Ns=[4096, 1024])
    rows += [row("dense_bf16", "bf16", 1, 4096, 5120, 30.0), group]
    rows.append(row("wgmma_mosaic", "m1v4g128", 64, 4096, 4096, None, error="Refused: 64."))
    text = tables.report(about, rows)
    assert "4.00x" in text
    assert "3.00x" in text
    assert "wgmma_mosaic m1v4g128 M=64 4096x4096: Refused: 64." in text
    # The rival launches twice for the group: 33.3 us against 10.
    assert "33.3   0.30" in text


def test_floor_counts_codes_scales_and_codebooks(about, row):
    times = tables.Times(about, [])
    floor = times.floor(row("", "m2v8g128", 1, 8192, 28672, 1.0))
    assert floor == pytest.approx((2.125 * 8192 * 28672 / 8 + 8192) / 3e12 * 1e6, rel=1e-6)
