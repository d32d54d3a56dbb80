"""A short soak with tiny models; `soak.py` tells of the long one."""

import random
from collections.abc import Callable

import pytest

from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams
from tests.serve.soak import POISONED, Adapters, Clock, Soak, answered_alone, versions

NAMES = ("base", "first", "second", "own", "module", "adapted", f"{POISONED} a", f"{POISONED} b")
WAYS = (
    {"max_tokens": 4},
    {"max_tokens": 20, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "max_tokens": 9, "n": 2},
    {"repetition_penalty": 1.2, "max_tokens": 12, "logprobs": 1},
)


def some_requests(count: int) -> list[Request]:
    rng = random.Random(0)
    begins = [[rng.randrange(1, 256) for _ in range(rng.choice([3, 12, 25]))] for _ in range(6)]
    return [
        Request(
            rng.choice(NAMES),
            (*rng.choice(begins), *(rng.randrange(1, 256) for _ in range(rng.randrange(1, 6)))),
            SamplingParams(**rng.choice(WAYS)),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def models(adapters) -> Adapters:
    """What is taken out and put back under way."""
    return {
        "first": (ICARUS, adapters["first"]),
        f"{POISONED} a": (ICARUS, adapters["broken"]),
        "own": (CONVENTIONAL, adapters["writing"]),
        f"{POISONED} b": (CONVENTIONAL, adapters["broken"]),
        "adapted": (PREFILL_SHARE, adapters["writing"]),
    }


@pytest.fixture(scope="module")
def serving(make_engine, models) -> Callable[..., Engine]:
    """Makes engines that serve the poisoned models too."""

    def make(**options) -> Engine:
        engine = make_engine(pages=17, decode_steps=2, **options)
        for name, (scheme, adapter) in models.items():
            if name.startswith(POISONED):
                engine.add_model(name, scheme, adapter=adapter)
        return engine

    return make


@pytest.fixture(scope="module")
def expected(serving, models) -> dict[Request, list[RequestOutput]]:
    """Responses to requests that run alone."""
    return answered_alone(serving(), versions(some_requests(50), models))


def test_every_answer_is_that_of_the_request_alone(serving, models, expected) -> None:
    clock = Clock()
    engine = serving(max_waiting=30, host_pages=10, clock=clock)
    soak = Soak(engine, clock, some_requests(50), expected, models, seed=0)
    soak.run(400)
    assert not soak.unequal
    stats = engine.stats()
    assert min(stats.preemptions, stats.evictions, stats.restored, stats.adapter_loads) > 0
    reasons = {"stop", "length", "error", "cancelled", "deadline"}
    assert reasons | {"oversize refused", "reloads of other weights"} <= {*soak.counts}


def test_in_launches_of_several_sizes_a_tie_at_most_is_tipped(serving, models, expected) -> None:
    clock = Clock()
    buckets = Buckets(rows=(2, 8), tokens=(32,), pages=(16,))
    engine = serving(max_waiting=30, host_pages=10, clock=clock, buckets=buckets)
    icarus = [r for r in some_requests(50) if r.model in ("base", "first", "second")]
    soak = Soak(engine, clock, icarus, expected, models, seed=0)
    soak.run(150)
    assert len(soak.unequal) <= 1, soak.unequal
