"""An engine's numbers are those of its models together, and its own."""

import dataclasses
import json

from jaxcodec.serve.plan import PageCounts
from jaxcodec.serve.statistics import EngineStats, ModelStats

PAGES = PageCounts(total=10, free=5, held=3, cached=2, peak=7)


def test_the_engine_is_the_sum_of_its_models() -> None:
    models = {
        "sums": ModelStats(
            waiting=1, running=2, finished={"stop": 3, "error": 1}, prompt_tokens=30,
            reused_tokens=10, prefill_tokens=19, decode_tokens=7, preemptions=1,
        ),
        "dates": ModelStats(running=1, finished={"stop": 1, "length": 2}, prompt_tokens=10),
    }  # fmt: skip
    stats = EngineStats.of(models, PAGES, steps=4, rejected=2)
    assert (stats.waiting, stats.running, stats.decode_tokens, stats.preemptions) == (1, 3, 7, 1)
    assert stats.finished == {"stop": 4, "error": 1, "length": 2}
    assert stats.hit_rate == 10 / 40
    assert (stats.steps, stats.rejected, stats.pages, stats.models) == (4, 2, PAGES, models)


def test_statistics_become_json() -> None:
    stats = EngineStats.of({"sums": ModelStats(running=2)}, PAGES)
    content = json.loads(json.dumps(dataclasses.asdict(stats)))
    assert content["models"]["sums"]["running"] == content["running"] == 2
    assert content["pages"]["peak"] == 7


def test_an_engine_that_has_done_nothing_has_numbers() -> None:
    stats = EngineStats.of({}, PAGES)
    assert (stats.running, stats.hit_rate, stats.finished) == (0, 0.0, {})
