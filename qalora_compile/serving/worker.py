"""The one thread that owns a model, and its queue."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

from qalora_compile.serving.api_errors import ApiError
from qalora_compile.serving.engine import Engine
from qalora_compile.serving.job import Job, Order, Piece
from qalora_compile.serving.text_model import TextModel

T = TypeVar("T")
_STOPPED = "the server is being stopped"


def overloaded(most: int) -> ApiError:
    """The error for a full queue."""
    return ApiError(
        429,
        f"the server has {most} texts to work on already: try again later",
        kind="rate_limit_error",
        code="queue_full",
    )


class Worker:
    """Runs work in one thread, at most so much of it at a time.

    Args:
        most: The largest number of texts in work and in the queue.
        engine: Generates texts between other work; None if there are none to generate.
    """

    def __init__(self, most: int, engine: Engine | None = None) -> None:
        self._most, self._engine = most, engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock, self._open = threading.Lock(), 0
        self._thread = threading.Thread(target=self._run, name="qalora-model", daemon=True)

    @property
    def open(self) -> int:
        """How many texts are in work or wait."""
        return self._open

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; texts that are not finished end with an error."""
        self._inbox.put(None)
        self._thread.join()

    async def call(self, work: Callable[[], T], *, texts: int) -> T:
        """The result of a function that the thread runs.

        Raises:
            ApiError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(method: Callable[[Any], None], value: Any) -> None:
            if not answer.done():
                method(value)

        def run() -> None:
            if answer.cancelled():
                return
            try:
                loop.call_soon_threadsafe(settle, answer.set_result, work())
            except Exception as error:
                loop.call_soon_threadsafe(settle, answer.set_exception, error)

        self._claim(texts)
        try:
            self._inbox.put(run)
            return await answer
        finally:
            self._release(texts)

    async def generate(
        self, model: TextModel, orders: Sequence[Order]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of several texts, each with the number of its order, as they are generated.

        If the iterator is closed before its end, the texts are no longer generated.

        Raises:
            ApiError: the queue is full.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._claim(len(orders))
        jobs: list[Job] = []
        try:
            for index, order in enumerate(orders):

                def send(piece: Piece, index: int = index) -> None:
                    loop.call_soon_threadsafe(found.put_nowait, (index, piece))

                jobs.append(Job(model, order, send))
            self._inbox.put(lambda: self._add(jobs))
            left = len(jobs)
            while left:
                index, piece = await found.get()
                left -= piece.last
                yield index, piece
        finally:
            for job in jobs:
                job.cancelled = True
            self._release(len(orders))

    def _add(self, jobs: list[Job]) -> None:
        assert self._engine is not None, "the server of an encoder has no such route"
        for job in jobs:
            self._engine.add(job)

    def _claim(self, texts: int) -> None:
        with self._lock:
            if self._open + texts > self._most:
                raise overloaded(self._most)
            self._open += texts

    def _release(self, texts: int) -> None:
        with self._lock:
            self._open -= texts

    def _run(self) -> None:
        """Take work while there is any, and let the engine make a step between."""
        engine = self._engine
        while True:
            busy = engine is not None and not engine.idle
            try:
                work = self._inbox.get(block=not busy)
            except queue.Empty:
                work = _nothing
            if work is None:
                break
            work()
            if engine is not None:
                engine.step()
        for job in list(engine.jobs()) if engine is not None else ():
            job.fail(ApiError(503, _STOPPED, kind="server_error"))


def _nothing() -> None:
    """Stands for no work."""
