"""Lines become requests, or sentences that say what is wrong with them."""

import json
from pathlib import Path

import pytest

from jaxcodec.serve.jsonl import parse_request, read_requests, write_outputs
from jaxcodec.serve.request import (
    Request,
    RequestOutput,
    SamplingParams,
    Structure,
    Timings,
    TokenLogprobs,
)


def test_a_line_holds_a_request() -> None:
    line = {"model": "sums", "prompt": "1+1", "id": "a", "top_k": 4, "stop": ["\n"], "seed": 3}
    sampling = SamplingParams(top_k=4, stop=("\n",), seed=3)
    assert parse_request(json.dumps(line), "base") == Request("sums", "1+1", sampling, "a")
    assert parse_request('{"prompt": [1, 2]}', "base") == Request("base", [1, 2])


def test_a_line_holds_all_that_a_request_can() -> None:
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    line = {
        "messages": messages, "tools": tools, "priority": -1, "deadline_s": 2.5, "n": 2,
        "min_p": 0.1, "logit_bias": {"7": -3.5}, "stop_tokens": [4], "logprobs": 2,
        "structured": {"tool_call": tools},
    }  # fmt: skip
    sampling = SamplingParams(
        min_p=0.1, logit_bias={7: -3.5}, stop_tokens=(4,), logprobs=2, n=2,
        structured=Structure.tool_call(tools),
    )  # fmt: skip
    assert parse_request(json.dumps(line), "base") == Request(
        "base", messages, sampling, priority=-1, deadline_s=2.5, tools=tools
    )


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        ({"json_schema": {"type": "integer"}}, Structure.json_schema({"type": "integer"})),
        ({"regex": "[ab]+"}, Structure.regex("[ab]+")),
        ({"grammar": "start: NAME"}, Structure.grammar("start: NAME")),
    ],
)
def test_a_line_may_ask_for_a_structure(structured: dict, expected: Structure) -> None:
    line = json.dumps({"prompt": "a", "structured": structured})
    assert parse_request(line, "base").sampling.structured == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ("{}", "either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        ('{"prompt": 3}', "'prompt' must be a text or a list of token ids"),
        ('{"messages": "hi"}', "'messages' must be a list of objects"),
        ('{"messages": [], "tools": [3]}', "'tools' must be a list of objects"),
        ('{"prompt": "a", "logit_bias": [3]}', "'logit_bias' must be an object"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "'logit_bias' must be an object"),
        ('{"prompt": "a", "logit_bias": {"3": "x"}}', "logit_bias of token 3 must be a number"),
        ('{"prompt": "a", "structured": "a"}', "'structured' must be an object"),
        ('{"prompt": "a", "structured": {"regex": "a", "grammar": "b"}}', "'structured' must be"),
        ('{"prompt": "a", "structured": {"xml": "a"}}', "must hold one of .*got 'xml' with a str"),
        ('{"prompt": "a", "structured": {"regex": {}}}', "got 'regex' with a dict"),
        ('{"prompt": "a", "structured": {"tool_call": [{}]}}', "with a 'name'"),
        ('{"prompt": "a", "structured": {"tool_call": ["a"]}}', "with a 'name'"),
        ('{"prompt": "a", "deadline_s": -1}', "deadline_s must be"),
        ('{"prompt": "a", "deadline_s": "soon"}', "deadline_s must be a number"),
        ('{"prompt": "a", "priority": "high"}', "priority must be"),
        ('{"prompt": [1, "a"]}', "'prompt' must be"),
        ('{"prompt": "a", "model": 3}', "'model' and 'id' must be texts"),
        ('{"prompt": "a", "temprature": 1}', r"unknown keys \['temprature'\]"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature must be a number, got 'hot'"),
        ('{"prompt": "a", "top_p": 2}', "top_p must lie in"),
        ('{"prompt": "a", "stop": 3}', "stop must be a tuple of texts, got 3"),
    ],
)
def test_what_is_wrong_is_said(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(line, "base")


def test_bad_lines_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\u2028b"}\n\n{"prompt"}\n{"prompt": [3]}\n')
    (one, first), (three, second), (four, third) = read_requests(file, "base")
    assert (one, three, four) == (1, 3, 4)
    assert (first, third) == (Request("base", "a\u2028b"), Request("base", [3]))
    assert str(second).startswith("line 3: not JSON")


def test_a_line_too_deep_to_read_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    deep = "[" * 200_000 + "]" * 200_000
    schema = '{"type": "array", "items": ' * 2000 + "{}" + "}" * 2000
    lines = [
        f'{{"prompt": {deep}}}',
        f'{{"prompt": "a", "structured": {{"json_schema": {schema}}}}}',
        '{"prompt": "a"}',
    ]
    file.write_text("\n".join(lines))
    (_, first), (_, second), (_, last) = read_requests(file, "base")
    assert "line 1: too large or too deeply nested" in str(first)
    # how deep Python goes depends on its version
    assert isinstance(second, Request) or "line 2" in str(second)
    assert last == Request("base", "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl"):
        read_requests(tmp_path / "none.jsonl", "base")


def test_outputs_are_lines(tmp_path: Path) -> None:
    timings = Timings(1.0, 1.5, 2.0, 4.0)
    logprobs = (TokenLogprobs(-1.5, ((5, -1.5), (7, -2.0))), TokenLogprobs(-0.5))
    outputs = [
        (1, RequestOutput("a", "base", "é", (5, 6), "stop", None, 3, 2, timings, 1, logprobs)),
        (4, RequestOutput("b", "base", "", (), "error", "why")),
    ]
    write_outputs(tmp_path / "new" / "out.jsonl", outputs)
    lines = (tmp_path / "new" / "out.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["line"], first["text"], first["tokens"]) == (1, "é", [5, 6])
    assert (first["ttft_s"], first["latency_s"]) == (1.0, 3.0)
    assert first["index"] == 1
    assert first["logprobs"] == [
        {"logprob": -1.5, "top": [[5, -1.5], [7, -2.0]]},
        {"logprob": -0.5, "top": []},
    ]
    assert "logprobs" not in second
    assert (second["line"], second["error"]) == (4, "why")
