"""Many specialised models of one base, served from one KV cache.

`Engine.step` is plan, run, collect: it sends the device its next work, and takes in what the work
before that has made. Queues, pages and prefixes are plain Python beneath it; the device is the
runner's.
"""

import collections
import dataclasses
import heapq
import itertools
import secrets
import time
from collections.abc import Callable
from typing import Any, get_args

import jax

from jaxcodec.models.cache import KVCache, pages_for
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import Adapter
from jaxcodec.models.scheme import Scheme
from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.answers import Answer
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.detokenizer import TextStream
from jaxcodec.serve.pages import pages_that_fit
from jaxcodec.serve.plan import NO_ROW, Plan, Sequence
from jaxcodec.serve.prefix_tree import PageNames
from jaxcodec.serve.prompts import prompt_tokens
from jaxcodec.serve.request import (
    SEED_LIMIT,
    Event,
    FinishReason,
    QueueFull,
    Request,
    RequestOutput,
)
from jaxcodec.serve.runner import Launch, LaunchedRow, Runner
from jaxcodec.serve.scheduler import Scheduler
from jaxcodec.serve.served_models import DEFAULT_BANK, ServedModels
from jaxcodec.serve.statistics import EngineStats, ModelStats
from jaxcodec.serve.structured import Grammars
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
        self._page_size = page_size
        self._models = ServedModels(base, name, bank, share_prefixes)
        if pages is None:
            pages = _pages_that_fit(base, page_size)
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
        self._timeline, self._clock = timeline, clock
        self._made = clock()
        self._active: dict[str, list[Answer]] = {}  # by id, in order of submission
        self._answers: dict[Sequence, Answer] = {}
        self._deadlines: list[tuple[float, int, Answer]] = []
        self._flying: list[Launch] = []  # of the last step
        self._number = itertools.count(1)
        self._counts: collections.Counter[str] = collections.Counter()
        self._by_model: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )

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
            self._models.load(adapter, slot)

    def submit(self, request: Request) -> str:
        """Queue a request; returns its id.

        Raises:
          ValueError: an unknown model, an id in use, text without a tokenizer, a prompt that is
            empty, holds an unknown token or exceeds the context (the model's, or what the whole
            cache holds), a structure that is none, or more responses than the queue could hold.
            The engine goes on as if it had not been asked.
          QueueFull: there is no room in the queue for it. Step the engine and try again.
        """
        self._models.find(request.model)
        prompt = prompt_tokens(request, self.tokenizer, self.context, self._vocab_size)
        count, waiting = request.sampling.n, len(self._scheduler.waiting)
        id = request.id if request.id is not None else f"request-{next(self._number)}"
        if id in self._active:
            raise ValueError(f"A request with the id {id!r} is being served.")
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
        for answer in [self._answer(request, (id, k), prompt, s, now) for k, s in enumerate(seeds)]:
            self._queue(answer)
        return id

    def cancel(self, id: str) -> list[RequestOutput]:
        """End a request at once, whether it waits or runs; its pages are free or findable then.

        Returns:
          the ends of those of its responses that had not ended.

        Raises:
          ValueError: no request of that id is being served.
        """
        if id not in self._active:
            raise ValueError(f"No request with the id {id!r} is being served.")
        return [self._finish(answer, "cancelled") for answer in list(self._active[id])]

    def step(self) -> list[Event]:
        """Plan and launch one step, and collect what the step before it has made.

        Returns:
          A `TextDelta` for each new token, and a `RequestOutput` after the last of a response.
        """
        self._counts["steps"] += 1
        events = self._expire()
        plan = self._scheduler.plan(settled=not self._flying)
        if self._flying and (plan is None or plan.empty):  # all depends on what is on its way
            events += self._collect()
            plan = self._scheduler.plan()
        assert plan is not None, "a settled scheduler has a plan"
        moves = events or plan.preempted or not plan.empty
        assert moves or not self._scheduler.waiting, "the scheduler has stalled"
        self._note_plan(plan)
        launches = self._runner.run(plan, self._answers)
        events += self._collect()
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
        return events

    def stats(self) -> EngineStats:
        """Counts up to now."""
        scheduler, counts = self._scheduler, self._counts
        waiting = collections.Counter(s.model for s in scheduler.waiting)
        running = collections.Counter(s.model for s in scheduler.running)
        models = {
            name: ModelStats(
                waiting=waiting[name],
                running=running[name],
                finished={reason: n for reason in get_args(FinishReason) if (n := own[reason])},
                prompt_tokens=own["prompt"],
                reused_tokens=own["reused"],
                prefill_tokens=own["prefill"],
                decode_tokens=own["decode"],
                preemptions=scheduler.preempted[name],
            )
            for name, own in self._by_model.items()
        }
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
        self._runner.warm_up()

    def _answer(
        self, request: Request, id: tuple[str, int], prompt: list[int], seed: int, now: float
    ) -> Answer:
        """One of the responses to a request, before anything is done for it."""
        model, sampling = self._models.find(request.model), request.sampling
        eos_ids = model.eos_ids + (self.tokenizer.eos_ids if self.tokenizer else ())
        progress, stream = None, None
        if sampling.structured is not None:
            progress = self._grammars.start(sampling.structured, eos_ids)
        if self.tokenizer is not None:
            stream = TextStream(self.tokenizer, prompt, sampling.stop, sampling.min_tokens)
        tokens = list(prompt)
        sequence = Sequence(
            id=id,
            model=model.name,
            tokens=tokens,
            prompt_length=len(prompt),
            limit=min(len(prompt) + sampling.max_tokens, self.context + 1),
            names=PageNames(model.namespace, tokens, self._page_size),
            shares_response=model.shares_response,
            adapter=model.adapter,
            priority=request.priority,
            needs_host=sampling.needs_host,
        )
        return Answer(request, model, sequence, seed, stream, progress, eos_ids, now)

    # What became of it

    def _collect(self) -> list[Event]:
        """Take in what is on its way."""
        flying, self._flying = self._flying, []
        now = self._clock()
        return [
            event
            for launch in flying
            for row in launch.fetch()
            if row.answer.sequence.row != NO_ROW  # else it was cancelled meanwhile
            for event in self._advance(row, now)
        ]

    def _advance(self, row: LaunchedRow, now: float) -> list[Event]:
        """What the new tokens of a response mean; a fault in one response is that one's alone."""
        answer, events, reason, error = row.answer, [], None, None
        sequence = answer.sequence
        try:
            for place, token in enumerate(row.tokens):
                delta, reason = answer.take(token, place, row.logprobs, now)
                events.append(delta)
                if reason is not None:
                    break
        except Exception as fault:  # of a tokenizer or a structure, which are not ours
            reason, error = "error", f"{type(fault).__name__}: {fault}"
        self._scheduler.decoded(sequence, len(events), row.planned)
        self._by_model[answer.model.name]["decode"] += len(events)
        self._note(answer, "decode", now, tokens=len(events))
        if row.broken and reason is None:
            reason = "error"
            error = f"The logits of {answer.model.name} are not finite (NaN or infinity)."
        if reason is not None:
            events.append(self._finish(answer, reason, error))
        return events

    def _expire(self) -> list[Event]:
        """End what has passed its deadline."""
        ended: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, _, answer = heapq.heappop(self._deadlines)
            if answer.sequence in self._answers:
                ended.append(self._finish(answer, "deadline"))
        return ended

    def _finish(
        self, answer: Answer, reason: FinishReason, error: str | None = None
    ) -> RequestOutput:
        sequence, now = answer.sequence, self._clock()
        # What a broken row has written may be as broken as its logits.
        self._scheduler.remove(sequence, share=reason != "error")
        del self._answers[sequence]
        id, _ = sequence.id
        self._active[id].remove(answer)
        if not self._active[id]:
            del self._active[id]
        self._models.release(answer.model)
        self._by_model[answer.model.name][reason] += 1
        self._note(answer, reason, now)
        return answer.output(reason, error, now)

    def _queue(self, answer: Answer) -> None:
        sequence = answer.sequence
        self._scheduler.add(sequence)
        self._by_model[answer.model.name]["submitted"] += 1
        self._models.hold(answer.model)
        self._answers[sequence] = answer
        self._active.setdefault(sequence.id[0], []).append(answer)
        if answer.deadline < float("inf"):
            heapq.heappush(self._deadlines, (answer.deadline, next(self._number), answer))
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


def _pages_that_fit(base: Model, page_size: int) -> int:
    """Pages of `page_size` tokens in what the base has left of its device's memory."""
    page = jax.eval_shape(lambda: KVCache.zeros(base.config, 1, page_size, base.dtype))
    page_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(page))
    return pages_that_fit(page_bytes, jax.local_devices()[0].memory_stats())
