"""What a caller asks of the engine, and what comes back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal["stop", "length", "error", "cancelled"]

SEED_LIMIT = 2**32  # seeds travel to the device as uint32
TOP_K_LIMIT = 2**31 - 1  # and top_k as int32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when a response ends.

    Attributes:
      temperature: logits are divided by it before sampling; 0 takes the most likely token.
      top_k: sample among this many most likely tokens; None for all.
      top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
      seed: the same seed gives the same response, whatever else is served; None draws one.
      max_tokens: most tokens to generate.
      stop: texts that end the response; none of them appears in it.
      ignore_eos: go on after the model's end-of-text token.

    Raises:
      ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        _check_whole("top_k", self.top_k, 1, TOP_K_LIMIT)
        _check_whole("seed", self.seed, 0, SEED_LIMIT - 1)
        _check_whole("max_tokens", self.max_tokens, 1, TOP_K_LIMIT)
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of texts, none empty, got {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for one model.

    Attributes:
      model: name under which the engine serves the model.
      prompt: text, or token ids.
      sampling: see `SamplingParams`.
      id: the caller's name for it; None lets the engine number it.
    """

    model: str
    prompt: str | Sequence[int]
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Timings:
    """When things happened to a request, in seconds of `time.perf_counter`; None: never.

    Attributes:
      submitted: it entered the queue.
      started: it was first given pages and a row.
      first_token: its first token was known.
      finished: its last.
    """

    submitted: float
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from submission."""
        return None if self.first_token is None else self.first_token - self.submitted

    @property
    def latency(self) -> float | None:
        """Seconds from submission to the end."""
        return None if self.finished is None else self.finished - self.submitted


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """A token of a request that goes on.

    Attributes:
      id: the request's.
      token: its id in the vocabulary.
      text: text that has become certain with it; empty while it may be part of a character or of
        a stop text.
    """

    id: str
    token: int
    text: str


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request's end.

    Attributes:
      id: the request's.
      model: the name of the model that answered.
      text: the whole response, without stop texts and special tokens.
      tokens: every token that was generated, an ending end-of-text token included.
      finish_reason: "stop" at an end-of-text token or a stop text; "length" at max_tokens or the
        end of the context; "error" and "cancelled" as they say.
      error: a sentence, for "error".
      prompt_tokens: tokens of the prompt.
      cached_tokens: how many of those were found in the prefix tree when it first started.
      timings: see `Timings`.
    """

    id: str
    model: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    timings: Timings | None = None


Event = TextDelta | RequestOutput


def _check_whole(name: str, value: int | None, low: int, high: int) -> None:
    if value is None and name != "max_tokens":
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in [{low}, {high}], got {value!r}.")
