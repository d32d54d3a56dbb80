"""The engine's benchmark, on a model that is made in no time."""

import json
import sys

import pytest

from benchmarks import engine
from benchmarks.cases import DENSE
from benchmarks.engine import Options

SMALL = {"tiny": True, "models": 2, "context": 32, "turn": 8, "new": 8}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """Of both modes, by mode."""
    out = tmp_path_factory.mktemp("engine")
    options = Options(out=out, specs=(DENSE,), **SMALL)
    return {mode: [*engine.measure(options, DENSE, mode, 3)][-1] for mode in engine.MODES}


def test_private_caches_read_again_what_a_shared_one_has(records) -> None:
    # Both turns' prompts but for their last tokens; the second turn finds the full pages of the
    # first's 39 tokens.
    asked = 3 * (31 + 47)
    assert records["private"]["prefill_tokens"] == asked
    assert records["shared"]["prefill_tokens"] == asked - 3 * 32
    assert records["shared"]["reused_tokens"] == 3 * 32
    assert records["private"]["reused_tokens"] == 0
    assert records["shared"]["pages"] < records["private"]["pages"]


@pytest.mark.parametrize("mode", engine.MODES)
def test_a_record_tells_what_a_new_device_does(records, mode) -> None:
    record = records[mode]
    assert "error" not in record
    assert record["programs"] >= 3
    assert record["compilations_after_warm_up"] == 0
    assert record["not_in_place_gb"] <= 0.1 * record["pool_gb"]
    assert record["temporary_gb"] < record["pool_gb"]
    assert record["ttft_worst_ms"] >= record["ttft_median_ms"] > 0
    assert record["longest_wait_ms"] >= record["itl_mean_ms"] > 0
    # the seconds are rounded
    assert record["tokens_per_second"] == pytest.approx(3 * 2 * 8 / record["seconds"], rel=0.5)


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch) -> None:
    out = tmp_path / "engine.json"
    arguments = ["--out", str(out), "--tiny", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/engine.py", *arguments])
    engine.main()
    content = json.loads(out.read_text())
    assert content["records"] == []
    assert content["left_out"] == [["m2v8g128", 16, mode] for mode in engine.MODES]


def test_a_failure_is_a_record(tmp_path) -> None:
    options = Options(out=tmp_path, **SMALL)
    *_, record = engine.measure(options, DENSE, "shared", 0)
    assert "ValueError" in record["error"]
