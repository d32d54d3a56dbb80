"""What an engine has done and is doing, as one value."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

from jaxcodec.serve.plan import PageCounts, Sequence
from jaxcodec.serve.request import FinishReason

REMOVED = "(removed)"  # where the models that are served no more are counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStats:
    """Responses and tokens of one model; a request with n > 1 counts as n responses.

    Attributes:
      waiting: responses in the queue, now; those that were pushed out included.
      running: responses with a row and pages, now.
      finished: responses that have ended, by reason.
      prompt_tokens: tokens in the prompts of responses that have started.
      reused_tokens: of them, tokens that the prefix tree had.
      prefill_tokens: tokens that prefills have computed, those after preemptions included.
      decode_tokens: tokens generated.
      preemptions: times that a response was pushed out for want of pages.
    """

    waiting: int = 0
    running: int = 0
    finished: Mapping[FinishReason, int] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that the prefix tree had; 0 before any."""
        return self.reused_tokens / max(self.prompt_tokens, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats(ModelStats):
    """All models of an engine together, and what belongs to none of them. Make it with `of`.

    Attributes:
      seconds: since the engine was made.
      steps: calls of `Engine.step`.
      launches: programs sent to the device, prefills and decodes.
      rejected: requests that found the queue full.
      evictions: pages whose contents the prefix tree has given up.
      offloaded: pages copied to host memory.
      restored: pages copied back from there.
      adapter_loads: times that an adapter was put into a slot.
      pages: pages by state, now.
      models: each model by name; those that have been removed together as "(removed)".
    """

    seconds: float = 0.0
    steps: int = 0
    launches: int = 0
    rejected: int = 0
    evictions: int = 0
    offloaded: int = 0
    restored: int = 0
    adapter_loads: int = 0
    pages: PageCounts
    models: Mapping[str, ModelStats] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, models: Mapping[str, ModelStats], pages: PageCounts, **own: Any) -> "EngineStats":
        """The sum of the models, with the engine's own numbers."""
        totals: dict[str, Any] = {
            field.name: sum(getattr(model, field.name) for model in models.values())
            for field in dataclasses.fields(ModelStats)
            if field.name != "finished"
        }
        finished = collections.Counter()
        for model in models.values():
            finished.update(model.finished)
        return cls(**totals, finished=dict(finished), models=dict(models), pages=pages, **own)


class ModelCounts(collections.defaultdict[str, collections.Counter[str]]):
    """By model: "submitted", each finish reason, and tokens: "prompt", "reused", "prefill" and
    "decode"."""

    def __init__(self):
        super().__init__(collections.Counter)

    def stats(
        self,
        waiting: Iterable[Sequence],
        running: Iterable[Sequence],
        preempted: Mapping[str, int],
    ) -> dict[str, ModelStats]:
        """As values, with what there is of each model now."""
        waits = collections.Counter(sequence.model for sequence in waiting)
        runs = collections.Counter(sequence.model for sequence in running)
        return {
            name: ModelStats(
                waiting=waits[name],
                running=runs[name],
                finished={reason: n for reason in get_args(FinishReason) if (n := own[reason])},
                prompt_tokens=own["prompt"],
                reused_tokens=own["reused"],
                prefill_tokens=own["prefill"],
                decode_tokens=own["decode"],
                preemptions=preempted[name],
            )
            for name, own in self.items()
        }

    def fold(self, served: Collection[str], preempted: collections.Counter[str]) -> None:
        """Count as one the models that are not served any more and have no response left."""
        for name in [name for name in self if name not in served and name != REMOVED]:
            own = self[name]
            if own["submitted"] == sum(own[reason] for reason in get_args(FinishReason)):
                self[REMOVED].update(self.pop(name))
                preempted[REMOVED] += preempted.pop(name, 0)
