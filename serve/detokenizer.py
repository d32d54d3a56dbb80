"""Text from tokens as they come: whole characters only, and nothing of a stop text."""

import codecs
from collections.abc import Mapping, Sequence

from jaxcodec.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
# UTF-8 characters have at most four bytes; tokens that still make none with the fourth never will.
MAX_PARTS = 4
# Tokens decoded before the first new one, so that decoders which treat the beginning of a text
# apart (dropping its leading space) do not take the response for one.
CONTEXT = 5
# Read tokens that a window may hold before it is cut to the last of them: cutting costs a decoding.
MAX_READ = 4 * CONTEXT


class ByteDecoder:
    """Text of tokens that are bytes: what a token adds is known without the others.

    Args:
      token_bytes: see `PretrainedTokenizer.token_bytes`.
      prompt: tokens before the first; a character that they begin is the text's.
    """

    def __init__(self, token_bytes: Mapping[int, bytes], prompt: Sequence[int]):
        self._bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        for token in prompt[-MAX_PARTS:]:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that has become certain with one more token."""
        return self._decode(self._bytes.get(token, b""))

    def finish(self) -> str:
        """What is left, now that nothing follows."""
        return self._decode(b"", True)


class WindowDecoder:
    """Text of any tokenizer's tokens: the last few are decoded together.

    Args:
      prompt: tokens before the first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT:])  # tokens decoded together
        self._read = len(self._window)  # of them, tokens whose text is out
        self._before = tokenizer.decode(self._window)  # text of those that are read

    def push(self, token: int) -> str:
        """The text that has become certain with one more token."""
        self._window.append(token)
        return self._decoded(final=False)

    def finish(self) -> str:
        """What is left, now that nothing follows."""
        return self._decoded(final=True)

    def _decoded(self, final: bool) -> str:
        after = self._tokenizer.decode(self._window)
        parts = len(self._window) - self._read
        if after.endswith(REPLACEMENT) and parts < MAX_PARTS and not final:
            return ""
        new = after[len(self._before) :]
        if len(self._window) > MAX_READ:
            self._window = self._window[-CONTEXT:]
            after = self._tokenizer.decode(self._window)
        self._read, self._before = len(self._window), after
        return new


class TextStream:
    """The text of one response.

    Args:
      prompt: tokens before it.
      stop: texts that end it.
      min_tokens: a stop text that one of so many first tokens completes is text like any other.

    Attributes:
      text: what has been released so far.
      stopped: a stop text has come; what follows it is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ):
        self.text = ""
        self.stopped = False
        token_bytes = getattr(tokenizer, "token_bytes", None)
        self._decoder = (
            WindowDecoder(tokenizer, prompt)
            if token_bytes is None
            else ByteDecoder(token_bytes, prompt)
        )
        self._stop = tuple(stop)
        self._held = ""  # decoded, but it may be the start of a stop text
        self._unstoppable = min_tokens  # tokens still to come that complete no stop text

    def push(self, token: int) -> str:
        """The text that has become certain with one more token; often empty."""
        released = self._release(self._decoder.push(token), final=False)
        self._unstoppable -= 1
        return released

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return self._release(self._decoder.finish(), final=True)

    def _release(self, new: str, final: bool) -> str:
        if not self._stop:  # nothing is ever held
            self.text += new
            return new
        if self.stopped:
            return ""
        seen = len(self._held)
        self._held += new
        # A stop text that ended earlier would have been found then, or was not to count.
        starts = (self._held.find(s, max(seen - len(s) + 1, 0)) for s in self._stop)
        found = [start for start in starts if start >= 0 and self._unstoppable <= 0]
        if found:
            self.stopped = True
            certain = min(found)
        else:
            certain = len(self._held) - (0 if final else self._doubtful())
        released, self._held = self._held[:certain], self._held[certain:]
        self.text += released
        return released

    def _doubtful(self) -> int:
        """Characters at the end that may begin a stop text."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
