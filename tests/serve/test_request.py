"""What a request may ask for."""

import dataclasses
import json
import math
import pickle

import pytest

from jaxcodec.serve.request import Request, SamplingParams, Structure, Timings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-7),
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
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", dict.fromkeys(range(65), 1.0)),
        ("stop_tokens", (-1,)),
        ("stop_tokens", tuple(range(17))),
        ("min_tokens", 129),
        ("n", 0),
        ("n", 129),
        ("logprobs", -1),
        ("logprobs", 21),
        ("ignore_eos", 1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_stop_texts_become_a_tuple() -> None:
    assert hash(SamplingParams(stop=["a", "b"])) == hash(SamplingParams(stop=("a", "b")))


def test_the_callers_mapping_is_copied() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}
    assert params == SamplingParams(logit_bias={3: 1.0}) != SamplingParams()
    assert hash(params) is not None


def test_requests_travel_between_processes() -> None:
    params = SamplingParams(logit_bias={3: 1.0}, stop=("a",), structured=Structure.regex("a"))
    request = Request("base", "a", params, priority=1)
    assert pickle.loads(pickle.dumps(request)) == request
    assert SamplingParams(**dataclasses.asdict(params) | {"structured": None}).logit_bias == {
        3: 1.0
    }


@pytest.mark.parametrize("other", [{"min_tokens": 1}, {"ignore_eos": True}])
def test_a_structure_ends_where_it_ends(other: dict) -> None:
    with pytest.raises(ValueError, match="structured"):
        SamplingParams(structured=Structure.regex("a"), **other)


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, True),
        ({"seed": 3, "top_k": 5, "stop": ("a",), "stop_tokens": (1,), "min_tokens": 2}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"logit_bias": {1: 1.0}}, False),
        ({"logprobs": 0}, False),
        ({"structured": Structure.regex("a")}, False),
    ],
)
def test_greedy_is_the_argmax_alone(params: dict, greedy: bool) -> None:
    assert SamplingParams(**params).greedy == greedy


def test_a_tool_call_names_a_tool_and_its_arguments() -> None:
    arguments = {"type": "object", "properties": {"city": {"type": "string"}}}
    weather = {"name": "weather", "parameters": arguments}
    structure = Structure.tool_call([{"type": "function", "function": weather}, {"name": "time"}])
    first, second = json.loads(structure.text)["anyOf"]
    assert first["properties"] == {"name": {"const": "weather"}, "arguments": arguments}
    assert second["properties"]["name"] == {"const": "time"}


@pytest.mark.parametrize("tools", [[], [{}], ["a"], [{"function": {"parameters": {}}}]])
def test_tools_have_names(tools: list) -> None:
    with pytest.raises(ValueError, match="at least one tool|with a 'name'"):
        Structure.tool_call(tools)


def test_a_structure_has_a_kind() -> None:
    with pytest.raises(ValueError, match="one of .*got 'xml'"):
        Structure("xml", "<a/>")


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", 0.5), ("priority", 2**31), ("deadline_s", 0.0), ("deadline_s", math.nan)],
)
def test_a_requests_own_values_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Request("base", "a", **{field: value})


def test_timings_count_from_submission() -> None:
    timings = Timings(submitted=1.0, started=2.0, first_token=3.5, finished=5.0)
    assert (timings.ttft, timings.latency) == (2.5, 4.0)
    assert Timings(submitted=1.0).ttft is None
