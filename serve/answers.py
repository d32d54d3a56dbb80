"""One response to a request, from its submission to its end: what the host knows of it."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxcodec.serve.detokenizer import TextStream
from jaxcodec.serve.plan import Sequence
from jaxcodec.serve.request import (
    FinishReason,
    Request,
    RequestOutput,
    TextDelta,
    Timings,
    TokenLogprobs,
)
from jaxcodec.serve.sampling import STOP_WIDTH, variant_of
from jaxcodec.serve.served_models import ServedModel
from jaxcodec.serve.structured import Progress


class TokenArrays(NamedTuple):
    """Log probabilities of the tokens of one row of a launch, see `Made`: [K, ...] each."""

    logprob: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Answer:
    """One of the n responses to a request.

    Attributes:
      request: what was asked.
      model: who answers.
      sequence: its tokens, and where they are.
      seed: of its random numbers.
      variant: of sampling, that it needs.
      progress: in its structure; None without one.
      stop_ids: tokens that end it.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        sequence: Sequence,
        seed: int,
        stream: TextStream | None,
        progress: Progress | None,
        eos_ids: tuple[int, ...],
        submitted: float,
    ):
        sampling = request.sampling
        self.request, self.model, self.sequence, self.seed = request, model, sequence, seed
        self.variant = variant_of([sampling])
        self.eos_ids = eos_ids
        self.progress = progress
        self.timings = Timings(submitted)
        self._stop_ids = frozenset(
            (*sampling.stop_tokens, *(() if sampling.ignore_eos else eos_ids))
        )
        if len(self._stop_ids) > STOP_WIDTH:
            raise ValueError(
                f"A response can end at {STOP_WIDTH} tokens at most, stop_tokens and the model's "
                f"own together, got {len(self._stop_ids)}."
            )
        self._stream = stream
        self._logprobs: list[TokenLogprobs] = []

    @property
    def given(self) -> bool:
        """Whether the response was given with the request, to be scored."""
        return self.request.continuation is not None

    @property
    def deadline(self) -> float:
        """When it ends, done or not, in seconds of the engine's clock; infinity for never."""
        limit = self.request.deadline_s
        return float("inf") if limit is None else self.timings.submitted + limit

    def started(self, now: float) -> None:
        """Note that it has been given a row."""
        if self.timings.started is None:
            self.timings = dataclasses.replace(self.timings, started=now)

    def take(
        self, token: int, place: int, arrays: TokenArrays | None, now: float
    ) -> tuple[TextDelta, FinishReason | None]:
        """What one more token means.

        Args:
          place: its place in the launch, for `arrays`.

        Returns:
          (the token with what text it makes certain, why the response ends with it if it does).
        """
        sequence = self.sequence
        if self.timings.first_token is None:
            self.timings = dataclasses.replace(self.timings, first_token=now)
        reason: FinishReason | None = None
        if self.progress is not None:
            self.progress.advance(token)
        if token in self._stop_ids or (self.progress is not None and self.progress.ended):
            reason = "stop"
        text = ""
        if self._stream is not None:
            text = "" if token in self._stop_ids else self._stream.push(token)
            if self._stream.stopped:
                reason = "stop"
        sequence.tokens.append(token)
        if reason is None and len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason is not None and self._stream is not None:
            text += self._stream.finish()
        logprobs = None if arrays is None else self._logprobs_of(arrays, place)
        id, index = sequence.id
        return TextDelta(id, token, text, index, logprobs), reason

    def score(self, arrays: TokenArrays | None) -> FinishReason | None:
        """Take in the log probabilities of the next tokens of a given response.

        Returns:
          "length" after the last of them.
        """
        assert arrays is not None, "requests with a continuation ask for logprobs"
        for place in range(len(arrays.logprob)):
            self._logprobs_of(arrays, place)
        given = len(self.sequence.tokens) - self.sequence.prompt_length
        return "length" if len(self._logprobs) == given else None

    def entered(self) -> None:
        """Forget the scores of a given response: whoever gets a row is scored from the first on."""
        if self.given:
            self._logprobs.clear()

    def rewind(self, count: int, stream: TextStream | None, progress: Progress | None) -> None:
        """Forget all but the first `count` tokens of the response.

        Args:
          stream, progress: new ones, which take those tokens in again.
        """
        sequence = self.sequence
        if self.given:
            return
        del sequence.tokens[sequence.prompt_length + count :]
        del self._logprobs[count:]
        self._stream, self.progress = stream, progress
        for token in sequence.tokens[sequence.prompt_length :]:
            if progress is not None:
                progress.advance(token)
            if stream is not None:
                stream.push(token)

    def output(self, reason: FinishReason, error: str | None, now: float) -> RequestOutput:
        """Its end."""
        sequence = self.sequence
        id, index = sequence.id
        return RequestOutput(
            id=id,
            model=self.model.name,
            text="" if self._stream is None else self._stream.text,
            tokens=tuple(sequence.tokens[sequence.prompt_length :]),
            finish_reason=reason,
            error=error,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.reused or 0,
            timings=dataclasses.replace(self.timings, finished=now),
            index=index,
            logprobs=None if self.request.sampling.logprobs is None else tuple(self._logprobs),
        )

    def _logprobs_of(self, arrays: TokenArrays, place: int) -> TokenLogprobs:
        count = self.request.sampling.logprobs
        ids, values = arrays.top_ids[place, :count], arrays.top_logprobs[place, :count]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        self._logprobs.append(TokenLogprobs(float(arrays.logprob[place]), top))
        return self._logprobs[-1]
