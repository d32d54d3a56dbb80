"""What a request may ask for."""

import math

import pytest

from jaxcodec.serve.request import SamplingParams, Timings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("max_tokens", True),
        ("stop", "text"),
        ("stop", ("a", "")),
        ("stop", (3,)),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_stop_texts_become_a_tuple() -> None:
    assert hash(SamplingParams(stop=["a", "b"])) == hash(SamplingParams(stop=("a", "b")))


def test_timings_count_from_submission() -> None:
    timings = Timings(submitted=1.0, started=2.0, first_token=3.5, finished=5.0)
    assert (timings.ttft, timings.latency) == (2.5, 4.0)
    assert Timings(submitted=1.0).ttft is None
