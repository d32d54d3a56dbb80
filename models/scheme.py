"""Who writes which part of the KV cache: all that separates three ways to specialise a model."""

import dataclasses
from typing import Literal

Writer = Literal["base", "self"]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Who writes the keys and values of prompt and response.

    Attributes:
      prompt_writer: "base", the frozen model that all share, or "self", the specialised one.
      response_writer: the same for the tokens that the model generates.

    Raises:
      ValueError: a writer that is neither; or a response written by the base after a prompt that
        is not, which no cache could share.
    """

    prompt_writer: Writer
    response_writer: Writer

    def __post_init__(self) -> None:
        for writer in (self.prompt_writer, self.response_writer):
            if writer not in ("base", "self"):
                raise ValueError(f"A writer is 'base' or 'self', got {writer!r}.")
        if (self.prompt_writer, self.response_writer) == ("self", "base"):
            raise ValueError("The base cannot write a response after a prompt that 'self' wrote.")

    @property
    def streams(self) -> int:
        """Rows of hidden states per token in a decode step: 2 where the base writes responses."""
        return 2 if self.response_writer == "base" else 1


CONVENTIONAL = Scheme("self", "self")
"""An ordinary model: nothing is shared."""

PREFILL_SHARE = Scheme("base", "self")
"""Prompts are written by the frozen base (PrefillShare, arXiv 2602.12029)."""

ICARUS = Scheme("base", "base")
"""Everything is written by the frozen base (ICaRus, arXiv 2603.13281)."""
