"""Prompts become tokens, or sentences that say what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.serve.prompts import request_tokens
from jaxcodec.serve.request import Request, SamplingParams

V, CONTEXT = 256, 20
MESSAGES = [{"role": "user", "content": "hi"}]


class Chat:
    """Bytes, with a template of sorts."""

    eos_id, eos_ids = 0, (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_completion = encode

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        return self.encode(
            f"{len(tools)}" + "".join(f"<{m['role']}>{m['content']}" for m in messages)
        )


def tokens(request: Request, tokenizer: Tokenizer | None = Chat()) -> list[int]:  # noqa: B008
    return request_tokens(request, tokenizer, CONTEXT, V).prompt


def test_prompts_are_texts_tokens_or_chats() -> None:
    assert tokens(Request("base", "abc")) == [97, 98, 99]
    assert tokens(Request("base", [5, np.int64(6)]), None) == [5, 6]
    assert tokens(Request("base", MESSAGES)) == list(b"0<user>hi")
    assert tokens(Request("base", MESSAGES, tools=[{"name": "weather"}])) == list(b"1<user>hi")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("base", ""), "at least one token"),
        (Request("base", []), "at least one token"),
        (Request("base", "x" * 21), "has 21 tokens, the context holds 20"),
        (Request("base", [3, 256]), r"Prompt tokens must be whole numbers in \[0, 256\).*got 256"),
        (Request("base", [-1]), "got -1"),
        (Request("base", [*MESSAGES, 3]), "got {'role'"),
        (Request("base", "a", tools=[{"name": "weather"}]), "needs? chat messages|go with chat"),
        (Request("base", [1], SamplingParams(stop_tokens=(256,))), "Stop tokens"),
        (Request("base", [1], SamplingParams(logit_bias={300: 1.0})), "Biased tokens.*got 300"),
    ],
)
def test_what_is_wrong_is_said(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("base", "abc"), "Text prompts and stop texts need"),
        (Request("base", [1], SamplingParams(stop=("a",))), "Text prompts and stop texts need"),
        (Request("base", MESSAGES), "Chat messages need"),
    ],
)
def test_texts_need_a_tokenizer(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(request_, None)


def test_chats_need_a_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="Chat messages need"):
        tokens(Request("base", MESSAGES), tokenizer)
