"""The tokens of a request, or what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcodec.models.tokenizer import ChatTokenizer, Tokenizer
from jaxcodec.serve.request import Request


class RequestTokens(NamedTuple):
    """What a request holds, as tokens.

    Attributes:
      prompt: at least one.
      given: of the continuation; none where the response is to be generated.
    """

    prompt: list[int]
    given: list[int]


def request_tokens(
    request: Request, tokenizer: Tokenizer | None, context: int, vocab_size: int
) -> RequestTokens:
    """Prompt and continuation as tokens.

    Args:
      tokenizer: None serves prompts of tokens alone.
      context: most tokens of a prompt, and of all but the last token of prompt and continuation.
      vocab_size: of the model.

    Raises:
      ValueError: a prompt or continuation that is empty, too long or holds what is no token; text
        or a chat that the tokenizer cannot take; a stop token or biased token that the model does
        not have.
    """
    sampling, given = request.sampling, request.continuation
    has_text = isinstance(request.prompt, str) or isinstance(given, str) or sampling.stop
    if tokenizer is None and has_text:
        raise ValueError("Text prompts and stop texts need an engine with a tokenizer.")
    try:
        prompt, given = _encode(request, tokenizer), _encode_continuation(given, tokenizer)
    except ValueError:
        raise
    except Exception as fault:  # of a tokenizer, which is not ours
        raise ValueError(
            f"The tokenizer does not take the prompt: {type(fault).__name__}: {fault}"
        ) from fault
    _check_lengths(len(prompt), None if given is None else len(given), context)
    named = (("Prompt", prompt), ("Stop", sampling.stop_tokens), ("Biased", sampling.logit_bias))
    for name, tokens in (*named, ("Continuation", given or ())):
        for token in tokens:
            whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not whole or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} tokens must be whole numbers in [0, {vocab_size}), the model's "
                    f"vocabulary, got {token!r}."
                )
    return RequestTokens([int(t) for t in prompt], [int(t) for t in given or ()])


def _check_lengths(prompt: int, given: int | None, context: int) -> None:
    if not prompt:
        raise ValueError("A prompt needs at least one token, got none.")
    if given == 0:
        raise ValueError("A continuation needs at least one token to be scored, got none.")
    if prompt > context or prompt + (given or 1) - 1 > context:
        also = f" and the continuation {given}" if given else ""
        raise ValueError(
            f"The prompt has {prompt} tokens{also}, the context holds {context}: shorten it, or "
            "give the engine more pages if the model's own context is longer."
        )


def _encode_continuation(
    given: str | Sequence[int] | None, tokenizer: Tokenizer | None
) -> list | None:
    if isinstance(given, str):
        assert tokenizer is not None
        return tokenizer.encode_completion(given)
    return None if given is None else list(given)


def _encode(request: Request, tokenizer: Tokenizer | None) -> list:
    prompt = request.prompt
    messages = [message for message in prompt if isinstance(message, Mapping)]
    if not messages or len(messages) < len(prompt):
        if request.tools:
            raise ValueError("Tools go with chat messages, for the tokenizer's template.")
        if isinstance(prompt, str):
            assert tokenizer is not None
            return tokenizer.encode(prompt)
        return list(prompt)
    if not isinstance(tokenizer, ChatTokenizer):
        raise ValueError("Chat messages need an engine whose tokenizer has a chat template.")
    return tokenizer.encode_chat(messages, request.tools)
