"""What a caller asks of the engine, and what comes back."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

StructureKind = Literal["json_schema", "regex", "grammar"]
FinishReason = Literal["stop", "length", "error", "cancelled", "deadline"]

SEED_LIMIT = 2**32  # seeds travel to the device as uint32
INT_LIMIT = 2**31 - 1  # and all other whole numbers as int32
# What a running request takes on the device has a fixed width, so these are bounded. They are as
# wide as the OpenAI API's (20 logprobs, 128 choices) or several times what is seen in use.
LOGPROBS_LIMIT = 20
CHOICES_LIMIT = 128
LOGIT_BIAS_LIMIT = 64
STOP_TOKENS_LIMIT = 16
# Logits over it are still far from the end of float32.
MIN_TEMPERATURE = 1e-6
# Beyond this a bias decides alone, as in the OpenAI API.
BIAS_LIMIT = 100.0


class QueueFull(RuntimeError):
    """The engine's queue has no room for another request: step it, and try again."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a response must look like; made by one of the methods below.

    Attributes:
      kind: of `text`.
      text: a JSON schema, a regular expression, or a grammar in Lark's syntax.
    """

    kind: StructureKind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructureKind):
            raise ValueError(f"A structure is one of {get_args(StructureKind)}, got {self.kind!r}.")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> "Structure":
        """JSON that a schema, given as a mapping or as text, describes."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> "Structure":
        """Text that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, lark: str) -> "Structure":
        """Text of a context-free grammar, in llguidance's variant of Lark; its start is `start`."""
        return cls("grammar", lark)

    @classmethod
    def tool_call(cls, tools: Sequence[Mapping[str, Any]]) -> "Structure":
        """`{"name": ..., "arguments": {...}}`: a call of one of the tools.

        Args:
          tools: descriptions as chat templates take them, `{"type": "function", "function":
            {"name", "parameters": JSON schema}}`, or the inner mapping alone.

        Raises:
          ValueError: there is no tool, or one without a name.
        """
        calls = []
        for tool in tools:
            function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
            if not isinstance(function, Mapping) or "name" not in function:
                raise ValueError(f"A tool must be a mapping with a 'name', got {tool!r}.")
            properties = {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters", {"type": "object"}),
            }
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                }
            )
        if not calls:
            raise ValueError("A tool call needs at least one tool, got none.")
        return cls.json_schema({"anyOf": calls})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when a response ends.

    The logits of a row take, in this order: logit_bias; repetition, then frequency and presence
    penalty; min_tokens and `structured`, which forbid tokens; and unless temperature is 0, which
    takes the best that is left: temperature, top_k, top_p, min_p.

    Attributes:
      temperature: logits are divided by it before sampling (from 1e-6 on); 0 takes the most likely
        token.
      top_k: sample among this many most likely tokens; None for all.
      top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
      min_p: sample among tokens at least this times as likely as the likeliest.
      repetition_penalty: divides positive and multiplies negative logits of tokens that prompt or
        response hold; 1 for none.
      presence_penalty: taken off the logits of tokens that the response holds, in [-2, 2].
      frequency_penalty: the same, for each time that the response holds the token.
      logit_bias: added to the logits of these tokens (at most 64), each in [-100, 100].
      seed: the same seed gives the same response, whatever else is served; None draws one.
      min_tokens: tokens to generate before one may end the response.
      max_tokens: most tokens to generate.
      stop: texts that end the response; none of them appears in it.
      stop_tokens: tokens (at most 16) that end the response, as the model's own end-of-text do.
      ignore_eos: go on after the model's end-of-text token.
      n: responses to generate; the k-th, from 0, draws as a request with the seed `seed + k`.
      logprobs: give each token's log probability under the model, before anything above touches
        it, and those of so many (at most 20) likeliest tokens; None gives none.
      structured: what the response must look like; it ends where that is complete.

    Raises:
      ValueError: a value out of its range, or two that contradict each other.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # A mapping has no hash; params that differ in it alone are unequal all the same.
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    structured: Structure | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (greedy), or {MIN_TEMPERATURE:g} or more, got "
                f"{self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must lie in [-2, 2], got {getattr(self, name)}.")
        if self.top_k is not None:
            _check_whole("top_k", self.top_k, 1, INT_LIMIT)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, SEED_LIMIT - 1)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0, LOGPROBS_LIMIT)
        _check_whole("n", self.n, 1, CHOICES_LIMIT)
        _check_whole("max_tokens", self.max_tokens, 1, INT_LIMIT)
        _check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {self.ignore_eos!r}.")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of texts, none empty, got {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_tokens()
        if self.structured is not None and (self.min_tokens or self.ignore_eos):
            raise ValueError(
                "A structured response ends where its structure does: it takes neither min_tokens "
                "nor ignore_eos."
            )

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is the next token, and nothing else is asked for."""
        return not (
            self.temperature
            or self.has_state
            or self.logprobs is not None
            or self.structured is not None
        )

    @property
    def needs_host(self) -> bool:
        """Whether the host must see a token before the next can be chosen."""
        return self.structured is not None

    @property
    def has_state(self) -> bool:
        """Whether the device keeps something for it besides the numbers of `SamplingTable`."""
        return self.penalized or bool(self.logit_bias)

    @property
    def penalized(self) -> bool:
        """Whether it matters which tokens there were before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def _check_tokens(self) -> None:
        for name, limit in (("stop_tokens", STOP_TOKENS_LIMIT), ("logit_bias", LOGIT_BIAS_LIMIT)):
            tokens = getattr(self, name)
            if len(tokens) > limit:
                raise ValueError(f"{name} takes at most {limit} tokens, got {len(tokens)}.")
            for token in tokens:
                _check_whole(f"a token of {name}", token, 0, INT_LIMIT)
        for token, bias in self.logit_bias.items():
            if not -BIAS_LIMIT <= bias <= BIAS_LIMIT:
                raise ValueError(
                    f"logit_bias must lie in [-{BIAS_LIMIT:g}, {BIAS_LIMIT:g}], got {bias} for "
                    f"token {token}."
                )


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for one model.

    Attributes:
      model: name under which the engine serves the model.
      prompt: text; token ids; or the messages of a chat, `{"role", "content"}` each, for the
        template of the tokenizer.
      sampling: see `SamplingParams`.
      id: the caller's name for it; None lets the engine number it.
      priority: lower ones start first; equal ones in order of submission.
      deadline_s: seconds from submission after which the request ends as it is; None for never.
      tools: descriptions of tools, as chat templates take them.

    Raises:
      ValueError: a priority or deadline that cannot be.
    """

    model: str
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    id: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        _check_whole("priority", self.priority, -INT_LIMIT, INT_LIMIT)
        if self.deadline_s is not None and not 0 < self.deadline_s < math.inf:
            raise ValueError(f"deadline_s must be above 0 seconds, got {self.deadline_s}.")


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


class TokenLogprobs(NamedTuple):
    """Log probabilities at one token of a response, natural logarithms.

    Attributes:
      logprob: of the token.
      top: (token, log probability) of the likeliest, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """A token of a request that goes on.

    Attributes:
      id: the request's.
      token: its id in the vocabulary.
      text: text that has become certain with it; empty while it may be part of a character or of
        a stop text.
      index: which of the request's `n` responses.
      logprobs: if asked for.
    """

    id: str
    token: int
    text: str
    index: int = 0
    logprobs: TokenLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """The end of one response to a request; a request with n > 1 has n of them.

    Attributes:
      id: the request's.
      model: the name of the model that answered.
      text: the whole response, without stop texts and special tokens.
      tokens: every token that was generated, an ending end-of-text token included.
      finish_reason: "stop" at an end-of-text token, a stop token, a stop text or the end of its
        structure; "length" at max_tokens or the end of the context; "error", "cancelled" and
        "deadline" as they say.
      error: a sentence, for "error".
      prompt_tokens: tokens of the prompt.
      cached_tokens: how many of those were found in the prefix tree when it first started.
      timings: see `Timings`.
      index: which of the request's `n` responses.
      logprobs: of each token, if asked for.
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
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None


Event = TextDelta | RequestOutput


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in [{low}, {high}], got {value!r}.")
