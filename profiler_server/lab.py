"""What the routes of one server process share: settings, the database, and the bell that wakes waiting requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from lut_db.storage import Database
from profiler_server.settings import Settings


class Bell:
    """Wakes whoever waits in this process when rows, queue or leases changed; silent once it is closed.

    The database is the truth: a bell that was missed, or rung in another process, costs a waiting request one
    interval of polling and nothing else.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self.closed = False

    def attach(self) -> None:
        """Binds the bell to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def ring(self) -> None:
        """Wakes every waiter. Safe to call from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._swing)

    def close(self) -> None:
        """Wakes every waiter for good: the server is going down."""
        self.closed = True
        self.ring()

    def _swing(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    def listen(self) -> asyncio.Event:
        """The next stroke. Taken before a look at the database, no change between look and wait is missed."""
        return self._event


class Lab:
    """Settings, database and bell of a server."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.database = Database(settings.database)
        self.bell = Bell()

    async def until(self, check: Callable[[], bool], wait_s: float, request: Request) -> bool:
        """Waits until `check` holds, up to `wait_s`. `check` runs in the thread pool, in transactions of its own.

        Between looks nothing is held: no connection, no thread. Ends early, False, when the client is gone or the
        server goes down.
        """
        end = time.monotonic() + wait_s
        while True:
            stroke = self.bell.listen()
            if await run_in_threadpool(check):
                return True
            left_s = end - time.monotonic()
            if left_s <= 0 or self.bell.closed or await request.is_disconnected():
                return False
            await self.pause(stroke, min(left_s, self.settings.poll_s))

    async def pause(self, stroke: asyncio.Event, most_s: float) -> None:
        """Waits for a stroke of the bell, up to `most_s`."""
        if self.bell.closed:
            return
        try:
            async with asyncio.timeout(most_s):
                await stroke.wait()
        except TimeoutError:
            return


def get_lab(request: Request) -> Lab:
    """The lab of the application that serves this request."""
    lab = request.app.state.lab
    assert isinstance(lab, Lab)
    return lab


LabHere = Annotated[Lab, Depends(get_lab)]
