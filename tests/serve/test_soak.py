"""A short soak with tiny models; `soak.py` tells of the long one."""

import random

from jaxcodec.models.scheme import CONVENTIONAL, ICARUS
from jaxcodec.serve.request import Request, SamplingParams
from tests.serve.soak import POISONED, Clock, Soak, answered_alone

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


def test_every_answer_is_that_of_the_request_alone(make_engine, adapters) -> None:
    poisoned = {
        f"{POISONED} a": (ICARUS, adapters["broken"]),
        f"{POISONED} b": (CONVENTIONAL, adapters["broken"]),
    }
    clock = Clock()
    tight = {"pages": 17, "max_waiting": 30, "host_pages": 10, "decode_steps": 2, "clock": clock}
    engine, alone = make_engine(**tight), make_engine(pages=17, decode_steps=2)
    for name, (scheme, adapter) in poisoned.items():
        for one in (engine, alone):
            one.add_model(name, scheme, adapter=adapter)
    reloaded = {"first": (ICARUS, adapters["first"]), "own": (CONVENTIONAL, adapters["writing"])}
    expected = answered_alone(alone, some_requests(50))
    soak = Soak(engine, clock, expected, reloaded | poisoned, seed=0)
    soak.run(400)
    assert not soak.unequal
    stats = engine.stats()
    assert min(stats.preemptions, stats.evictions, stats.restored, stats.adapter_loads) > 0
    assert {"stop", "length", "error", "cancelled", "deadline", "oversize refused"} <= {
        *soak.counts
    }
