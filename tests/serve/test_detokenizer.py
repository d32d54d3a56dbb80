"""Text comes in whole characters, and ends before a stop text, wherever tokens are cut."""

import random
from pathlib import Path

import pytest

from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.detokenizer import TextStream

TEXT = "Grüße, 世界! 👩‍🚀 ends here. tail"


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()]


def test_characters_come_whole(tokenizer) -> None:
    prompt = tokenizer.encode("Hi. ")
    found = pieces(TextStream(tokenizer, prompt), tokenizer.encode(TEXT))
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)


def test_bytes_that_are_no_character_do_not_hold_up_the_rest(tokenizer) -> None:
    tokens = [0xFF] * 6 + tokenizer.encode("abc")
    found = pieces(TextStream(tokenizer, []), tokens)
    assert "".join(found) == tokenizer.decode(tokens)
    assert "".join(found[:-1]).endswith("abc")


def test_an_unfinished_character_comes_at_the_end(tokenizer) -> None:
    found = pieces(TextStream(tokenizer, []), tokenizer.encode("a世")[:-1])
    assert found[0] == "a"
    assert "".join(found) == "a\ufffd"


def test_text_that_may_begin_a_stop_is_held_back(tokenizer) -> None:
    stream = TextStream(tokenizer, [], ("END",))
    assert [stream.push(t) for t in b"aENx"] == ["a", "", "", "ENx"]
    assert [stream.push(t) for t in b"yEND"] == ["y", "", "", ""]
    assert stream.stopped
    assert stream.text == "aENxy"
    assert stream.push(ord("z")) == stream.finish() == ""


def test_what_was_held_back_comes_at_the_end(tokenizer) -> None:
    stream = TextStream(tokenizer, [], ("END",))
    assert [stream.push(t) for t in b"aEN"] == ["a", "", ""]
    assert stream.finish() == "EN"
    assert stream.text == "aEN"


@pytest.mark.parametrize("seed", range(20))
def test_streams_equal_the_plain_search(seed: int, tokenizer) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abé世") for _ in range(40))
    stops = tuple("".join(rng.choice("abé世") for _ in range(rng.randrange(1, 5))) for _ in "12")
    tokens = tokenizer.encode(text)
    expected, stopped = text, False
    for end in range(len(text) + 1):
        hits = [text[:end].find(s) for s in stops if s in text[:end]]
        if hits:
            expected, stopped = text[: min(hits)], True
            break
    stream = TextStream(tokenizer, tokenizer.encode("before "), stops)
    found = pieces(stream, tokens)
    assert "".join(found) == stream.text == expected
    assert stream.stopped == stopped


def test_pieces_of_a_byte_level_bpe_are_the_text() -> None:
    tokenizer = PretrainedTokenizer(Path(__file__).parents[1] / "fixtures" / "tokenizer")
    prompt, *tokens = tokenizer.encode(TEXT)
    assert "".join(pieces(TextStream(tokenizer, [prompt]), tokens)) == TEXT
