"""Text to token ids and back: what training and serving need, and that of a model directory."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
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

    @functools.cached_property
    def token_bytes(self) -> Mapping[int, bytes] | None:
        """What each token adds to the UTF-8 of a text, if that is all that `decode` looks at.

        So it is for byte-level BPE (GPT-2's; Llama 3, Qwen); None for other tokenizers, which drop
        spaces or treat the beginning of a text apart. Tokens that are not in it add nothing.
        """
        if not _decodes_plainly(self.pretrained):
            return None
        backend = self.pretrained.backend_tokenizer
        if type(backend.decoder).__name__ != "ByteLevel":
            return None
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        return {id: _bytes_of(token) for token, id in vocabulary.items() if id not in special}


# GPT-2 (Radford et al. 2019, section 2.2) writes bytes that are printable characters of Latin-1 as
# those, and the others, in order, as the characters from 256 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def _bytes_of(token: str) -> bytes:
    """Those that a token of a byte-level vocabulary stands for; one that is added is itself."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Text of tokens, special ones left out, and else as it is."""
    if _decodes_plainly(tokenizer):
        # What transformers would call; it takes twice as long again to get there, and a server
        # decodes at every token of every request.
        return functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return functools.partial(
        tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _decodes_plainly(tokenizer: Any) -> bool:
    """Whether transformers adds nothing to what the tokenizer beneath it decodes."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )


def _auto_tokenizer() -> Any:
    """transformers.AutoTokenizer: slow to import, and of no use to who brings tokens."""
    # Else the import advises on stderr to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer
