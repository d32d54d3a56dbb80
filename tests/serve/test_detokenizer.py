"""Text comes in whole characters, and ends before a stop text, wherever tokens are cut."""

import random
from pathlib import Path

import pytest

from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.serve.detokenizer import ByteDecoder, TextStream
from tests.serve.conftest import ByteTokenizer

TEXT = "Grüße, 世界! 👩‍🚀 ends here. tail"


@pytest.fixture(params=["windows", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> ByteTokenizer:
    """One that has to decode several tokens together, or one whose tokens are known as bytes."""
    tokenizer = ByteTokenizer()
    if request.param == "bytes":
        tokenizer.token_bytes = {b: bytes([b]) for b in range(1, 256)}
    return tokenizer


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


@pytest.mark.parametrize("seed", range(40))
def test_streams_equal_the_plain_search(seed: int, tokenizer) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abé世") for _ in range(40))
    stops = tuple("".join(rng.choice("abé世") for _ in range(rng.randrange(1, 5))) for _ in "12")
    min_tokens = rng.choice((0, 0, 10, 30))
    tokens = tokenizer.encode(text)
    expected, stopped, seen = text, False, 0
    for count in range(1, len(tokens) + 1):
        so_far = bytes(tokens[:count]).decode(errors="ignore")
        # a stop text counts where this token completes it
        starts = [i for s in stops for i in range(len(so_far)) if so_far.startswith(s, i)
                  and i + len(s) > seen]  # fmt: skip
        if starts and count > min_tokens:
            expected, stopped = text[: min(starts)], True
            break
        seen = len(so_far)
    stream = TextStream(tokenizer, tokenizer.encode("before "), stops, min_tokens)
    found = pieces(stream, tokens)
    assert "".join(found) == stream.text == expected
    assert stream.stopped == stopped


def test_a_stop_text_comes_early_as_text(tokenizer) -> None:
    stream = TextStream(tokenizer, [], ("END", "ENDING"), min_tokens=3)
    assert [stream.push(t) for t in b"END"] == ["", "", ""]  # "ENDING" may follow
    assert stream.push(ord("S")) == "ENDS"
    assert [stream.push(t) for t in b"END"] == ["", "", ""]
    assert stream.stopped
    assert stream.text == "ENDS"


def test_a_character_that_the_prompt_begins_is_the_texts() -> None:
    token_bytes = {b: bytes([b]) for b in range(1, 256)}
    *begun, last = "a世".encode()
    decoder = ByteDecoder(token_bytes, begun)
    assert decoder.push(last) + decoder.finish() == "世"


def test_a_token_costs_little_more_than_a_decoding(tokenizer, monkeypatch) -> None:
    decode, decodings = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: decodings.append(0) or decode(tokens))
    stream = TextStream(tokenizer, [])
    for token in b"x" * 100:
        stream.push(token)
    assert len(decodings) < 110


def test_pieces_of_a_byte_level_bpe_are_the_text() -> None:
    tokenizer = PretrainedTokenizer(Path(__file__).parents[1] / "fixtures" / "tokenizer")
    prompt, *tokens = tokenizer.encode(TEXT)
    assert "".join(pieces(TextStream(tokenizer, [prompt]), tokens)) == TEXT
