"""Many specialised models of one base, served from one KV cache.

`Engine.step` is plan, run, collect: it sends the device its next work, and takes in what the work
before that has made. Queues, pages and prefixes are plain Python beneath it; the device is the
runner's.
"""

import collections
import contextlib
import dataclasses
import heapq
import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxcodec.models.cache import KVCache, pages_for
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import Adapter
from jaxcodec.models.scheme import Scheme
from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.answers import Answer
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.detokenizer import TextStream
from jaxcodec.serve.plan import NO_ROW, Plan, Sequence
from jaxcodec.serve.prefix_tree import PageNames
from jaxcodec.serve.prompts import RequestTokens, request_tokens
from jaxcodec.serve.request import (
    SEED_LIMIT,
    Event,
    FinishReason,
    QueueFull,
    Request,
    RequestOutput,
    SamplingParams,
    TextDelta,
)
from jaxcodec.serve.runner import Launch, LaunchedRow, Runner, cache_pages
from jaxcodec.serve.scheduler import Scheduler
from jaxcodec.serve.served_models import DEFAULT_BANK, ServedModels
from jaxcodec.serve.statistics import EngineStats, ModelCounts
from jaxcodec.serve.structured import Grammars, Progress
from jaxcodec.serve.timeline import Timeline


class Engine:
    """Continuous batching of requests for different models over one paged cache.

    Args:
      base: the model that all share.
      tokenizer: for prompts and responses as text; None to work on token ids alone.
      name: under which the base itself is served.
      page_size: tokens in a page of the cache.
      pages: pages in the cache; None for what the device's free memory holds, so load other models
        before.
      max_batch: most responses that run at once.
      step_tokens: most tokens computed in one step: one for each response that decodes, the rest
        for prompts. A longer prompt takes several steps: so this bounds the time between tokens.
      decode_steps: most tokens that one launch adds to a response, when nothing waits.
      max_waiting: most responses in the queue.
      bank: room for adapters on the base, see `bank_for`. Any number can be served: those in use
        are in its slots.
      host_pages: most pages that are kept in host memory when the cache has no room for them.
      share_prefixes: False keeps the pages of each model to itself, for comparison.
      buckets: shapes to compile for; None for powers of two.
      timeline: where to note what happens to requests.
      clock: gives seconds; `time.perf_counter` unless tests need another.
    """

    def __init__(
        self,
        base: Model,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "base",
        page_size: int = 16,
        pages: int | None = None,
        max_batch: int = 16,
        step_tokens: int = 512,
        decode_steps: int = 8,
        max_waiting: int = 1024,
        bank: AdapterBank = DEFAULT_BANK,
        host_pages: int = 0,
        share_prefixes: bool = True,
        buckets: Buckets | None = None,
        timeline: Timeline | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.tokenizer = tokenizer
        self._vocab_size = base.config.vocab_size
        if page_size < 1 or (pages is not None and pages < 1) or max_waiting < 1:
            raise ValueError(
                "page_size, pages and max_waiting must be at least 1, got "
                f"{page_size}, {pages} and {max_waiting}."
            )
        self._page_size = page_size
        self._models = ServedModels(base, name, bank, share_prefixes)
        if pages is None:
            pages = cache_pages(base, page_size)
        self.context = min(base.config.max_positions, pages * page_size)
        sizes = max_batch, step_tokens, pages_for(self.context, page_size)
        buckets = buckets or Buckets.powers_of_two(*sizes)
        buckets.check_holds(*sizes)
        self._scheduler = Scheduler(
            pages, page_size, max_batch, step_tokens, decode_steps, self._models.slots, host_pages
        )
        cache = KVCache.zeros(base.config, pages, page_size, base.dtype)
        self._grammars = Grammars(tokenizer, self._vocab_size)
        self._runner = Runner(
            base.config, self._models, self._grammars, buckets, cache, max_batch, decode_steps
        )
        self._max_waiting = max_waiting
        self._timeline, self._clock, self._made = timeline, clock, clock()
        self._active: dict[str, list[Answer]] = {}  # by id, in order of submission
        self._answers: dict[Sequence, Answer] = {}
        self._deadlines: list[tuple[float, int, Answer]] = []
        self._flying: list[Launch] = []  # of the last step
        self._events: list[Event] = []  # that the next step, or this one, gives out
        # Whose tokens are being taken in, with its length and the number of events before.
        self._advancing: tuple[Answer, int, int] | None = None
        self._broken: str | None = None  # why nobody can be served any more
        self._number = itertools.count(1)
        self._counts: collections.Counter[str] = collections.Counter()
        self._by_model = ModelCounts()

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests can ask for."""
        return self._models.names

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or has an end that no step has given out yet."""
        return bool(self._active or self._events)

    def add_model(
        self,
        name: str,
        scheme: Scheme,
        *,
        adapter: Adapter | None = None,
        model: Model | None = None,
    ) -> None:
        """Serve a specialised model: an adapter on the base, or weights of its own.

        After `warm_up`, an adapter of a scheme that was served then compiles nothing.

        Raises:
          ValueError: the name is taken; not exactly one of adapter and model; an icarus model that
            is not an adapter, or whose adapter writes the cache; a model of another architecture
            than the base's; an adapter that does not fit it, or the bank.
        """
        self._models.add(name, scheme, adapter, model)

    def remove_model(self, name: str) -> None:
        """Serve a model no more; requests that it has are answered as if nothing had happened.

        The name is free at once: a new version of an adapter is added under the name of the old.

        Raises:
          ValueError: there is no such model, or it is the base.
        """
        self._models.remove(name)
        self._by_model.fold(self._models.names, self._scheduler.preempted)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a model's adapter in its slot, whatever else is asked for; or no more.

        Raises:
          ValueError: there is no such model, or it is no adapter.
          MemoryError: all slots are in use, or all but one pinned.
        """
        adapter = self._models.find(name).adapter
        if adapter is None:
            raise ValueError(f"{name} is no adapter: its weights are always there.")
        if not pinned:
            self._models.slots.unpin(adapter)
            return
        slot, is_new = self._models.slots.pin(adapter)
        if is_new:
            with self._recovering():
                self._models.load(adapter, slot)

    def submit(self, request: Request) -> str:
        """Queue a request; returns its id.

        Raises:
          ValueError: an unknown model, an id in use, text without a tokenizer, a prompt (with its
            continuation) that is empty, holds an unknown token or exceeds the context (the model's,
            or what the cache holds), a structure that is none, or more responses than the queue
            could hold. The engine goes on as if it had not been asked.
          QueueFull: there is no room in the queue for it, or the end of the last request with its
            id has not been given out. Step the engine and try again.
          RuntimeError: a fault has left the device unusable.
        """
        self._check_usable()
        self._models.find(request.model)
        tokens = request_tokens(request, self.tokenizer, self.context, self._vocab_size)
        count, waiting = request.sampling.n, len(self._scheduler.waiting)
        id = self._new_id() if request.id is None else request.id
        if id in self._active:
            raise ValueError(f"A request with the id {id!r} is being served.")
        if id in self._ending:
            raise QueueFull(f"The last request with the id {id!r} ends with the next step.")
        if count > self._max_waiting:
            raise ValueError(f"n is {count}, but the queue holds {self._max_waiting} responses.")
        if waiting + count > self._max_waiting:
            self._counts["rejected"] += 1
            raise QueueFull(
                f"{waiting} responses wait, of at most {self._max_waiting}: there is no room for "
                f"{count} more."
            )
        seed = request.sampling.seed
        seed = secrets.randbelow(SEED_LIMIT) if seed is None else seed
        now = self._clock()
        seeds = [(seed + k) % SEED_LIMIT for k in range(count)]
        for answer in [self._answer(request, (id, k), tokens, s, now) for k, s in enumerate(seeds)]:
            self._queue(answer)
        return id

    def cancel(self, id: str) -> None:
        """End a request at once, whether it waits or runs; its pages are free or findable then.

        The ends of those of its responses that had not ended come with the next step.

        Raises:
          ValueError: no request of that id is being served.
        """
        if id not in self._active:
            raise ValueError(f"No request with the id {id!r} is being served.")
        with self._recovering():
            for answer in list(self._active[id]):
                self._finish(answer, "cancelled")

    def step(self) -> list[Event]:
        """Plan and launch one step, and collect what the step before it has made.

        Whatever is raised, KeyboardInterrupt included, what had been computed is computed again:
        who steps on gets every event, and every response as if nothing had happened.

        Returns:
          A `TextDelta` for each new token, and a `RequestOutput` after the last of a response.

        Raises:
          RuntimeError: a fault has left the device unusable.
        """
        self._check_usable()
        with self._recovering():
            self._step()
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        self._counts["steps"] += 1
        self._expire()
        plan = self._scheduler.plan(settled=not self._flying)
        if self._flying and (plan is None or plan.empty):  # all depends on what is on its way
            self._collect()
            plan = self._scheduler.plan()
        assert plan is not None, "a settled scheduler has a plan"
        moves = self._events or plan.preempted or not plan.empty
        assert moves or not self._scheduler.waiting, "the scheduler has stalled"
        self._note_plan(plan)
        launches = self._runner.run(plan, self._answers)
        self._collect()
        self._flying = launches
        if not self._active:
            self._scheduler.check_idle()
        if self._timeline is not None:
            self._timeline.counter(
                self._clock(),
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                free_pages=self._scheduler.pool.free,
                prefill_tokens=sum(chunk.count for chunk in plan.prefills),
                decode_tokens=sum(count for _, count in plan.decodes),
            )

    def stats(self) -> EngineStats:
        """Counts up to now."""
        scheduler, counts = self._scheduler, self._counts
        waiting = collections.Counter(s.model for s in scheduler.waiting)
        running = collections.Counter(s.model for s in scheduler.running)
        models = self._by_model.stats(waiting, running, scheduler.preempted)
        return EngineStats.of(
            models,
            scheduler.counts(),
            seconds=self._clock() - self._made,
            steps=counts["steps"],
            launches=self._runner.launches,
            rejected=counts["rejected"],
            evictions=scheduler.evictions,
            offloaded=scheduler.host.offloaded,
            restored=scheduler.host.restored,
            adapter_loads=self._models.slots.loads,
        )

    def check(self) -> None:
        """Verify that no page, row or slot is lost or in two places.

        Raises:
          AssertionError: one is: a fault of ours.
        """
        self._scheduler.check()

    def warm_up(self) -> None:
        """Compile every step that the models served now can ask for."""
        self._check_usable()
        with self._recovering():
            self._runner.warm_up()

    def _new_id(self) -> str:
        """One that is nobody's."""
        ids = (f"request-{number}" for number in self._number)
        return next(id for id in ids if id not in self._active and id not in self._ending)

    @property
    def _ending(self) -> set[str]:
        """Ids of what has ended since the last step."""
        return {event.id for event in self._events}

    def _answer(
        self, request: Request, id: tuple[str, int], of: RequestTokens, seed: int, now: float
    ) -> Answer:
        """One of the responses to a request, before anything is done for it."""
        model, sampling = self._models.find(request.model), request.sampling
        eos_ids = model.eos_ids + (self.tokenizer.eos_ids if self.tokenizer else ())
        stream, progress = self._readers(sampling, of.prompt, eos_ids)
        tokens, generated = [*of.prompt, *of.given], 0 if of.given else sampling.max_tokens
        sequence = Sequence(
            id=id,
            model=model.name,
            tokens=tokens,
            prompt_length=len(of.prompt),
            limit=min(len(tokens) + generated, self.context + 1),
            names=PageNames(model.namespace, tokens, self._page_size),
            shares_response=model.shares_response and not of.given,  # all of it is to be scored
            adapter=model.adapter,
            priority=request.priority,
            needs_host=sampling.needs_host,
        )
        return Answer(request, model, sequence, seed, stream, progress, eos_ids, now)

    def _readers(
        self, sampling: SamplingParams, prompt: list[int], eos_ids: tuple[int, ...]
    ) -> tuple[TextStream | None, Progress | None]:
        """What follows the tokens of a response: its text and its structure."""
        progress, stream = None, None
        if sampling.structured is not None:
            progress = self._grammars.start(sampling.structured, eos_ids)
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, prompt, sampling.stop, sampling.min_tokens)
        return stream, progress

    # After a fault

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise RuntimeError(self._broken)

    @contextlib.contextmanager
    def _recovering(self) -> Iterator[None]:
        """Have whatever is raised leave an engine that goes on, or one that refuses to."""
        try:
            yield
        except BaseException as fault:
            self._broken = (
                f"The engine could not begin anew after {type(fault).__name__}: make another one."
            )
            self._recover()
            self._broken = None
            raise

    def _recover(self) -> None:
        """Forget all that was computed, and queue again what has not ended."""
        self._flying = []
        if self._advancing is not None:
            answer, length, given = self._advancing
            if answer.sequence in self._answers:
                del self._events[given:]
                self._rewind(answer, length)
        self._advancing = None
        now = self._clock()
        for sequence in self._scheduler.running:
            if sequence in self._answers:
                self._note(self._answers[sequence], "preempted", now)
        self._active = {}
        for answer in self._answers.values():
            self._active.setdefault(answer.sequence.id[0], []).append(answer)
        self._events = [e for e in self._events if isinstance(e, TextDelta) or self._ended(e)]
        self._scheduler.restart(self._answers)
        self._runner.restart()

    def _ended(self, output: RequestOutput) -> bool:
        ids = (answer.sequence.id for answer in self._active.get(output.id, ()))
        return (output.id, output.index) not in ids

    def _rewind(self, answer: Answer, length: int) -> None:
        """Forget the tokens of a response after the first `length`, prompt included."""
        sequence = answer.sequence
        prompt = sequence.tokens[: sequence.prompt_length]
        readers = self._readers(answer.request.sampling, prompt, answer.eos_ids)
        answer.rewind(length - len(prompt), *readers)
        sequence.names = PageNames(answer.model.namespace, sequence.tokens, self._page_size)

    # What became of it

    def _collect(self) -> None:
        """Take in what is on its way."""
        flying, self._flying = self._flying, []
        now = self._clock()
        for launch in flying:
            for row in launch.fetch():
                if row.answer.sequence.row != NO_ROW:  # else it was cancelled meanwhile
                    self._advancing = row.answer, len(row.answer.sequence.tokens), len(self._events)
                    self._advance(row, now)
                    self._advancing = None

    def _advance(self, row: LaunchedRow, now: float) -> None:
        """What the new tokens of a response mean; a fault in one response is that one's alone."""
        answer, reason, error, taken = row.answer, None, None, 0
        sequence = answer.sequence
        try:
            reason = answer.score(row.logprobs) if answer.given else None
            for place, token in enumerate(row.tokens):
                delta, reason = answer.take(token, place, row.logprobs, now)
                self._events.append(delta)
                taken += 1
                if reason is not None:
                    break
        except Exception as fault:  # of a tokenizer or a structure, which are not ours
            reason, error = "error", f"{type(fault).__name__}: {fault}"
        self._scheduler.decoded(sequence, taken, row.planned)
        self._by_model[answer.model.name]["decode"] += taken
        self._note(answer, "decode", now, tokens=taken)
        if row.broken and reason is None:
            reason = "error"
            error = f"The logits of {answer.model.name} are not finite (NaN or infinity)."
        if reason is not None:
            self._finish(answer, reason, error)

    def _expire(self) -> None:
        """End what has passed its deadline."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, _, answer = heapq.heappop(self._deadlines)
            if answer.sequence in self._answers:
                self._finish(answer, "deadline")

    def _finish(self, answer: Answer, reason: FinishReason, error: str | None = None) -> None:
        sequence, now = answer.sequence, self._clock()
        # What a broken row has written may be as broken as its logits.
        self._scheduler.remove(sequence, share=reason != "error")
        self._events.append(answer.output(reason, error, now))
        del self._answers[sequence]
        id, _ = sequence.id
        self._active[id].remove(answer)
        if not self._active[id]:
            del self._active[id]
        self._models.release(answer.model)
        self._by_model[answer.model.name][reason] += 1
        self._by_model.fold(self._models.names, self._scheduler.preempted)
        self._note(answer, reason, now)

    def _queue(self, answer: Answer) -> None:
        sequence = answer.sequence
        self._scheduler.add(sequence)
        self._by_model[answer.model.name]["submitted"] += 1
        self._models.hold(answer.model)
        self._answers[sequence] = answer
        self._active.setdefault(sequence.id[0], []).append(answer)
        if answer.deadline < float("inf"):
            heapq.heappush(self._deadlines, (answer.deadline, next(self._number), answer))
            # Those of what has ended go when they come up, or here before they pile up.
            if len(self._deadlines) > 2 * len(self._answers) + 64:
                left = [d for d in self._deadlines if d[2].sequence in self._answers]
                heapq.heapify(left)
                self._deadlines = left
        self._note(answer, "submitted", answer.timings.submitted, model=answer.model.name)

    def _note_plan(self, plan: Plan) -> None:
        now = self._clock()
        for sequence in plan.preempted:
            self._note(self._answers[sequence], "preempted", now)
        for sequence in plan.admitted:
            answer = self._answers[sequence]
            self._note(answer, "admitted", now, reused=sequence.found)
            if answer.timings.started is None:
                answer.timings = dataclasses.replace(answer.timings, started=now)
                self._by_model[sequence.model]["prompt"] += sequence.prompt_length
                self._by_model[sequence.model]["reused"] += sequence.reused or 0
        for chunk in plan.prefills:
            answer = self._answers[chunk.sequence]
            self._by_model[chunk.sequence.model]["prefill"] += chunk.count
            self._note(answer, "prefill", now, start=chunk.start, tokens=chunk.count)

    def _note(self, answer: Answer, event: str, time_s: float, **details: Any) -> None:
        if self._timeline is not None:
            self._timeline.note(*answer.sequence.id, event, time_s, **details)
