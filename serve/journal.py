"""What an engine counts and notes of the responses that it serves: statistics and a timeline."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxcodec.serve.answers import Answer
from jaxcodec.serve.plan import Plan, Sequence
from jaxcodec.serve.request import FinishReason
from jaxcodec.serve.scheduler import Scheduler
from jaxcodec.serve.statistics import EngineStats, ModelCounts
from jaxcodec.serve.timeline import Timeline


class Journal:
    """Told what happens, it keeps the counts of `EngineStats` and writes the timeline.

    Args:
      scheduler: which counts what it does itself.
      timeline: where to note what happens to responses; None for nowhere.
      clock: gives seconds.
    """

    def __init__(self, scheduler: Scheduler, timeline: Timeline | None, clock: Callable[[], float]):
        self.steps = 0
        self.rejected = 0
        self._scheduler = scheduler
        self._timeline, self._clock = timeline, clock
        self._made = clock()
        self._by_model = ModelCounts()

    def submitted(self, answer: Answer) -> None:
        """A response is in the queue."""
        self._by_model[answer.model.name]["submitted"] += 1
        self._note(answer, "submitted", answer.timings.submitted, model=answer.model.name)

    def planned(self, plan: Plan, answers: Mapping[Sequence, Answer]) -> None:
        """A step is about to be launched."""
        now = self._clock()
        for sequence in plan.preempted:
            self.preempted(answers[sequence], now)
        for sequence in plan.admitted:
            answer = answers[sequence]
            self._note(answer, "admitted", now, reused=sequence.found)
            if answer.timings.started is None:
                answer.started(now)
                self._by_model[sequence.model]["prompt"] += sequence.prompt_length
                self._by_model[sequence.model]["reused"] += sequence.reused or 0
        for chunk in plan.prefills:
            self._by_model[chunk.sequence.model]["prefill"] += chunk.count
            answer = answers[chunk.sequence]
            self._note(answer, "prefill", now, start=chunk.start, tokens=chunk.count)

    def preempted(self, answer: Answer, now: float) -> None:
        """A response was pushed out, or has to begin anew."""
        self._note(answer, "preempted", now)

    def decoded(self, answer: Answer, count: int, now: float) -> None:
        """So many tokens of a response have come."""
        self._by_model[answer.model.name]["decode"] += count
        self._note(answer, "decode", now, tokens=count)

    def ended(self, answer: Answer, reason: FinishReason, now: float) -> None:
        """A response has come to its end."""
        self._by_model[answer.model.name][reason] += 1
        self._note(answer, reason, now)

    def stepped(self, plan: Plan) -> None:
        """A step was launched, and the one before it has been taken in."""
        if self._timeline is not None:
            self._timeline.counter(
                self._clock(),
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                free_pages=self._scheduler.pool.free,
                prefill_tokens=sum(chunk.count for chunk in plan.prefills),
                decode_tokens=sum(count for _, count in plan.decodes),
            )

    def fold(self, served: tuple[str, ...]) -> None:
        """Count as one the models that are not served any more and have no response left."""
        self._by_model.fold(served, self._scheduler.preempted)

    def stats(self, launches: int, adapter_loads: int) -> EngineStats:
        """Counts up to now; those that the engine's other parts keep are given."""
        scheduler = self._scheduler
        return EngineStats.of(
            self._by_model.stats(scheduler.waiting, scheduler.running, scheduler.preempted),
            scheduler.counts(),
            seconds=self._clock() - self._made,
            steps=self.steps,
            launches=launches,
            rejected=self.rejected,
            evictions=scheduler.evictions,
            offloaded=scheduler.host.offloaded,
            restored=scheduler.host.restored,
            adapter_loads=adapter_loads,
        )

    def _note(self, answer: Answer, event: str, time_s: float, **details: Any) -> None:
        if self._timeline is not None:
            self._timeline.note(*answer.sequence.id, event, time_s, **details)
