"""Many specialised models of one base, served from one KV cache.

`Engine.step` is schedule, run, postprocess. This module alone touches the device: queues, pages
and prefixes are plain Python beneath it.

Letters: B rows, T tokens in a prefill, P pages a row, V vocabulary.
"""

import collections
import dataclasses
import functools
import secrets
import time
from collections.abc import Iterable

import jax
import numpy as np

from jaxcodec.models.cache import KVCache, PageTable, pages_for
from jaxcodec.models.lora import Adapter
from jaxcodec.models.scheme import Scheme
from jaxcodec.models.steps import decode_step, prefill
from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.buckets import Batch, Buckets, Row, pad
from jaxcodec.serve.detokenizer import TextStream
from jaxcodec.serve.request import (
    SEED_LIMIT,
    Event,
    FinishReason,
    Request,
    RequestOutput,
    TextDelta,
    Timings,
)
from jaxcodec.serve.sampling import SamplingBatch, sample
from jaxcodec.serve.scheduler import PageCounts, Prefill, Scheduler, Sequence
from jaxcodec.serve.served_models import Lane, ServedModel, ServedModels


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
      steps: calls of `Engine.step`.
      waiting: requests in the queue, now.
      running: requests with a row and pages, now.
      finished: requests that have ended, for whatever reason.
      prompt_tokens: tokens in the prompts of requests that have started.
      reused_tokens: of them, tokens that the prefix tree had.
      prefill_tokens: tokens that prefills have computed, those after preemptions included.
      decode_tokens: tokens that decode steps have computed, one for each token generated.
      preemptions: times that a request was pushed out for want of pages.
      pages: pages by state, see `PageCounts`.
    """

    steps: int
    waiting: int
    running: int
    finished: int
    prompt_tokens: int
    reused_tokens: int
    prefill_tokens: int
    decode_tokens: int
    preemptions: int
    pages: PageCounts


@dataclasses.dataclass(eq=False)
class _Active:
    """A request between submission and end."""

    request: Request
    model: ServedModel
    sequence: Sequence
    stream: TextStream | None
    seed: int
    timings: Timings


class Engine:
    """Continuous batching of requests for different models over one paged cache.

    Args:
      base: the model that all share.
      tokenizer: for prompts and responses as text; None to work on token ids alone.
      name: under which the base itself is served.
      page_size: tokens in a page of the cache.
      pages: pages in the cache.
      max_batch: most requests that run at once.
      max_prefill_tokens: most tokens prefilled in one step; a longer prompt takes several, while
        others decode.
      share_prefixes: False keeps the pages of each model to itself, for comparison.
      buckets: shapes to compile for; None for powers of two.
    """

    def __init__(
        self,
        base: Model,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "base",
        page_size: int = 16,
        pages: int = 1024,
        max_batch: int = 16,
        max_prefill_tokens: int = 512,
        share_prefixes: bool = True,
        buckets: Buckets | None = None,
    ):
        self.tokenizer = tokenizer
        self.context = min(base.config.max_positions, pages * page_size)
        sizes = max_batch, max_prefill_tokens, pages_for(self.context, page_size)
        self._buckets = buckets or Buckets.powers_of_two(*sizes)
        self._buckets.check_holds(*sizes)
        self._models = ServedModels(base, name, share_prefixes)
        self._vocab_size = base.config.vocab_size
        self._cache = KVCache.zeros(base.config, pages, page_size, base.dtype)
        self._scheduler = Scheduler(pages, page_size, self.context, max_batch, max_prefill_tokens)
        self._active: dict[str, _Active] = {}  # by id, in order of submission
        self._counts: collections.Counter[str] = collections.Counter()

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests can ask for."""
        return self._models.names

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._active)

    def add_model(
        self,
        name: str,
        scheme: Scheme,
        *,
        adapter: Adapter | None = None,
        model: Model | None = None,
    ) -> None:
        """Serve a specialised model: an adapter on the base, or weights of its own.

        Raises:
          ValueError: the name is taken; not exactly one of adapter and model; an icarus model that
            is not an adapter, or whose adapter writes the cache; a model of another architecture
            than the base's; an adapter that does not fit it.
        """
        self._models.add(name, scheme, adapter, model)

    def submit(self, request: Request) -> str:
        """Queue a request; returns its id.

        Raises:
          ValueError: an unknown model, an id in use, text without a tokenizer, or a prompt that is
            empty, holds an unknown token or exceeds the context (the model's, or what the whole
            cache holds). The engine goes on as if it had not been asked.
        """
        model = self._models.find(request.model)
        prompt = self._prompt_tokens(request)
        id = request.id
        if id is None:
            self._counts["numbered"] += 1
            id = f"request-{self._counts['numbered']}"
        if id in self._active:
            raise ValueError(f"A request with the id {id!r} is being served.")
        stream, seed = None, request.sampling.seed
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, prompt, request.sampling.stop)
        sequence = Sequence(id, model.namespace, prompt, len(prompt), model.shares_response)
        self._active[id] = _Active(
            request,
            model,
            sequence,
            stream,
            secrets.randbelow(SEED_LIMIT) if seed is None else seed,
            Timings(time.perf_counter()),
        )
        self._scheduler.add(sequence)
        return id

    def cancel(self, id: str) -> RequestOutput:
        """End a request at once, whether it waits or runs; its pages are free or findable then.

        Raises:
          ValueError: no request of that id is being served.
        """
        if id not in self._active:
            raise ValueError(f"No request with the id {id!r} is being served.")
        return self._finish(self._active[id], "cancelled")

    def step(self) -> list[Event]:
        """Schedule, run and postprocess one step: some prefill, and a token of each that decodes.

        Returns:
          A `TextDelta` for each new token, and a `RequestOutput` after the last of a request.
        """
        plan = self._scheduler.plan()
        self._note_started(plan.prefills, plan.decodes)
        for chunk in plan.prefills:
            self._prefill(chunk)
            self._scheduler.prefilled(chunk)
        lanes: dict[Lane, list[_Active]] = collections.defaultdict(list)
        for sequence in plan.decodes:
            active = self._active[sequence.id]
            lanes[self._models.lane(active.model)].append(active)
        # All lanes are on their way before the first answer is waited for.
        answers = [(rows, self._decode(lane, rows)) for lane, rows in lanes.items()]
        self._counts["steps"] += 1
        self._counts["prefill"] += sum(chunk.count for chunk in plan.prefills)
        self._counts["decode"] += len(plan.decodes)
        return [
            event
            for rows, (tokens, broken) in answers
            for active, token, fails in zip(
                rows, np.asarray(tokens).tolist(), np.asarray(broken).tolist(), strict=False
            )
            for event in self._advance(active, token, fails)
        ]

    def stats(self) -> EngineStats:
        """Counts up to now."""
        counts, scheduler = self._counts, self._scheduler
        return EngineStats(
            steps=counts["steps"],
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=counts["finished"],
            prompt_tokens=counts["prompt"],
            reused_tokens=counts["reused"],
            prefill_tokens=counts["prefill"],
            decode_tokens=counts["decode"],
            preemptions=scheduler.preemptions,
            pages=scheduler.counts(),
        )

    def check(self) -> None:
        """Verify that no page is lost or in two places.

        Raises:
          AssertionError: one is: a fault of ours.
        """
        self._scheduler.check()

    def warm_up(self) -> None:
        """Compile every step that the models served now can ask for, on rows of padding."""
        no_page, page_size = self._cache.num_pages, self._cache.page_size
        for lane in self._models.lanes:
            for B, P in self._buckets.decode_shapes():
                self._run_decode(lane, pad([], no_page, B, 1, P), SamplingBatch.of([], [], B))
        for writer in self._models.writers:
            for T, P in self._buckets.prefill_shapes(page_size):
                self._run_prefill(*writer, pad([], no_page, 1, T, P))

    # Run

    def _prefill(self, chunk: Prefill) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        model = self._active[sequence.id].model
        used = pages_for(end, self._cache.page_size)
        row = Row(
            sequence.tokens[chunk.start : end], chunk.start, sequence.pages[:used], model.slot
        )
        batch = self._buckets.prefill(row, self._cache.num_pages)
        self._run_prefill(*self._models.writer(model, chunk.by_prompt_writer), batch)

    def _run_prefill(self, weights: str, adapted: bool, batch: Batch) -> None:
        model, slots = self._models.weights(weights), batch.slots if adapted else None
        self._cache = prefill(model, self._cache, batch.table, batch.tokens, batch.counts, slots)

    def _decode(self, lane: Lane, rows: list[_Active]) -> tuple[jax.Array, jax.Array]:
        batch = self._buckets.decode(
            [
                Row(a.sequence.tokens[-1:], a.sequence.cached, a.sequence.pages, a.model.slot)
                for a in rows
            ],
            self._cache.num_pages,
        )
        sampling = SamplingBatch.of(
            [a.request.sampling for a in rows], [a.seed for a in rows], len(batch.counts)
        )
        return self._run_decode(lane, batch, sampling)

    def _run_decode(
        self, lane: Lane, batch: Batch, sampling: SamplingBatch
    ) -> tuple[jax.Array, jax.Array]:
        model = self._models.weights(lane.weights)
        slots = None if model.bank is None else batch.slots
        tokens, broken, self._cache = _decode_and_sample(
            model, self._cache, batch.table, batch.tokens, sampling, slots, lane.streams
        )
        return tokens, broken

    # Postprocess

    def _note_started(self, prefills: list[Prefill], decodes: list[Sequence]) -> None:
        for sequence in (*(p.sequence for p in prefills), *decodes):
            active = self._active[sequence.id]
            if active.timings.started is None:
                active.timings = dataclasses.replace(active.timings, started=time.perf_counter())
                self._counts["prompt"] += sequence.prompt_length
                self._counts["reused"] += sequence.reused or 0

    def _advance(self, active: _Active, token: int, fails: bool) -> Iterable[Event]:
        """What one more token of a request means."""
        if fails:
            error = f"The logits of {active.model.name} are not finite (NaN or infinity)."
            yield self._finish(active, "error", error)
            return
        self._scheduler.decoded(active.sequence, token)
        if active.timings.first_token is None:
            active.timings = dataclasses.replace(active.timings, first_token=time.perf_counter())
        reason, text = self._ending(active, token), ""
        if active.stream is not None:
            text = "" if reason == "stop" else active.stream.push(token)
            if active.stream.stopped:
                reason = "stop"
            if reason is not None:
                text += active.stream.finish()
        yield TextDelta(active.sequence.id, token, text)
        if reason is not None:
            yield self._finish(active, reason)

    def _ending(self, active: _Active, token: int) -> FinishReason | None:
        sampling, sequence = active.request.sampling, active.sequence
        if not sampling.ignore_eos and token in self._eos_ids(active.model):
            return "stop"
        generated = len(sequence.tokens) - sequence.prompt_length
        full = len(sequence.tokens) > self.context  # the new token has no position to stand at
        return "length" if generated == sampling.max_tokens or full else None

    def _eos_ids(self, model: ServedModel) -> tuple[int, ...]:
        return model.eos_ids + (self.tokenizer.eos_ids if self.tokenizer else ())

    def _finish(
        self, active: _Active, reason: FinishReason, error: str | None = None
    ) -> RequestOutput:
        sequence = active.sequence
        # What a broken row has written may be as broken as its logits.
        self._scheduler.remove(sequence, share=reason != "error")
        del self._active[sequence.id]
        self._counts["finished"] += 1
        return RequestOutput(
            id=sequence.id,
            model=active.model.name,
            text=active.stream.text if active.stream else "",
            tokens=tuple(sequence.tokens[sequence.prompt_length :]),
            finish_reason=reason,
            error=error,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.reused or 0,
            timings=dataclasses.replace(active.timings, finished=time.perf_counter()),
        )

    # Bad input

    def _prompt_tokens(self, request: Request) -> list[int]:
        if self.tokenizer is None and (isinstance(request.prompt, str) or request.sampling.stop):
            raise ValueError("Text prompts and stop texts need an engine with a tokenizer.")
        if isinstance(request.prompt, str):
            assert self.tokenizer is not None
            prompt = self.tokenizer.encode(request.prompt)
        else:
            prompt = list(request.prompt)
        if not prompt:
            raise ValueError("A prompt needs at least one token, got none.")
        if len(prompt) > self.context:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens, the context holds {self.context}: "
                "shorten it, or give the engine more pages if the model's own context is longer."
            )
        for token in prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"Prompt tokens must be whole numbers in [0, {self._vocab_size}), the model's "
                    f"vocabulary, got {token!r}."
                )
        return [int(token) for token in prompt]


@functools.partial(jax.jit, static_argnames=("streams",), donate_argnames=("cache",))
def _decode_and_sample(
    model: Model,
    cache: KVCache,
    table: PageTable,
    tokens: jax.Array,
    sampling: SamplingBatch,
    slots: jax.Array | None,
    streams: int,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """The next token of each row [B], whether its logits were not finite [B], and the cache."""
    logits, cache = decode_step(model, cache, table, tokens[:, 0], slots, streams)
    chosen, broken = sample(logits, sampling, table.length + 1)
    return chosen, broken, cache
