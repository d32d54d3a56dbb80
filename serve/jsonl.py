"""Requests and outputs as JSON lines."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxcodec.checkpoints.files import replacement
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams, Structure

_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
_REQUEST = {"id", "priority", "deadline_s", "tools"}
_KEYS = {"model", "prompt", "messages", *_REQUEST, *_SAMPLING}
_STRUCTURES = ("json_schema", "regex", "grammar", "tool_call")


def read_requests(path: Path, default_model: str) -> list[tuple[int, Request | ValueError]]:
    """(line number, the request on it or what is wrong with it) of each line that is not blank.

    A line is an object with "prompt" (text or token ids) or "messages" (a chat). All else may be
    left out: "model", the other fields of `Request` and those of `SamplingParams`; "structured" is
    `{"json_schema": schema}`, `{"regex": text}`, `{"grammar": text}` or `{"tool_call": tools}`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    read: list[tuple[int, Request | ValueError]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                read.append((number, parse_request(line, default_model)))
            except ValueError as error:
                read.append((number, ValueError(f"line {number}: {error}")))
            except (MemoryError, RecursionError) as error:
                cause = type(error).__name__
                too_large = f"line {number}: too large or too deeply nested ({cause})"
                read.append((number, ValueError(too_large)))
    return read


def parse_request(line: str, default_model: str) -> Request:
    """One line of `read_requests`.

    Raises:
      ValueError: no JSON object, an unknown key, no prompt, or a value that cannot be.
    """
    try:
        content: Any = json.loads(line)
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate
    except ValueError as error:
        raise ValueError(f"not JSON of Unicode text: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
    if unknown := sorted(content.keys() - _KEYS):
        raise ValueError(f"unknown keys {unknown}; known are {sorted(_KEYS)}")
    model, id = content.get("model", default_model), content.get("id")
    if not isinstance(model, str) or not isinstance(id, str | None):
        raise ValueError("'model' and 'id' must be texts")
    prompt = _prompt(content)
    sampling = _sampling({k: v for k, v in content.items() if k in _SAMPLING})
    own = {k: v for k, v in content.items() if k in _REQUEST}
    return Request(model, prompt, sampling, **own)


def _prompt(content: dict[str, Any]) -> str | list[Any]:
    if ("prompt" in content) == ("messages" in content):
        raise ValueError("give either 'prompt' or 'messages'")
    for name in ("messages", "tools"):
        value = content.get(name, [{}])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ValueError(f"{name!r} must be a list of objects")
    if "messages" in content:
        return content["messages"]
    prompt = content["prompt"]
    is_tokens = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_tokens:
        raise ValueError("'prompt' must be a text or a list of token ids")
    return prompt


def _sampling(fields: dict[str, Any]) -> SamplingParams:
    bias, structured = fields.get("logit_bias", {}), fields.get("structured")
    if not isinstance(bias, dict) or not all(token.isdecimal() for token in bias):
        raise ValueError("'logit_bias' must be an object whose keys are token ids")
    fields["logit_bias"] = {int(token): value for token, value in bias.items()}
    if structured is not None:
        if not isinstance(structured, dict) or len(structured) != 1:
            raise ValueError(f"'structured' must be an object with one of {list(_STRUCTURES)}")
        [(kind, value)] = structured.items()
        fields["structured"] = _structure(kind, value)
    return SamplingParams(**fields)


def _structure(kind: str, value: Any) -> Structure:
    types = {"json_schema": dict, "tool_call": list}
    if kind not in _STRUCTURES or not isinstance(value, types.get(kind, str)):
        raise ValueError(
            f"'structured' must hold one of {list(_STRUCTURES)}: an object, two texts and a list "
            f"of tools; got {kind!r} with a {type(value).__name__}"
        )
    return getattr(Structure, kind)(value)


def write_outputs(path: Path, outputs: Iterable[tuple[int, RequestOutput]]) -> None:
    """A line of JSON for each (line number of the request, its output), whole or not at all."""
    with replacement(path) as [temporary]:
        with open(temporary, "w", encoding="utf-8") as file:
            for number, output in outputs:
                file.write(json.dumps(_as_json(number, output), ensure_ascii=False) + "\n")


def _as_json(number: int, output: RequestOutput) -> dict[str, Any]:
    fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    timings, logprobs = fields.pop("timings"), fields.pop("logprobs")
    if timings is not None:
        fields |= {"ttft_s": timings.ttft, "latency_s": timings.latency}
    if logprobs is not None:
        fields["logprobs"] = [token._asdict() for token in logprobs]
    return {"line": number, **fields}
