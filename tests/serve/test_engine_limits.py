"""Full queues, deadlines, urgent requests, adapters that come and go: nobody else notices."""

import random

import jax
import numpy as np
import pytest

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import QueueFull, Request, RequestOutput, SamplingParams, TextDelta
from jaxcodec.serve.served_models import bank_for

NEW = 6
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True)


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At zero."""
    return Clock()


@pytest.fixture
def make_icarus(base, adapters, one_shape, clock):
    """Engines that serve the base and its two icarus adapters."""

    def make(**options) -> Engine:
        options = {"page_size": 4, "pages": 64, "max_batch": 8, "step_tokens": 32} | options
        bank = AdapterBank(3, 4, ICARUS_TARGETS)
        engine = Engine(base, bank=bank, buckets=one_shape, clock=clock, **options)
        for name in ("first", "second"):
            engine.add_model(name, ICARUS, adapter=adapters[name])
        return engine

    return make


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 256) for _ in range(length)]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """The ends of all requests, by id."""
    ends = {}
    while engine.busy:
        ends |= {e.id: e for e in engine.step() if isinstance(e, RequestOutput)}
    engine.check()
    assert engine.stats().pages.held == 0
    return ends


def test_a_full_queue_says_so(make_icarus) -> None:
    engine = make_icarus(max_waiting=3)
    for i in range(3):
        engine.submit(Request("first", prompt(5, i), GREEDY))
    with pytest.raises(QueueFull, match="3 responses wait, of at most 3: there is no room for 1"):
        engine.submit(Request("first", prompt(5), GREEDY))
    with pytest.raises(ValueError, match="n is 4, but the queue holds 3"):
        engine.submit(Request("first", prompt(5), SamplingParams(temperature=1.0, n=4)))
    assert engine.stats().rejected == 1
    engine.step()
    engine.submit(Request("first", prompt(5), GREEDY))
    assert len(finish(engine)) == 4


def test_a_deadline_ends_what_waits_and_what_runs(make_icarus, clock) -> None:
    engine = make_icarus(max_batch=1)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    running = engine.submit(Request("first", prompt(5), sampling, deadline_s=2.0))
    waiting = engine.submit(Request("second", prompt(5, 1), sampling, deadline_s=1.0))
    patient = engine.submit(Request("base", prompt(5, 2), GREEDY, deadline_s=100.0))
    events = [event for _ in range(4) for event in engine.step()]
    made = [event.token for event in events if isinstance(event, TextDelta)]
    clock.now = 1.0
    (end,) = [e for e in engine.step() if isinstance(e, RequestOutput)]
    assert (end.id, end.finish_reason, end.tokens) == (waiting, "deadline", ())
    clock.now = 2.0
    ends = finish(engine)
    assert ends[running].finish_reason == "deadline"
    assert 0 < len(made) <= len(ends[running].tokens) < 40
    assert ends[running].tokens[: len(made)] == tuple(made)
    assert ends[patient].finish_reason == "length"


def test_the_urgent_go_first(make_icarus) -> None:
    engine = make_icarus(max_batch=1)
    calm = [engine.submit(Request("first", prompt(5, i), GREEDY, priority=1)) for i in range(3)]
    engine.step()
    urgent = engine.submit(Request("second", prompt(5), GREEDY))
    ends = finish(engine)
    assert list(ends) == [urgent, *calm]
    # who was pushed out has lost nothing
    again = generate(engine, [Request("first", prompt(5), GREEDY)])
    assert ends[calm[0]].tokens == again[0].tokens
    assert engine.stats().preemptions == 1


def test_n_responses_share_their_prompt(make_icarus) -> None:
    engine = make_icarus()
    sampling = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=NEW, ignore_eos=True)
    outputs = generate(engine, [Request("first", prompt(13), sampling)])
    assert [o.index for o in outputs] == [0, 1, 2]
    assert len({o.tokens for o in outputs}) == 3
    assert engine.stats().prefill_tokens == 12
    one = SamplingParams(temperature=1.0, seed=8, max_tokens=NEW, ignore_eos=True)
    (alone,) = generate(make_icarus(), [Request("first", prompt(13), one)])
    assert alone.tokens == outputs[1].tokens


def test_cancelling_ends_all_that_is_left_of_a_request(make_icarus) -> None:
    engine = make_icarus(max_batch=2)
    sampling = SamplingParams(temperature=1.0, n=3, max_tokens=30, ignore_eos=True)
    id = engine.submit(Request("first", prompt(5), sampling))
    for _ in range(3):
        engine.step()
    engine.cancel(id)
    assert (engine.stats().running, engine.stats().waiting, engine.busy) == (0, 0, True)
    with pytest.raises(QueueFull, match="ends with the next step"):
        engine.submit(Request("first", prompt(5), sampling, id=id))
    ends = engine.step()
    assert [(e.index, e.finish_reason) for e in ends if isinstance(e, RequestOutput)] == [
        (k, "cancelled") for k in range(3)
    ]
    assert not engine.busy
    assert finish(engine) == {}


def test_a_model_is_replaced_while_it_answers(make_icarus, adapters) -> None:
    engine = make_icarus()
    request = Request("first", prompt(9), SamplingParams(max_tokens=20, ignore_eos=True))
    (old,) = generate(engine, [request])
    (new,) = generate(engine, [Request("second", request.prompt, request.sampling)])
    running = engine.submit(request)
    for _ in range(2):
        engine.step()
    engine.remove_model("first")
    with pytest.raises(ValueError, match="No model is served as 'first'"):
        engine.submit(request)
    engine.add_model("first", ICARUS, adapter=adapters["second"])
    replaced = engine.submit(request)
    ends = finish(engine)
    assert ends[running].tokens == old.tokens != new.tokens
    assert ends[replaced].tokens == new.tokens
    assert engine._models.slots.resident.keys() == {engine._models.find("second").adapter}


def test_the_base_stays(make_icarus) -> None:
    with pytest.raises(ValueError, match="base is the base"):
        make_icarus().remove_model("base")


def test_an_adapter_that_does_not_fit_the_bank_is_refused(make_icarus, adapters, base) -> None:
    engine = make_icarus()
    before = engine.models
    with pytest.raises(ValueError, match=r"changes .'k_proj', 'v_proj'., the bank has room for"):
        engine.add_model("own", CONVENTIONAL, adapter=adapters["writing"])
    wide = jax.tree.map(lambda x: np.concatenate([x, x], x.shape.index(4)), adapters["first"])
    wide = type(wide)(wide.weights, 8, wide.alpha)
    with pytest.raises(ValueError, match="rank 8 in a bank of rank 4"):
        engine.add_model("wide", ICARUS, adapter=wide)
    assert engine.models == before


def test_pinned_adapters_stay_in_their_slots(make_icarus, adapters) -> None:
    engine = make_icarus()
    engine.add_model("third", ICARUS, adapter=adapters["broken"])
    engine.pin("first")
    for name in ("third", "second", "third"):
        generate(engine, [Request(name, prompt(5), GREEDY)])
    assert engine._models.find("first").adapter in engine._models.slots.resident
    assert engine.stats().adapter_loads == 4
    with pytest.raises(MemoryError, match="1 adapters are pinned"):
        engine.pin("third")
    engine.pin("first", pinned=False)
    engine.pin("third")
    with pytest.raises(ValueError, match="base is no adapter"):
        engine.pin("base")


def test_tokens_come_one_step_late_and_several_at_a_time(make_icarus) -> None:
    engine = make_icarus(decode_steps=4)
    engine.submit(Request("first", prompt(5), SamplingParams(max_tokens=9, ignore_eos=True)))
    made = []
    while engine.busy:
        made.append(sum(isinstance(event, TextDelta) for event in engine.step()))
    assert made == [0, 1, 4, 4]


def test_a_long_prompt_holds_up_nobody(make_icarus) -> None:
    engine = make_icarus(step_tokens=12, decode_steps=1)
    short = engine.submit(
        Request("first", prompt(3), SamplingParams(max_tokens=30, ignore_eos=True))
    )
    for _ in range(2):
        engine.step()
    engine.submit(Request("second", prompt(60), GREEDY))
    for _ in range(6):  # of 59 tokens, at most ten a step
        before = engine.stats().prefill_tokens
        events = engine.step()
        assert [event.id for event in events if isinstance(event, TextDelta)] == [short]
        assert engine.stats().prefill_tokens - before <= 11
    finish(engine)


def test_a_fault_of_the_tokenizer_is_one_requests(make_icarus, tokenizer) -> None:
    healthy = tokenizer.decode

    def decode(tokens) -> str:
        if 5 in tokens:
            raise KeyError("no such token")
        return healthy(tokens)

    tokenizer.decode = decode
    engine = make_icarus(tokenizer=tokenizer)
    bad = SamplingParams(max_tokens=NEW, logit_bias={5: 100.0})
    faulty, fine = generate(
        engine,
        [
            Request("first", prompt(4), bad),
            Request("first", prompt(4), GREEDY),
        ],
    )
    assert (faulty.finish_reason, fine.finish_reason) == ("error", "length")
    assert "no such token" in str(faulty.error)


def test_cold_pages_come_back_from_host_memory(make_icarus) -> None:
    prompts = [prompt(40, seed) for seed in range(4)] * 2
    requests = [Request("first", p, GREEDY) for p in prompts]
    roomy = generate(make_icarus(), requests[:4])
    engine = make_icarus(pages=16, host_pages=64)
    outputs = [generate(engine, [request])[0] for request in requests]
    assert [o.tokens for o in outputs] == [o.tokens for o in roomy] * 2
    # the second time around nearly all of each prompt is known: nine full pages of 39 tokens
    assert [o.cached_tokens for o in outputs] == [0] * 4 + [36] * 4
    stats = engine.stats()
    assert stats.restored >= 36
    assert stats.pages.host <= 64
    engine.check()


def test_too_many_tokens_that_end_a_response_are_refused(make_icarus, tokenizer) -> None:
    tokenizer.eos_ids = tuple(range(100, 110))
    engine = make_icarus(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="at 24 tokens at most, .*, got 27"):
        engine.submit(Request("first", [1], SamplingParams(stop_tokens=tuple(range(1, 17)))))
    assert not engine.busy


def test_a_bank_is_as_wide_as_its_adapters_need(adapters) -> None:
    first, second = adapters["first"], adapters["second"]
    assert bank_for([first, second]) == AdapterBank(3, 4, ICARUS_TARGETS)
    assert bank_for([second] * 20) == AdapterBank(9, 2, ICARUS_TARGETS)


def test_rows_of_one_prefill_read_what_others_of_it_write(base, adapters, make_icarus) -> None:
    common = prompt(6)
    prompts = [[*common, *prompt(2, seed)] for seed in range(1, 4)]
    requests = [Request("first", p, GREEDY) for p in prompts]
    alone = [generate(make_icarus(), [request])[0] for request in requests]
    # four rows of eight tokens are one launch
    buckets = Buckets(rows=(8,), tokens=(8, 32), pages=(16,))
    engine = Engine(
        base,
        page_size=4,
        pages=64,
        max_batch=8,
        step_tokens=32,
        bank=AdapterBank(3, 4, ICARUS_TARGETS),
        buckets=buckets,
    )
    engine.add_model("first", ICARUS, adapter=adapters["first"])
    for request in requests:
        engine.submit(request)
    engine.step()
    stats = engine.stats()
    assert (stats.launches, stats.running) == (2, 3)  # one prefill, one decode
    # the first computes seven tokens; four of them are a page that the others find
    assert stats.prefill_tokens == 7 + 3 + 3
    assert [o.tokens for o in finish(engine).values()] == [o.tokens for o in alone]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "must be at least 1, got 0, 64 and 1024"),
        ({"pages": 0}, "must be at least 1, got 4, 0 and 1024"),
        ({"max_waiting": 0}, "must be at least 1, got 4, 64 and 0"),
        ({"host_pages": -1}, "host_pages must be at least 0, got -1"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"decode_steps": 0}, "decode_steps must be at least 1, got 0"),
        ({"name": ""}, "needs a name"),
    ],
    ids=str,
)
def test_sizes_that_are_none_are_refused(make_icarus, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_icarus(**options)


def test_what_has_gone_is_not_kept(make_icarus, adapters) -> None:
    engine = make_icarus(pages=64)
    for i in range(100):
        name = f"version {i}"
        engine.add_model(name, ICARUS, adapter=adapters["first"])
        engine.cancel(engine.submit(Request(name, prompt(5), GREEDY, deadline_s=1e9)))
        engine.remove_model(name)
    assert len(engine._deadlines) <= 64
    stats = engine.stats()
    assert {*stats.models} <= {"base", "first", "second", "(removed)"}
    assert stats.finished == stats.models["(removed)"].finished == {"cancelled": 100}


def test_ids_that_the_engine_gives_are_not_in_use(make_icarus) -> None:
    engine = make_icarus()
    given = [engine.submit(Request("base", prompt(3), GREEDY, id=f"request-{k}")) for k in (1, 2)]
    assert engine.submit(Request("base", prompt(3), GREEDY)) not in given
    finish(engine)
