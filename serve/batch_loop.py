"""Requests in, outputs out: the plain way to use an engine."""

import collections
import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence

from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, QueueFull, Request, RequestOutput


def generate(
    engine: Engine,
    requests: Sequence[Request],
    on_text: Callable[[Request, str], None] | None = None,
) -> list[RequestOutput]:
    """Answer all requests; returns their outputs in the same order, those of one by `index`.

    A request that the engine refuses gets one output with finish_reason "error"; the others go on.

    Args:
      engine: nobody else may step it meanwhile.
      on_text: called with each piece of text as it comes. It may cancel what is being served; what
        it raises ends all that is left.
    """
    outputs: dict[tuple[int, int], RequestOutput] = {}
    with contextlib.closing(stream(engine, requests)) as events:
        for i, event in events:
            if isinstance(event, RequestOutput):
                outputs[i, event.index] = event
            elif on_text is not None and event.text:
                on_text(requests[i], event.text)
    return [outputs[key] for key in sorted(outputs)]


def stream(engine: Engine, requests: Sequence[Request]) -> Generator[tuple[int, Event]]:
    """(index of the request, event) as they come; what is left is cancelled on `close`.

    What the engine's queue has no room for waits here. The ends of what `close` cancels come with
    the engine's next step; another `stream` passes over them.
    """
    waiting = collections.deque(enumerate(requests))
    places: dict[str, int] = {}
    left: dict[str, int] = {}  # responses to come
    try:
        while waiting or left:
            while waiting:
                i, request = waiting[0]
                try:
                    id = engine.submit(request)
                except QueueFull:
                    break
                except ValueError as error:
                    yield i, _refused(request, i, error)
                else:
                    places[id], left[id] = i, request.sampling.n
                waiting.popleft()
            for event in engine.step():
                if event.id in left:
                    if isinstance(event, RequestOutput):
                        left[event.id] -= 1
                        if not left[event.id]:
                            del left[event.id]
                    yield places[event.id], event
    finally:
        _cancel(engine, left)


def _cancel(engine: Engine, ids: Iterable[str]) -> None:
    """End requests, some of which may have ended."""
    for id in ids:
        # Whatever led here is what the caller is to see: also a fault that broke the engine.
        with contextlib.suppress(Exception):
            engine.cancel(id)


def _refused(request: Request, i: int, error: ValueError) -> RequestOutput:
    id = request.id if request.id is not None else f"refused-{i}"
    return RequestOutput(id, request.model, "", (), "error", error=str(error))
