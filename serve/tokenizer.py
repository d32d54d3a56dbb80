"""What the engine needs of a tokenizer, and that of a Hugging Face directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with what the model expects at its beginning."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        ...


class HFTokenizer:
    """The tokenizer of a model directory, read by transformers."""

    def __init__(self, directory: str | Path):
        """Read it.

        Raises:
          ValueError: there is none, it is damaged, or it names no end-of-text token.
        """
        import transformers  # slow to import, and of no use to who brings tokens

        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory} holds no tokenizer that can be read: {error}") from error
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                f"The tokenizer in {directory} names no end-of-text token, without which no "
                "response would end: set eos_token in tokenizer_config.json."
            )
        self._tokenizer = tokenizer
        self._eos_ids = (eos,)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-text token."""
        return self._eos_ids

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with a beginning-of-text token where the model has one."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
