"""Whatever is raised in a step, those that follow answer as if nothing had happened."""

import collections
import itertools
import random
from collections.abc import Callable

import jax
import pytest

from jaxcodec.models.scheme import CONVENTIONAL, ICARUS
from jaxcodec.serve.answers import Answer
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.host_pages import HostPages
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams
from jaxcodec.serve.runner import Launch, Runner
from jaxcodec.serve.scheduler import Scheduler
from jaxcodec.serve.served_models import ServedModels

WAYS = (
    {"max_tokens": 9, "ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "max_tokens": 12, "n": 2, "logprobs": 1},
    {"repetition_penalty": 1.2, "max_tokens": 12},
    {"max_tokens": 14, "ignore_eos": True, "stop": ("e", "a", "0", " ")},
)
# An engine that has to push out, to evict and to reload.
TIGHT = {"pages": 20, "host_pages": 10, "decode_steps": 2}
# Every place where an interrupt may come: before or after it has done its work.
PLACES = (
    (Runner, "run"),
    (Runner, "_prefill"),
    (Runner, "_decode"),
    (HostPages, "copy"),
    (ServedModels, "load"),
    (Launch, "fetch"),
    (Answer, "take"),
    (Answer, "output"),
    (Scheduler, "plan"),
    (Scheduler, "decoded"),
    (Scheduler, "remove"),
    (ServedModels, "release"),
)


def some_requests() -> list[Request]:
    rng = random.Random(1)
    draw = lambda count: [rng.randrange(1, 256) for _ in range(count)]
    begin = draw(12)
    names = ("base", "first", "second", "own", "module", "adapted")
    return [
        Request(name, [*begin, *draw(rng.randrange(1, 20))], SamplingParams(**way))
        for name, way in zip(names * 2, itertools.cycle(WAYS), strict=False)
    ]


def interrupt(monkeypatch, owner: type, name: str, calls: set[int], after: bool) -> list[int]:
    """Raise KeyboardInterrupt in some calls of a method; returns where those that came are noted.

    Args:
      after: its work is done by then.
    """
    number, raised = itertools.count(), []
    method: Callable = getattr(owner, name)

    def interrupted(*args, **kwargs):
        call = next(number)
        if call in calls and not after:
            raised.append(call)
            raise KeyboardInterrupt
        result = method(*args, **kwargs)
        if call in calls:
            raised.append(call)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    return raised


def run(engine: Engine, requests: list[Request]) -> list[RequestOutput]:
    """Outputs in order, stepping on after every interrupt; what was streamed is compared."""
    ids = [engine.submit(request) for request in requests]
    events = []
    for _ in range(1000):
        if not engine.busy:
            break
        try:
            events += engine.step()
        except KeyboardInterrupt:
            engine.check()
    engine.check()
    engine._scheduler.check_idle()
    outputs = [e for e in events if isinstance(e, RequestOutput)]
    assert len({(o.id, o.index) for o in outputs}) == len(outputs)
    streamed = collections.defaultdict(list)
    for event in events:
        if not isinstance(event, RequestOutput):
            streamed[event.id, event.index].append(event)
    for output in outputs:
        pieces = streamed[output.id, output.index]
        assert tuple(piece.token for piece in pieces) == output.tokens
        assert "".join(piece.text for piece in pieces) == output.text
    return sorted(outputs, key=lambda o: (ids.index(o.id), o.index))


def said(outputs: list[RequestOutput]) -> list[tuple]:
    return [(o.model, o.tokens, o.text, o.finish_reason, o.error) for o in outputs]


@pytest.fixture(scope="module")
def undisturbed(make_engine) -> list[tuple]:
    """What `some_requests` get when nothing is raised."""
    from tests.serve.conftest import ByteTokenizer

    return said(run(make_engine(**TIGHT, tokenizer=ByteTokenizer()), some_requests()))


@pytest.fixture
def tight(make_engine, tokenizer) -> Engine:
    return make_engine(**TIGHT, tokenizer=tokenizer)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda v: getattr(v, "__name__", v))
def test_an_interrupt_anywhere_changes_no_answer(
    tight, undisturbed, monkeypatch, owner, name, after
) -> None:
    raised = interrupt(monkeypatch, owner, name, {2, 3, 9, 14}, after)
    assert said(run(tight, some_requests())) == undisturbed
    assert raised


def test_arrays_that_a_failed_launch_took_are_made_anew(tight, undisturbed, monkeypatch) -> None:
    launch, number = Runner._decode, itertools.count()

    def failing(runner, *args):
        if next(number) == 4:
            for array in jax.tree.leaves((runner._cache, runner._state)):
                array.delete()
            weights = runner._models.weights("")
            for i in weights._bank:
                weights.leaves[i].delete()
            raise RuntimeError("out of memory")
        return launch(runner, *args)

    monkeypatch.setattr(Runner, "_decode", failing)
    ids = [tight.submit(request) for request in some_requests()]
    with pytest.raises(RuntimeError, match="out of memory"):
        collections.deque(tight.step() for _ in range(99))
    tight.check()
    assert tight.stats().pages.free == 20
    for id in ids:
        if id in tight._active:
            tight.cancel(id)
    tight.step()
    assert said(run(tight, some_requests())) == undisturbed


def test_what_is_raised_in_generate_leaves_an_engine_that_serves(tight, monkeypatch) -> None:
    request = Request("first", [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True), id="same")
    (expected,) = generate(tight, [request])
    with monkeypatch.context() as patch:
        interrupt(patch, Launch, "fetch", {1}, after=False)
        with pytest.raises(KeyboardInterrupt):
            generate(tight, [request])
    (output,) = generate(tight, [request])
    assert output.tokens == expected.tokens
    assert not tight.busy


def test_an_engine_that_cannot_begin_anew_says_so(tight, monkeypatch) -> None:
    tight.submit(some_requests()[0])

    def fails(*_) -> None:
        raise OSError("the device is gone")

    monkeypatch.setattr(Runner, "run", fails)
    monkeypatch.setattr(Runner, "restart", fails)
    with pytest.raises(OSError, match="the device is gone"):
        tight.step()
    for use in (tight.step, lambda: tight.submit(some_requests()[1])):
        with pytest.raises(RuntimeError, match="could not begin anew after OSError: make another"):
            use()


def test_models_come_and_go_after_a_fault(tight, adapters, monkeypatch) -> None:
    request = Request("first", [1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True))
    tight.pin("first")
    (expected,) = generate(tight, [request])
    tight.submit(request)
    with monkeypatch.context() as patch:
        interrupt(patch, Runner, "run", {0}, after=True)
        with pytest.raises(KeyboardInterrupt):
            tight.step()
    tight.remove_model("own")
    tight.add_model("own", CONVENTIONAL, adapter=adapters["writing"])
    tight.add_model("new", ICARUS, adapter=adapters["second"])
    (output,) = [e for _ in range(20) for e in tight.step() if isinstance(e, RequestOutput)]
    assert output.tokens == expected.tokens
    assert not tight.busy
