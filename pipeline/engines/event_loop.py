"""An event loop in a thread of its own -> answers that may be awaited from any other loop. Knows no model."""

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
    """A loop that runs until it is closed; then everything that still waits for it fails with EngineDead."""

    def __init__(self, name: str) -> None:
        self._over = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def answer(self, doing: Coroutine[Any, Any, Value]) -> Value:
        """Return what comes of this in the loop; from any other loop."""
        if self._over:
            doing.close()
            raise EngineDead("the engine was closed")
        return await asyncio.wrap_future(self.begin(self._closable(doing)))

    def begin(self, doing: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Return what will come of this in the loop."""
        return asyncio.run_coroutine_threadsafe(doing, self._loop)

    def wait(self, doing: Coroutine[Any, Any, Value]) -> Value:
        """Return what comes of this in the loop; waits for it."""
        return self.begin(doing).result()

    def close(self, last: Callable[[], object] = lambda: None) -> None:
        """Cancel what is under way, do the last thing in the loop, and end it."""
        if self._over:
            return
        self._over = True
        self.wait(self._shut(last))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _closable(self, answer: Awaitable[Value]) -> Value:
        """Tell whoever waits for an answer when the engine is closed."""
        try:
            return await answer
        except asyncio.CancelledError:
            if self._over:
                raise EngineDead("the engine was closed") from None
            raise

    async def _shut(self, last: Callable[[], object]) -> None:
        """End everything that is under way in this loop."""
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if isawaitable(ended := last()):
            await ended
        await self._loop.shutdown_default_executor()
