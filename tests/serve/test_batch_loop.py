"""The batch loop returns every output in order, and gives up cleanly."""

import dataclasses

import pytest

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
    engine.check()
    assert engine.stats().pages.held == 0
    ends = engine.step()
    assert [end.finish_reason for end in ends] == ["cancelled"] * 2
    assert not engine.busy


def test_what_on_text_cancels_ends(make_engine, tokenizer) -> None:
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, logit_bias={65: 100.0})
    requests = [Request("first", "Once", sampling, id=id) for id in ("left", "kept")]

    def on_text(request: Request, text: str) -> None:
        assert text == "A"
        told.append(request.id)
        if request.id == "left":
            engine.cancel("left")

    told: list[str | None] = []
    engine = make_engine(tokenizer=tokenizer, decode_steps=1)
    left, kept = generate(engine, requests, on_text)
    assert (left.finish_reason, kept.finish_reason) == ("cancelled", "length")
    assert left.text == "A"
    assert told.count("kept") == 20
    assert not engine.busy


def test_what_on_text_raises_is_seen_and_the_ids_are_free_again(make_engine, tokenizer) -> None:
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = [Request("first", "Once", sampling, id=id) for id in ("a", "b")]

    def fail(request: Request, text: str) -> None:
        engine.cancel("b")
        raise KeyError("mine")

    engine = make_engine(tokenizer=tokenizer)
    with pytest.raises(KeyError, match="mine"):
        generate(engine, requests, fail)
    assert engine.stats().pages.held == 0
    assert [o.finish_reason for o in generate(engine, requests)] == ["length"] * 2
    assert not engine.busy


def test_a_fault_of_the_engine_is_not_hidden(engine, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "step", fail)
    monkeypatch.setattr(engine, "cancel", lambda id: engine.submit(None))
    with pytest.raises(RuntimeError, match="the device is gone"):
        generate(engine, some_requests(2))


def test_a_tokenizer_that_fails_on_a_prompt_fails_one_request(make_engine, tokenizer) -> None:
    def encode(text: str) -> list[int]:
        raise KeyError(text)

    tokenizer.encode = encode
    requests = [Request("first", "Once"), Request("first", [True, 1]), *some_requests(1)]
    outputs = generate(make_engine(tokenizer=tokenizer), requests)
    assert [o.finish_reason for o in outputs] == ["error", "error", "length"]
    assert "does not take the prompt: KeyError" in str(outputs[0].error)
    assert "whole numbers in [0, 256), the model's vocabulary, got True" in str(outputs[1].error)


def test_no_requests_are_no_work(engine) -> None:
    assert generate(engine, []) == []
