"""Masks let through what the structure describes, and nothing else."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.request import Structure
from jaxcodec.serve.structured import Grammars, Progress

V = 310  # ten more than the tokenizer has, as padded models do
START, EOS = 1, 2

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cup", "coat"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
        "open": {"type": "boolean"},
    },
    "required": ["name", "kind", "counts"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PretrainedTokenizer:
    return PretrainedTokenizer(Path(__file__).parents[1] / "fixtures" / "tokenizer")


@pytest.fixture(scope="module")
def grammars(tokenizer: PretrainedTokenizer) -> Grammars:
    return Grammars(tokenizer, V)


def allowed(grammars: Grammars, progress: Progress) -> list[int]:
    bits = np.unpackbits(grammars.masks([progress], 1).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def random_response(grammars: Grammars, structure: Structure, seed: int) -> list[int]:
    """Tokens drawn evenly from those that may come."""
    rng, progress, tokens = random.Random(seed), grammars.start(structure, (EOS,)), []
    while not progress.ended:
        tokens.append(rng.choice(allowed(grammars, progress)))
        progress.advance(tokens[-1])
        assert len(tokens) < 300
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_through_a_schema_is_its_json(seed: int, grammars, tokenizer) -> None:
    tokens = random_response(grammars, Structure.json_schema(SCHEMA), seed)
    text = tokenizer.decode(tokens)
    assert not re.search(r"\s\s", re.sub('"[^"]*"', '""', text))
    value = json.loads(text)
    assert {"name", "kind", "counts"} <= value.keys() <= SCHEMA["properties"].keys()
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert value["kind"] in ("cup", "coat")
    assert len(value["counts"]) <= 3
    assert all(isinstance(n, int) and n >= 0 for n in value["counts"])
    assert isinstance(value.get("open", True), bool)


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_through_a_regex_matches_it(seed: int, grammars, tokenizer) -> None:
    pattern = r"(the |end )?[A-C]{1,3}(-\d{2})*;"
    tokens = random_response(grammars, Structure.regex(pattern), seed)
    assert re.fullmatch(pattern, tokenizer.decode(tokens))


def test_masks_are_those_of_an_exhaustive_search(grammars, tokenizer) -> None:
    language = {
        head + "".join(body) + "!"
        for head in ("", "he")
        for size in range(1, 4)
        for body in itertools.product("el", repeat=size)
    }
    structure = Structure.regex("(he)?[el]{1,3}!")
    texts = {t: tokenizer.decode([t]) for t in range(300)}
    for response in sorted(language)[::5]:
        progress, so_far = grammars.start(structure, (EOS,)), ""
        for token in tokenizer.encode_completion(response):
            expected = [
                t
                for t, text in texts.items()
                if text and any(whole.startswith(so_far + text) for whole in language)
            ]
            assert allowed(grammars, progress) == expected
            progress.advance(token)
            so_far += texts[token]
        assert progress.ended


def test_json_may_be_written_close_or_wide(grammars, tokenizer) -> None:
    value = {"name": "a", "kind": "cup", "counts": [1, 2]}
    for separators in ((",", ":"), (", ", ": ")):
        progress = grammars.start(Structure.json_schema(SCHEMA), (EOS,))
        for token in tokenizer.encode_completion(json.dumps(value, separators=separators)):
            progress.advance(token)
        assert progress.ended


def test_a_tool_call_is_one_of_the_tools(grammars, tokenizer) -> None:
    arguments = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                 "additionalProperties": False}  # fmt: skip
    tools = [{"name": "double", "parameters": arguments}, {"name": "half", "parameters": arguments}]
    structure = Structure.tool_call(tools)
    for seed in range(10):
        call = json.loads(tokenizer.decode(random_response(grammars, structure, seed)))
        assert call["name"] in ("double", "half")
        assert isinstance(call["arguments"]["n"], int)


def test_a_grammar_may_end_where_it_is_complete(grammars, tokenizer) -> None:
    progress = grammars.start(Structure.grammar('start: "a" ("b" "c")*'), (EOS,))
    [a, b, c] = tokenizer.encode_completion("abc")
    assert EOS not in allowed(grammars, progress)
    progress.advance(a)
    assert EOS in allowed(grammars, progress)
    for token in (b, c):
        progress.advance(token)
    assert not progress.ended
    progress.advance(EOS)
    assert progress.ended


def test_every_end_of_text_token_ends(grammars, tokenizer) -> None:
    progress = grammars.start(Structure.regex("a|ab"), (EOS, START, V - 1))
    progress.advance(*tokenizer.encode_completion("a"))
    assert {EOS, START} <= set(allowed(grammars, progress))
    progress.advance(START)
    assert progress.ended


def test_rows_without_a_structure_are_free(grammars) -> None:
    progress = grammars.start(Structure.regex("a"), (EOS,))
    masks = grammars.masks([None, progress], 4)
    assert (masks.shape, masks.dtype) == ((4, 10), np.uint32)
    assert (masks[[0, 2, 3]] == 0xFFFFFFFF).all()
    assert np.bitwise_count(masks[1]).sum() == 1


def test_responses_do_not_share_their_progress(grammars, tokenizer) -> None:
    first, second = (grammars.start(Structure.regex("ab"), (EOS,)) for _ in range(2))
    first.advance(*tokenizer.encode_completion("a"))
    assert allowed(grammars, first) != allowed(grammars, second)


def test_a_token_that_may_not_come_is_an_error_of_its_response_alone(grammars, tokenizer) -> None:
    first, second = (grammars.start(Structure.regex("ab"), (EOS,)) for _ in range(2))
    with pytest.raises(ValueError, match="cannot be followed") as error:
        first.advance(*tokenizer.encode_completion("x"))
    assert "<state>" not in str(error.value)
    second.advance(*tokenizer.encode_completion("a"))


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure.json_schema('{"type":'), "json schema cannot be followed"),
        (Structure.json_schema({"type": "objec"}), "Invalid type: objec"),
        (Structure.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Structure.regex("(a"), "regex cannot be followed: .*unclosed group"),
        (Structure.grammar("start: foo"), 'grammar cannot be followed: .*unknown name: "foo"'),
    ],
)
def test_what_is_no_structure_is_said(grammars, structure: Structure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammars.start(structure, (EOS,))


def test_it_takes_the_right_tokenizer_and_llguidance(tokenizer, monkeypatch) -> None:
    with pytest.raises(ValueError, match="need an engine with a PretrainedTokenizer"):
        Grammars(None, V).start(Structure.regex("a"), (EOS,))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxcodec\[structured\]'"):
        Grammars(tokenizer, V).start(Structure.regex("a"), (EOS,))
