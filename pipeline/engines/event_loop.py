"""Event loop in a thread of its own: runs an engine's coroutines, whose results can be awaited from any other loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from inspect import isawaitable
from threading import Thread
from typing import Any, TypeVar

from pipeline.errors import EngineDead

Value = TypeVar("Value")


class EventLoopThread:
    """An event loop that runs until `close`; coroutines that are still running then fail with EngineDead."""

    def __init__(self, name: str) -> None:
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run a coroutine in the loop and return its result; called from any other loop. Raises EngineDead after `close`."""
        if self._closed:
            coroutine.close()
            raise EngineDead("the engine was closed")
        return await asyncio.wrap_future(self.submit(self._fail_on_close(coroutine)))

    def submit(self, coroutine: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Start a coroutine in the loop and return the future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run_blocking(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run a coroutine in the loop, block this thread until it ends, and return its result."""
        return self.submit(coroutine).result()

    def close(self, on_close: Callable[[], object] = lambda: None) -> None:
        """Cancel all running coroutines, call `on_close` in the loop (awaiting what it returns), and end the loop and its thread."""
        if self._closed:
            return
        self._closed = True
        self.run_blocking(self._shut_down(on_close))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _fail_on_close(self, awaitable: Awaitable[Value]) -> Value:
        """Await; a cancellation by `close` becomes EngineDead, one by the caller stays a cancellation."""
        try:
            return await awaitable
        except asyncio.CancelledError:
            if self._closed:
                raise EngineDead("the engine was closed") from None
            raise

    async def _shut_down(self, on_close: Callable[[], object]) -> None:
        """Cancel every other task of this loop, call `on_close`, and end the loop's executor."""
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if isawaitable(result := on_close()):
            await result
        await self._loop.shutdown_default_executor()
