"""An engine for coroutines: each follows its own request, and one thread steps for all of them."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxcodec.models.lora import Adapter
from jaxcodec.models.scheme import Scheme
from jaxcodec.models.transformer import Model
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Event, Request, RequestOutput


class AsyncEngine:
    """Serves an engine while its `async with` block lasts, once.

    All that is done to the engine is done in one thread, one thing after the other, so that the
    engine needs no lock and the event loop never waits for the device. What only reads it and takes
    time, to prepare a model, is done in another.

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
        """Begin to serve.

        Raises:
          RuntimeError: it has served already.
        """
        if self._driver is not None:
            raise RuntimeError("An AsyncEngine serves for one `async with` block: make another.")
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is left, and stop."""
        assert self._driver is not None
        self._closing = True
        self._work.set()
        try:
            await self._driver
            self._give_out(await self._do(self._end, tuple(self._queues)))
        finally:
            self._thread.shutdown(wait=False)

    async def stream(self, request: Request) -> AsyncGenerator[Event]:
        """The events of one request; leaving early (`aclose`, a cancelled task) cancels it.

        Raises:
          ValueError, QueueFull: as `Engine.submit`.
          RuntimeError: outside the `async with` block.
          Exception: what a step of the engine has raised; it serves nobody any more.
        """
        if self._driver is None or self._closing:
            raise RuntimeError("An AsyncEngine serves inside its `async with` block only.")
        id = request.id if request.id is not None else f"async-{next(self._numbers)}"
        if id in self._queues:
            raise ValueError(f"A request with the id {id!r} is being served.")
        if self._fault is not None:
            raise self._fault
        queue = self._queues[id] = asyncio.Queue()
        left = request.sampling.n
        try:
            await self.call(self._engine.submit, dataclasses.replace(request, id=id))
            while left:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                left -= isinstance(event, RequestOutput)
                yield event
        finally:
            try:
                if left and not self._closing:
                    await self._withdraw(id, queue, left)
            finally:
                del self._queues[id]

    async def cancel(self, id: str) -> None:
        """End a request; its stream gets the ends of its responses, and is over.

        Raises:
          ValueError: no request of that id is being served.
        """
        await self.call(self._engine.cancel, id)

    async def add_model(
        self,
        name: str,
        scheme: Scheme,
        *,
        adapter: Adapter | None = None,
        model: Model | None = None,
    ) -> None:
        """As `Engine.add_model`; others are served while the weights are checked and hashed."""
        prepare = self._engine.prepare_model
        prepared = await asyncio.to_thread(prepare, name, scheme, adapter=adapter, model=model)
        await self.call(self._engine.add_prepared, prepared)

    async def call[T](self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call something of the engine, such as `add_model` or `stats`, between two steps.

        The events of what it submits go to nobody: that is what `stream` is for.
        """
        try:
            return await self._do(function, *args, **kwargs)
        finally:
            self._work.set()

    def _do[T](self, function: Callable[..., T], *args: Any, **kwargs: Any) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def _drive(self) -> None:
        try:
            while not self._closing:
                await self._work.wait()
                self._work.clear()
                busy = True
                while busy and not self._closing:
                    events, busy = await self._do(self._step)
                    self._give_out(events)
        except Exception as fault:
            self._fault = fault  # the engine's own: nobody can be served any more
            for queue in self._queues.values():
                queue.put_nowait(fault)

    async def _withdraw(self, id: str, queue: asyncio.Queue[Event | Exception], left: int) -> None:
        """Cancel a request that nobody follows, and wait until its id is free."""
        # A second cancellation of the task must not take this out of the thread's queue.
        cancelled = await asyncio.shield(self._do(self._cancel, id))
        self._work.set()
        while cancelled and left and self._fault is None:
            event = await queue.get()
            if isinstance(event, Exception):
                return
            left -= isinstance(event, RequestOutput)

    def _give_out(self, events: Iterable[Event]) -> None:
        for event in events:
            if queue := self._queues.get(event.id):
                queue.put_nowait(event)

    # In the thread

    def _step(self) -> tuple[list[Event], bool]:
        events = self._engine.step() if self._engine.busy else []
        return events, self._engine.busy

    def _cancel(self, id: str) -> bool:
        """Whether there was anything to cancel."""
        try:
            self._engine.cancel(id)
        except ValueError:  # it was refused, or has ended in the step that ran meanwhile
            return False
        return True

    def _end(self, ids: Iterable[str]) -> list[Event]:
        """Cancel all of these; returns their ends."""
        # After a fault nobody waits for ends, and the fault is what everybody has been told.
        with contextlib.suppress(Exception) if self._fault else contextlib.nullcontext():
            for id in ids:
                self._cancel(id)
            return self._step()[0]
        return []
