"""A decode step is built and timed."""

import pytest

from benchmarks import decode_step
from benchmarks.cases import DENSE
from jaxcodec.models.config import ModelConfig


@pytest.mark.parametrize("spec", ["m2v8g32", DENSE])
def test_decode_step_is_timed(monkeypatch, spec):
    config = ModelConfig("llama", 96, 64, 128, 2, 4, 2, 16, 128, (None, None))
    monkeypatch.setattr(decode_step, "CONTEXT", 32)
    monkeypatch.setattr(decode_step, "STEPS", 2)
    monkeypatch.setattr(
        decode_step, "kernel_time", lambda calls, wait: (1500.0, wait([c() for c in calls]) and 7.0)
    )
    model = decode_step.random_model(config, spec)
    record = decode_step._measure(model, 2)
    assert record["compile_seconds"] >= 0
    assert record["ms_per_step"] > 0
    assert record["kernel_ms"] == 1.5
    assert (spec == DENSE) == (not model.specs)
