"""The tokens of a request's prompt, or what is wrong with them."""

from collections.abc import Mapping

import numpy as np

from jaxcodec.models.tokenizer import ChatTokenizer, Tokenizer
from jaxcodec.serve.request import Request


def prompt_tokens(
    request: Request, tokenizer: Tokenizer | None, context: int, vocab_size: int
) -> list[int]:
    """The prompt as tokens.

    Args:
      tokenizer: None serves prompts of tokens alone.
      context: most tokens of a prompt.
      vocab_size: of the model.

    Raises:
      ValueError: a prompt that is empty, too long or holds what is no token; text or a chat that
        the tokenizer cannot take; a stop token or biased token that the model does not have.
    """
    sampling = request.sampling
    if tokenizer is None and (isinstance(request.prompt, str) or sampling.stop):
        raise ValueError("Text prompts and stop texts need an engine with a tokenizer.")
    try:
        prompt = _encode(request, tokenizer)
    except ValueError:
        raise
    except Exception as fault:  # of a tokenizer, which is not ours
        raise ValueError(
            f"The tokenizer does not take the prompt: {type(fault).__name__}: {fault}"
        ) from fault
    if not prompt:
        raise ValueError("A prompt needs at least one token, got none.")
    if len(prompt) > context:
        raise ValueError(
            f"The prompt has {len(prompt)} tokens, the context holds {context}: shorten it, or "
            "give the engine more pages if the model's own context is longer."
        )
    named = (("Prompt", prompt), ("Stop", sampling.stop_tokens), ("Biased", sampling.logit_bias))
    for name, tokens in named:
        for token in tokens:
            whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not whole or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} tokens must be whole numbers in [0, {vocab_size}), the model's "
                    f"vocabulary, got {token!r}."
                )
    return [int(token) for token in prompt]


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
