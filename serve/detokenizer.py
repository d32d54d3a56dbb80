"""Text from tokens as they come: whole characters only, and nothing of a stop text."""

from collections.abc import Sequence

from jaxcodec.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
# UTF-8 characters have at most four bytes; tokens that still make none with the fourth never will.
MAX_PARTS = 4
# Tokens decoded before the first new one, so that decoders which treat the beginning of a text
# apart (dropping its leading space) do not take the response for one.
CONTEXT = 5


class TextStream:
    """The text of one response.

    Attributes:
      text: what has been released so far.
      stopped: a stop text has come; what follows it is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt[-CONTEXT:])  # tokens decoded together
        self._read = len(self._window)  # of them, tokens whose text is out
        self._held = ""  # decoded, but it may be the start of a stop text

    def push(self, token: int) -> str:
        """The text that has become certain with one more token; often empty."""
        self._window.append(token)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return self._release(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._read])
        after = self._tokenizer.decode(self._window)
        parts = len(self._window) - self._read
        if after.endswith(REPLACEMENT) and parts < MAX_PARTS and not final:
            return ""
        # The next window starts with the tokens just read.
        self._window = self._window[max(self._read - CONTEXT, 0) :]
        self._read = len(self._window)
        return after[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
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
