"""What a caller asks of the engine, and what comes back."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

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
# Each new piece of text is searched for all of them.
STOP_LIMIT = 16
STOP_LENGTH_LIMIT = 256  # characters
# Logits times or over it, and then over or times another, are still far from the ends of float32.
FACTOR_LIMIT = 1e6
MIN_TEMPERATURE = 1 / FACTOR_LIMIT
MIN_PROBABILITY = 2.0**-126  # anything less is 0 in float32
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
        if not isinstance(self.text, str):
            raise ValueError(f"A {self.kind} must be a text, got a {_type(self.text)}.")

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> "Structure":
        """JSON that a schema, given as a mapping or as text, describes.

        Raises:
          ValueError: the mapping holds what is no JSON.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
        except (TypeError, RecursionError) as error:
            raise ValueError(f"The JSON schema cannot be written as JSON: {error}.") from None
        return cls("json_schema", text)

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
      temperature: logits are divided by it before sampling, in [1e-6, 1e6]; 0 takes the most
        likely token.
      top_k: sample among this many most likely tokens; None for all.
      top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
      min_p: sample among tokens at least this times as likely as the likeliest.
      repetition_penalty: divides positive and multiplies negative logits of tokens that prompt or
        response hold, in [1e-6, 1e6]; 1 for none.
      presence_penalty: taken off the logits of tokens that the response holds, in [-2, 2].
      frequency_penalty: the same, for each time that the response holds the token.
      logit_bias: added to the logits of these tokens (at most 64), each in [-100, 100].
      seed: the same seed gives the same response, whatever else is served (but for ties to the last
        bits, unless the engine's `Buckets` have one size each); None draws one.
      min_tokens: tokens to generate before one may end the response.
      max_tokens: most tokens to generate.
      stop: texts (at most 16, of 256 characters each) that end the response; none of them appears
        in it.
      stop_tokens: tokens (at most 16) that end the response, as the model's own end-of-text do.
      ignore_eos: go on after the model's end-of-text token.
      n: responses to generate; the k-th, from 0, draws as a request with the seed `seed + k`.
      logprobs: give each token's log probability under the model, before anything above touches
        it, and those of so many (at most 20) likeliest tokens; None gives none.
      structured: what the response must look like; it ends where that is complete.

    Raises:
      ValueError: a value of another type or out of its range, or two that contradict each other.
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
        _check_number("temperature", self.temperature, MIN_TEMPERATURE, FACTOR_LIMIT, zero=True)
        _check_number("top_p", self.top_p, MIN_PROBABILITY, 1)
        _check_number("min_p", self.min_p, MIN_PROBABILITY, 1, zero=True)
        _check_number("repetition_penalty", self.repetition_penalty, 1 / FACTOR_LIMIT, FACTOR_LIMIT)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), -2, 2)
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
        self._check_stops()
        self._check_biases()
        if not isinstance(self.structured, Structure | None):
            raise ValueError(
                "structured must be made by Structure.json_schema, .regex, .grammar or .tool_call, "
                f"got a {_type(self.structured)}."
            )
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

    def _check_stops(self) -> None:
        """Check what ends a response, and make tuples of it."""
        for name, kind in (("stop", "texts"), ("stop_tokens", "tokens")):
            value = getattr(self, name)
            if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
                raise ValueError(f"{name} must be a tuple of {kind}, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= STOP_LENGTH_LIMIT:
                raise ValueError(
                    f"Each text of stop must have 1 to {STOP_LENGTH_LIMIT} characters, got "
                    f"{text!r:.40}."
                )
        if len(self.stop) > STOP_LIMIT:
            raise ValueError(f"stop takes at most {STOP_LIMIT} texts, got {len(self.stop)}.")
        _check_tokens("stop_tokens", self.stop_tokens, STOP_TOKENS_LIMIT)

    def _check_biases(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias must be a mapping of tokens to numbers, got {self.logit_bias!r}."
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        _check_tokens("logit_bias", self.logit_bias, LOGIT_BIAS_LIMIT)
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias of token {token}", bias, -BIAS_LIMIT, BIAS_LIMIT)


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
      continuation: a response that is given, as text or token ids, to be scored: nothing is
        generated, and the output's `logprobs` are those of its tokens. Of `sampling` it takes
        `logprobs`, which must be set, and nothing else.

    Raises:
      ValueError: a value of another type, a priority or deadline that cannot be, or a continuation
        without logprobs. What prompt and continuation hold is checked by the engine, which knows
        the model.
    """

    model: str
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    id: str | None = None
    priority: int = 0
    deadline_s: float | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    continuation: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not isinstance(self.id, str | None):
            raise ValueError(f"model and id must be texts, got {self.model!r} and {self.id!r}.")
        if not isinstance(self.prompt, Collection) or isinstance(
            self.prompt, bytes | Mapping | Set
        ):
            raise ValueError(
                "prompt must be a text, a list of tokens or a list of chat messages, got a "
                f"{_type(self.prompt)}."
            )
        if not isinstance(self.sampling, SamplingParams):
            raise ValueError(f"sampling must be SamplingParams, got a {_type(self.sampling)}.")
        _check_whole("priority", self.priority, -INT_LIMIT, INT_LIMIT)
        if self.deadline_s is not None:
            _check_number("deadline_s", self.deadline_s)
            if not 0 < self.deadline_s < math.inf:
                raise ValueError(f"deadline_s must be above 0 seconds, got {self.deadline_s}.")
        if not isinstance(self.tools, Sequence) or not all(
            isinstance(tool, Mapping) for tool in self.tools
        ):
            raise ValueError(f"tools must be a list of mappings, got {self.tools!r:.80}.")
        if self.continuation is not None:
            self._check_continuation()

    def _check_continuation(self) -> None:
        if not isinstance(self.continuation, Sequence) or isinstance(self.continuation, bytes):
            raise ValueError(
                f"continuation must be a text or a list of tokens, got {self.continuation!r:.80}."
            )
        if self.sampling.logprobs is None or self.sampling.n > 1 or self.sampling.structured:
            raise ValueError(
                "A continuation is scored and not generated: it needs logprobs of 0 or more, and "
                "takes neither n > 1 nor a structure."
            )


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
        return _between(self.submitted, self.first_token)

    @property
    def latency(self) -> float | None:
        """Seconds from submission to the end."""
        return _between(self.submitted, self.finished)


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
      text: the whole response, without stop texts and special tokens; empty for a continuation.
      tokens: every token that was generated, an ending end-of-text token included; or those of the
        continuation.
      finish_reason: "stop" at an end-of-text token, a stop token, a stop text or the end of its
        structure; "length" at max_tokens, the end of the context or that of a continuation;
        "error", "cancelled" and "deadline" as they say.
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


def _check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    zero: bool = False,
) -> None:
    """Refuse what is no number in [low, high], nor 0 if `zero` allows that."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if not (low <= value <= high or (zero and value == 0)):
        also = "be 0 or " if zero else ""
        raise ValueError(f"{name} must {also}lie in [{low:g}, {high:g}], got {value}.")


def _check_tokens(name: str, tokens: Collection[object], limit: int) -> None:
    if len(tokens) > limit:
        raise ValueError(f"{name} takes at most {limit} tokens, got {len(tokens)}.")
    for token in tokens:
        _check_whole(f"a token of {name}", token, 0, INT_LIMIT)


def _between(start: float, end: float | None) -> float | None:
    """Seconds; none pass while a clock is set back."""
    return None if end is None else max(end - start, 0.0)


def _type(value: object) -> str:
    return type(value).__name__
