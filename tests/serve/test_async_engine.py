"""Coroutines get the events of their own requests, whatever the others do."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from jaxcodec.models.scheme import ICARUS
from jaxcodec.serve import served_models
from jaxcodec.serve.async_engine import AsyncEngine
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, QueueFull, Request, RequestOutput, SamplingParams

LONG = SamplingParams(max_tokens=30, ignore_eos=True)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """A hang is a failure."""

    async def limited() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(limited())


def request(i: int, max_tokens: int = 4, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    return Request(("first", "module", "own")[i % 3], [5 + i, 6, 7], params)


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def test_each_gets_its_own_events(engine: Engine, make_engine) -> None:
    requests = [request(i, 3 + i, temperature=0.5 * (i % 2), seed=i) for i in range(6)]

    async def serve() -> list[list[Event]]:
        async with AsyncEngine(engine) as served:
            return await asyncio.gather(*(collect(served.stream(r)) for r in requests))

    expected = generate(make_engine(), requests)
    for events, alone in zip(run(serve()), expected, strict=True):
        *deltas, end = events
        assert isinstance(end, RequestOutput)
        assert end.tokens == alone.tokens == tuple(delta.token for delta in deltas)


def test_a_request_may_come_while_others_run_or_after(engine: Engine) -> None:
    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            running = served.stream(request(0, 30))
            await anext(running)
            late = await collect(served.stream(request(1)))
            assert isinstance(late[-1], RequestOutput)
            rest = await collect(running)
            assert len(rest[-1].tokens) == 30
            await asyncio.sleep(0.01)  # the engine is idle, and wakes again
            assert len(await collect(served.stream(request(2)))) == 5

    run(serve())


@pytest.mark.parametrize("how", ["aclose", "task"])
def test_leaving_early_cancels(engine: Engine, how: str) -> None:
    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            left = served.stream(Request("first", [5], LONG))
            await anext(left)
            if how == "aclose":
                await left.aclose()
            else:
                task = asyncio.create_task(collect(left))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            stats = await served.call(engine.stats)
            assert (stats.waiting, stats.running) == (0, 0)
            assert stats.finished == {"cancelled": 1}

    run(serve())
    engine.check()
    assert not engine.busy


def test_a_task_cancelled_before_it_began_leaves_nothing(engine: Engine) -> None:
    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            tasks = [asyncio.create_task(collect(served.stream(request(i)))) for i in range(3)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not engine.busy

    run(serve())


def test_the_end_of_the_block_ends_the_rest(engine: Engine) -> None:
    async def serve() -> list[Event]:
        async with AsyncEngine(engine) as served:
            task = asyncio.create_task(collect(served.stream(Request("first", [5], LONG))))
            while not engine.busy:
                await asyncio.sleep(0.001)
        return await task

    assert run(serve())[-1].finish_reason == "cancelled"
    assert not engine.busy


def test_a_stream_may_outlive_the_block(engine: Engine) -> None:
    async def serve() -> list[Event]:
        async with AsyncEngine(engine) as served:
            running, abandoned = (served.stream(Request("first", [5], LONG)) for _ in range(2))
            await anext(running)
            await anext(abandoned)
        await abandoned.aclose()
        return await collect(running)

    assert run(serve())[-1].finish_reason == "cancelled"
    assert not engine.busy


def test_what_the_engine_refuses_is_raised_to_who_asked(make_engine) -> None:
    engine = make_engine(max_batch=1, max_waiting=1)

    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            with pytest.raises(ValueError, match="No model is served as 'nobody'"):
                await collect(served.stream(Request("nobody", [1])))
            same = Request("first", [5], LONG, id="same")
            running = served.stream(same)
            await anext(running)
            with pytest.raises(ValueError, match="'same' is being served"):
                await collect(served.stream(same))
            assert len((await collect(running))[-1].tokens) == 30
            # all three come before the next step
            streams = (collect(served.stream(request(i))) for i in range(3))
            ended = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(result) for result in ended] == [list, QueueFull, QueueFull]

    run(serve())


def test_n_responses_come_through_one_stream(engine: Engine) -> None:
    async def serve() -> list[Event]:
        async with AsyncEngine(engine) as served:
            return await collect(served.stream(request(0, n=3, temperature=1.0, seed=1)))

    ends = [event for event in run(serve()) if isinstance(event, RequestOutput)]
    assert sorted(end.index for end in ends) == [0, 1, 2]


def test_models_come_and_go_while_others_are_served(engine: Engine, adapters, monkeypatch) -> None:
    hash_, streamed = served_models.adapted_namespace, threading.Event()

    def slow(*args) -> str:
        assert streamed.wait(30), "nobody is served meanwhile"
        return hash_(*args)

    monkeypatch.setattr(served_models, "adapted_namespace", slow)

    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            running = served.stream(Request("first", [5], LONG))
            added = asyncio.create_task(served.add_model("new", ICARUS, adapter=adapters["second"]))
            for _ in range(20):
                await anext(running)
            streamed.set()
            await added
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            assert (await collect(served.stream(Request("new", [5], sampling))))[-1].model == "new"
            assert len((await collect(running))[-1].tokens) == 30

    run(serve())


def test_a_fault_of_the_engine_reaches_everybody(engine: Engine, monkeypatch) -> None:
    def fail() -> list[Event]:
        raise RuntimeError("the device is gone")

    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            monkeypatch.setattr(engine, "step", fail)
            for i in range(2):
                with pytest.raises(RuntimeError, match="the device is gone"):
                    await collect(served.stream(request(i)))

    run(serve())


def test_many_live_streams_end_with_the_block(engine: Engine) -> None:
    async def serve() -> list[list[Event]]:
        async with AsyncEngine(engine) as served:
            tasks = [asyncio.create_task(collect(served.stream(request(i, 30)))) for i in range(5)]
            late = [served.stream(request(i, 30)) for i in range(3)]
            for events in late:
                await anext(events)
        await asyncio.gather(*(events.aclose() for events in late))
        return await asyncio.gather(*tasks)

    assert {events[-1].finish_reason for events in run(serve())} <= {"cancelled", "length"}
    assert not engine.busy
    engine.check()


def test_a_request_is_cancelled_by_its_id(engine: Engine) -> None:
    async def serve() -> list[Event]:
        async with AsyncEngine(engine) as served:
            asked = Request("first", [5], dataclasses.replace(LONG, n=2), id="mine")
            running = served.stream(asked)
            await anext(running)
            await served.cancel("mine")
            rest = await collect(running)
            with pytest.raises(ValueError, match="No request with the id 'mine'"):
                await served.cancel("mine")
            assert len(await collect(served.stream(dataclasses.replace(asked, sampling=LONG)))) > 1
            return rest

    ends = [event for event in run(serve()) if isinstance(event, RequestOutput)]
    assert [end.finish_reason for end in ends] == ["cancelled"] * 2
    assert not engine.busy


def test_an_id_is_free_once_its_stream_was_left(engine: Engine) -> None:
    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            for _ in range(3):
                running = served.stream(Request("first", [5], LONG, id="same"))
                await anext(running)
                await running.aclose()
            last = await collect(served.stream(Request("first", [5], LONG, id="same")))
            assert last[-1].finish_reason == "length"

    run(serve())


def test_outside_its_block_nothing_is_served(engine: Engine) -> None:
    async def serve() -> None:
        served = AsyncEngine(engine)
        with pytest.raises(RuntimeError, match="inside its `async with` block"):
            await collect(served.stream(request(0)))
        async with served:
            assert len(await collect(served.stream(request(0)))) == 5
        with pytest.raises(RuntimeError, match="inside its `async with` block"):
            await collect(served.stream(request(0)))
        with pytest.raises(RuntimeError, match="make another"):
            await served.__aenter__()

    run(serve())
    assert not engine.busy


def test_what_is_submitted_by_a_call_is_served_too(engine: Engine) -> None:
    async def serve() -> None:
        async with AsyncEngine(engine) as served:
            await served.call(engine.submit, request(0))
            while (await served.call(engine.stats)).finished != {"length": 1}:
                await asyncio.sleep(0.01)

    run(serve())
    assert not engine.busy
