"""The engine's benchmark, on a model that is made in no time."""

import dataclasses

import pytest

from benchmarks import engine
from benchmarks.cases import DENSE
from benchmarks.decode_step import LLAMA_8B


def test_a_record_counts_what_was_served(monkeypatch):
    for name, value in {"SHARED": 32, "OWN": 9, "NEW": 4, "POSITIONS": 64, "MODELS": 2}.items():
        monkeypatch.setattr(engine, name, value)
    config = dataclasses.replace(
        LLAMA_8B,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        windows=(None,),
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_positions=64,
    )
    (record,) = engine.measure(config, DENSE, (4,))
    assert "error" not in record
    # The prefix once, the rest of each prompt; the last token of a prompt is the first step's.
    assert record["prefill_tokens"] == 32 + 4 * 8
    assert record["reused_tokens"] == 3 * 32
    assert record["ttft_worst_ms"] >= record["ttft_median_ms"] > 0
    assert record["tokens_per_second"] == pytest.approx(4 * 4 / record["seconds"], rel=0.1)
    (failure,) = engine.measure(config, DENSE, (0,))
    assert "ValueError" in failure["error"]
