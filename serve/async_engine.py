"""An engine for coroutines: each follows its own request, and one thread steps for all of them."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, Request, RequestOutput


class AsyncEngine:
    """Serves an engine while its `async with` block lasts.

    All that is done to the engine is done in one thread, one thing after the other, so that the
    engine needs no lock and the event loop never waits for the device.

    Args:
      engine: nobody else may use it meanwhile, but through `call`.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._queues: dict[str, asyncio.Queue[Event | Exception]] = {}
        self._numbers = itertools.count(1)
        self._work = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._fault: Exception | None = None
        self._closing = False

    async def __aenter__(self) -> "AsyncEngine":
        """Begin to serve."""
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is left, and stop."""
        assert self._driver is not None
        self._closing = True
        self._work.set()
        await self._driver
        for id, queue in self._queues.items():
            for output in await self.call(self._cancel, id):
                queue.put_nowait(output)
        self._thread.shutdown()

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """The events of one request; leaving early (`aclose`, a cancelled task) cancels it.

        Raises:
          ValueError, QueueFull: as `Engine.submit`.
        """
        id = request.id if request.id is not None else f"async-{next(self._numbers)}"
        if id in self._queues:
            raise ValueError(f"A request with the id {id!r} is being served.")
        if self._fault is not None:
            raise self._fault
        queue = self._queues[id] = asyncio.Queue()
        left = request.sampling.n
        try:
            await self.call(self._engine.submit, dataclasses.replace(request, id=id))
            self._work.set()
            while left:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, RequestOutput)
                yield event
        finally:
            del self._queues[id]
            if left and not self._closing:
                await self.call(self._cancel, id)

    async def call[T](self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call something of the engine, such as `add_model` or `stats`, between two steps."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def _drive(self) -> None:
        try:
            while not self._closing:
                await self._work.wait()
                self._work.clear()
                busy = True
                while busy and not self._closing:
                    events, busy = await self.call(self._step)
                    for event in events:
                        if queue := self._queues.get(event.id):
                            queue.put_nowait(event)
        except Exception as fault:
            self._fault = fault  # the engine's own: nobody can be served any more
            for queue in self._queues.values():
                queue.put_nowait(fault)

    def _step(self) -> tuple[list[Event], bool]:
        return self._engine.step(), self._engine.busy

    def _cancel(self, id: str) -> list[RequestOutput]:
        try:
            return self._engine.cancel(id)
        except ValueError:  # it was refused, or has ended in the step that ran meanwhile
            return []
