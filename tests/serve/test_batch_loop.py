"""The batch loop returns every output in order, and gives up cleanly."""

import dataclasses

from jaxcodec.serve.batch_loop import generate, stream
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams, TextDelta


def some_requests(count: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    return [Request("first", [5 + i, 6], sampling) for i in range(count)]


def test_outputs_come_in_the_order_of_requests(make_engine) -> None:
    requests = some_requests(3)
    requests.insert(1, Request("nobody", [1]))
    outputs = generate(make_engine(max_batch=2), requests)
    assert [o.finish_reason for o in outputs] == ["length", "error", "length", "length"]
    assert [o.model for o in outputs] == ["first", "nobody", "first", "first"]


def test_what_finds_no_room_waits(make_engine) -> None:
    engine = make_engine(max_batch=2, max_waiting=3)
    outputs = generate(engine, some_requests(12))
    assert [o.finish_reason for o in outputs] == ["length"] * 12
    assert [o.tokens for o in outputs] == [
        o.tokens for o in generate(make_engine(), some_requests(12))
    ]


def test_what_will_never_find_room_is_refused(make_engine) -> None:
    many = Request("first", [5], SamplingParams(n=4))
    [output] = generate(make_engine(max_batch=2, max_waiting=3), [many])
    assert output.finish_reason == "error"
    assert "n is 4, but the queue holds 3" in str(output.error)


def test_n_outputs_are_those_of_n_requests(make_engine) -> None:
    # the k-th draws as a request with the seed that many higher
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=5, ignore_eos=True)
    together = Request("first", [5, 6], dataclasses.replace(sampling, n=3))
    apart = [Request("first", [5, 6], dataclasses.replace(sampling, seed=7 + k)) for k in range(3)]
    outputs = generate(make_engine(), [together, *some_requests(1)])
    assert [o.index for o in outputs] == [0, 1, 2, 0]
    assert [o.tokens for o in outputs[:3]] == [o.tokens for o in generate(make_engine(), apart)]
    assert len({o.tokens for o in outputs[:3]}) == 3


def test_a_stream_gives_every_token_before_the_end(engine) -> None:
    events = list(stream(engine, some_requests(2)))
    for i in range(2):
        *deltas, end = [event for index, event in events if index == i]
        assert isinstance(end, RequestOutput)
        tokens = [delta.token for delta in deltas if isinstance(delta, TextDelta)]
        assert tuple(tokens) == end.tokens


def test_an_abandoned_stream_leaves_nothing(engine) -> None:
    events = stream(engine, some_requests(2))
    next(events)
    events.close()
    assert not engine.busy
    engine.check()
    assert engine.stats().pages.held == 0


def test_no_requests_are_no_work(engine) -> None:
    assert generate(engine, []) == []
