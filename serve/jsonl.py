"""Requests and outputs as JSON lines."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxcodec.checkpoints.files import replacement
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams

_SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
_KEYS = {"model", "prompt", "id", *_SAMPLING}


def read_requests(path: Path, default_model: str) -> list[tuple[int, Request | ValueError]]:
    """(line number, the request on it or what is wrong with it) of each line that is not blank.

    A line is `{"prompt": text or token ids, "model": name, "id": text}` with the fields of
    `SamplingParams` as further keys; all but the prompt may be left out.

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
    prompt = content.get("prompt")
    is_tokens = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_tokens:
        raise ValueError("'prompt' must be a text or a list of token ids")
    model, id = content.get("model", default_model), content.get("id")
    if not isinstance(model, str) or not isinstance(id, str | None):
        raise ValueError("'model' and 'id' must be texts")
    try:
        sampling = SamplingParams(**{k: v for k, v in content.items() if k in _SAMPLING})
    except TypeError as error:
        raise ValueError(f"a sampling parameter has the wrong type: {error}") from None
    return Request(model, prompt, sampling, id)


def write_outputs(path: Path, outputs: Iterable[tuple[int, RequestOutput]]) -> None:
    """A line of JSON for each (line number of the request, its output), whole or not at all."""
    with replacement(path) as [temporary]:
        with open(temporary, "w", encoding="utf-8") as file:
            for number, output in outputs:
                file.write(json.dumps(_as_json(number, output), ensure_ascii=False) + "\n")


def _as_json(number: int, output: RequestOutput) -> dict[str, Any]:
    fields = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    timings = fields.pop("timings")
    seconds = None if timings is None else {"ttft_s": timings.ttft, "latency_s": timings.latency}
    return {"line": number, **fields, **(seconds or {})}
