"""Responses that follow a structure: which tokens may come next, by llguidance.

Letters: B rows of a launch, V vocabulary, W words of 32 tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcodec.models.tokenizer import PretrainedTokenizer, Tokenizer
from jaxcodec.serve.request import Structure

# Agents send the same few tools again and again; a compiled one takes up to some megabytes.
COMPILED_LIMIT = 64
# Between the parts of JSON. Where any amount may come, weak models put in nothing else.
WHITESPACE = " ?"


class Progress:
    """How far one response has come in its structure.

    Attributes:
      ended: it is complete, and nothing may follow.
    """

    def __init__(self, matcher: Any):
        self.ended = False
        self._matcher = matcher

    def advance(self, token: int) -> None:
        """Take the response's next token, an end-of-text token included.

        Raises:
          ValueError: the structure has become too complex to follow, or the token may not come.
        """
        if not self._matcher.consume_token(token):
            error = _first(self._matcher.get_error())
            raise ValueError(f"The structure cannot be followed: {error}.")
        self.ended = self._matcher.is_stopped()


class Grammars:
    """What the responses of an engine may be made to follow.

    Args:
      tokenizer: one of transformers' fast ones; others are refused once a structure is asked for.
      vocab_size: of the model, which may exceed the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # Methods of an instance, so that what they keep goes with it.
        self._compiled = functools.lru_cache(COMPILED_LIMIT)(self._compile)
        self._ll_tokenizer = functools.cache(self._make_ll_tokenizer)

    @property
    def possible(self) -> bool:
        """Whether `start` could ever succeed: there is a tokenizer."""
        return self._tokenizer is not None

    def start(self, structure: Structure, eos_ids: Sequence[int]) -> Progress:
        """The progress of a response that has no token yet.

        Args:
          eos_ids: tokens that may end it.

        Raises:
          ValueError: llguidance is not installed or cannot use the tokenizer, or the structure is
            none: a schema that is no JSON or uses keywords that are not supported, say.
        """
        return Progress(self._compiled(structure, tuple(sorted(set(eos_ids)))).deep_copy())

    def masks(self, rows: Sequence[Progress | None], batch_size: int) -> np.ndarray:
        """Tokens that may come next: uint32 [B, W], see `SamplingBatch.masks`; a new array.

        Args:
          rows: one for each row from the first on; None, and rows beyond, are free.
          batch_size: B.
        """
        import llguidance.numpy

        masks = llguidance.numpy.allocate_token_bitmask(batch_size, self._vocab_size)
        matchers = [(p._matcher, row) for row, p in enumerate(rows) if p is not None]
        llguidance.numpy.fill_next_token_bitmask_par(self._executor, matchers, masks)
        return masks.view(np.uint32)

    @functools.cached_property
    def _executor(self) -> Any:
        return _llguidance().LLExecutor()

    def _compile(self, structure: Structure, eos_ids: tuple[int, ...]) -> Any:
        LLMatcher = _llguidance().LLMatcher
        tokenizer = self._ll_tokenizer(eos_ids)
        try:
            matcher = LLMatcher(tokenizer, _grammar(structure), log_level=0)
            error = matcher.get_error()
        except ValueError as not_json:
            matcher, error = None, str(not_json)
        if error:
            kind = structure.kind.replace("_", " ")
            raise ValueError(f"The {kind} cannot be followed: {_first(error)}.")
        return matcher

    def _make_ll_tokenizer(self, eos_ids: tuple[int, ...]) -> Any:
        _llguidance()
        import llguidance.hf

        if not isinstance(self._tokenizer, PretrainedTokenizer):
            raise ValueError("Structured responses need an engine with a PretrainedTokenizer.")
        pretrained = self._tokenizer.pretrained
        # Padded models may name an end-of-text token that no text has; llguidance refuses those.
        known = [token for token in eos_ids if token < len(pretrained)]
        return llguidance.hf.from_tokenizer(pretrained, n_vocab=self._vocab_size, eos_token=known)


def _grammar(structure: Structure) -> str:
    """In llguidance's own form."""
    LLMatcher = _llguidance().LLMatcher
    if structure.kind == "regex":
        return LLMatcher.grammar_from_regex(structure.text)
    if structure.kind == "grammar":
        return LLMatcher.grammar_from_lark(structure.text)
    overrides = {"whitespace_pattern": WHITESPACE}
    return LLMatcher.grammar_from_json_schema(structure.text, overrides=overrides)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "Structured responses need llguidance: pip install 'jaxcodec[structured]'."
        ) from None
    return llguidance


def _first(error: str) -> str:
    """What llguidance says is wrong, without the state of its parser that it adds."""
    return " ".join(error.partition("<state>")[0].split())
