"""Text to token ids and back: what training and serving need, and that of a model directory."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def eos_id(self) -> int:
        """The token that training puts at the end of a text."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt or text, with what the model expects at its beginning."""
        ...

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of what follows a prompt: nothing is put before them."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        ...


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows how its model has seen conversations."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Tokens of a conversation, up to where the model's answer begins."""
        ...


class PretrainedTokenizer:
    """The tokenizer of a Hugging Face model directory, read by transformers.

    Attributes:
      pretrained: transformers' own tokenizer.
      eos_id: its end-of-text token.
      eos_ids: the same alone.
    """

    def __init__(self, directory: str | Path):
        """Read it; nothing is downloaded.

        Raises:
          ValueError: there is none, it is damaged, or it names no end-of-text token.
        """
        if not Path(directory).is_dir():
            raise ValueError(f"There is no directory {directory} to read a tokenizer from.")
        try:
            # A tokenizer is data here: code that a directory brings along is never run.
            tokenizer = _auto_tokenizer().from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        # transformers and tokenizers answer a damaged file with whatever they ran into.
        except Exception as error:
            raise ValueError(f"{directory} holds no tokenizer that can be read: {error}") from error
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer in {directory} names no end-of-text token, without which no text "
                "would end: set eos_token in tokenizer_config.json."
            )
        self.pretrained: Any = tokenizer
        self._decode = _decoder(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt or text, with a beginning-of-text token where the model has one.

        Raises:
          ValueError: the text holds a lone surrogate, which no encoding of Unicode has.
        """
        return self._encode(text, special=True)

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of what follows a prompt; raises as `encode`."""
        return self._encode(text, special=False)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Tokens of a conversation in the model's chat template, up to where its answer begins.

        Args:
          messages: `{"role": ..., "content": ...}` and what else the template reads.
          tools: descriptions of functions, `{"type": "function", "function": {...}}`.

        Raises:
          ValueError: the tokenizer has no template, or its template does not take the messages.
        """
        if not self.pretrained.chat_template:
            raise ValueError(
                "The tokenizer has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): give the prompt as text."
            )
        try:
            text = self.pretrained.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=False,
            )
        # A template is a program that the model brings along; it fails in its own ways.
        except Exception as error:
            raise ValueError(f"The chat template does not take these messages: {error}.") from error
        return self._encode(text, special=False)  # the template has put them in

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is not Unicode text: {error}.") from None
        # Not verbose: whoever feeds a model checks the length against the model's own context.
        return self.pretrained.encode(text, add_special_tokens=special, verbose=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._decode(list(tokens))


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Text of tokens, special ones left out, and else as it is."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    ):
        # What transformers would call; it takes twice as long again to get there, and a server
        # decodes at every token of every request.
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _auto_tokenizer() -> Any:
    """transformers.AutoTokenizer: slow to import, and of no use to who brings tokens."""
    # Else the import advises on stderr to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer
