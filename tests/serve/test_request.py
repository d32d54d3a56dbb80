"""What a request may ask for."""

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
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
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 1e39),
        ("top_p", 1e-46),
        ("top_p", [0.5]),
        ("min_p", 1e-46),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e39),
        ("presence_penalty", "0"),
        ("logit_bias", None),
        ("logit_bias", [3]),
        ("logit_bias", {3: "x"}),
        ("logit_bias", {True: 1.0}),
        ("stop", None),
        ("stop", b"ab"),
        ("stop", ("a",) * 17),
        ("stop", ("a" * 257,)),
        ("stop_tokens", None),
        ("stop_tokens", 3),
        ("stop_tokens", (True,)),
        ("structured", {"type": "object"}),
        ("structured", "[ab]"),
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


def test_numbers_of_numpy_are_numbers() -> None:
    half: Any = np.float32(0.5)
    params = SamplingParams(temperature=half, logit_bias={3: half})
    assert (params.temperature, params.logit_bias) == (0.5, {3: 0.5})
    assert len(Request("base", np.array([1, 2])).prompt) == 2


def test_a_schema_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be written as JSON.*set"):
        Structure.json_schema({"enum": {1, 2}})
    with pytest.raises(ValueError, match="regex must be a text, got a NoneType"):
        Structure.regex(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 0.5),
        ("priority", 2**31),
        ("deadline_s", 0.0),
        ("deadline_s", math.nan),
        ("deadline_s", "x"),
        ("deadline_s", True),
        ("model", None),
        ("id", 3),
        ("prompt", None),
        ("prompt", 5),
        ("prompt", b"ab"),
        ("prompt", {"role": "user", "content": "a"}),
        ("prompt", {1, 2}),
        ("sampling", None),
        ("sampling", {"temperature": 1}),
        ("tools", None),
        ("tools", "a"),
        ("tools", ["a"]),
    ],
)
def test_a_requests_own_values_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Request(**{"model": "base", "prompt": "a", field: value})


def test_timings_count_from_submission() -> None:
    timings = Timings(submitted=1.0, started=2.0, first_token=3.5, finished=5.0)
    assert (timings.ttft, timings.latency) == (2.5, 4.0)
    assert Timings(submitted=1.0).ttft is None


def test_no_time_passes_while_a_clock_is_set_back() -> None:
    timings = Timings(submitted=5.0, started=4.0, first_token=3.5, finished=3.0)
    assert (timings.ttft, timings.latency) == (0.0, 0.0)
