"""Requests in, outputs out: the plain way to use an engine."""

from collections.abc import Callable, Iterator, Sequence

from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, Request, RequestOutput


def generate(
    engine: Engine,
    requests: Sequence[Request],
    on_text: Callable[[Request, str], None] | None = None,
) -> list[RequestOutput]:
    """Answer all requests; returns their outputs in the same order.

    A request that the engine refuses gets an output with finish_reason "error"; the others go on.

    Args:
      engine: nobody else may step it meanwhile.
      on_text: called with each piece of text as it comes.
    """
    outputs: dict[int, RequestOutput] = {}
    for i, event in stream(engine, requests):
        if isinstance(event, RequestOutput):
            outputs[i] = event
        elif on_text is not None and event.text:
            on_text(requests[i], event.text)
    return [outputs[i] for i in range(len(requests))]


def stream(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Event]]:
    """(index of the request, event) as they come; what is left is cancelled on `close`."""
    index: dict[str, int] = {}
    try:
        for i, request in enumerate(requests):
            try:
                index[engine.submit(request)] = i
            except ValueError as error:
                yield i, _refused(request, i, error)
        while index:
            for event in engine.step():
                if (i := index.get(event.id)) is not None:
                    if isinstance(event, RequestOutput):
                        del index[event.id]
                    yield i, event
    finally:
        for id in index:
            engine.cancel(id)


def _refused(request: Request, i: int, error: ValueError) -> RequestOutput:
    id = request.id if request.id is not None else f"refused-{i}"
    return RequestOutput(id, request.model, "", (), "error", error=str(error))
