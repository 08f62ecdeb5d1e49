"""Generation of many texts at once: prompts are read in parts between the steps of the others."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

from qalora_compile.errors import QaloraError
from qalora_compile.runtime.language_model import LanguageModel
from qalora_compile.serving.batch import Batch, joins_texts
from qalora_compile.serving.job import Job

CHUNK = 256
"""Tokens of a prompt that are read between two steps, so that no other text waits long."""

_log = logging.getLogger(__name__)


class Engine:
    """Carries out jobs, in one thread.

    A job begins when one of the rows is free. Its prompt is read in parts. Then it joins the others
    in one batch, or, if the model cannot have one, takes turns with them, token by token.

    Args:
        model: The model.
        rows: The largest number of texts at once.
    """

    def __init__(self, model: LanguageModel, *, rows: int) -> None:
        self.joins = rows > 1 and joins_texts(model)
        """Whether the texts are in one batch."""
        self._rows = rows
        self._waiting: deque[Job] = deque()
        self._reading: Job | None = None
        self._running: list[Job] = []
        self._batch = Batch(model)

    @property
    def idle(self) -> bool:
        """Whether there is no job."""
        return not (self._waiting or self._reading or self._running)

    def add(self, job: Job) -> None:
        """Add a job."""
        self._waiting.append(job)

    def jobs(self) -> Iterator[Job]:
        """All jobs that have not ended."""
        yield from self._running
        yield from [self._reading] if self._reading else []
        yield from self._waiting

    def step(self) -> None:
        """Read a part of a prompt, and the next token of every text.

        An error ends the jobs that were in it, never the engine.
        """
        self._drop_cancelled()
        if self._reading is None and self._waiting and len(self._running) < self._rows:
            self._reading = self._waiting.popleft()
        if self._reading is not None:
            self._guarded([self._reading], self._read_part)
        if self._running:
            self._guarded(list(self._running), self._continue)
        self._drop_cancelled()

    def _guarded(self, jobs: list[Job], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not isinstance(error, QaloraError):
                _log.exception("a step of generation failed")
            for job in jobs:
                if not job.done:
                    job.fail(error)
            if self._reading in jobs:
                self._reading = None

    def _read_part(self) -> None:
        job = self._reading
        assert job is not None, "called for a job that is read"
        part, job.unread = job.unread[:CHUNK], job.unread[CHUNK:]
        logits = job.context.read(part)
        if job.unread:
            return
        self._reading = None
        job.take(logits)
        if job.done:
            return
        if self.joins:
            self._batch.join(job.context)
            job.context.clear()
        self._running.append(job)

    def _continue(self) -> None:
        """Read the last token of every text, and choose the next."""
        if not self.joins:
            for job in self._running:
                job.take(job.context.read(job.unread))
            return
        found = self._batch.read([job.unread[0] for job in self._running])
        for job, logits in zip(self._running, found, strict=True):
            job.take(logits)

    def _drop_cancelled(self) -> None:
        """Remove jobs that have ended, or that nobody waits for."""
        over = {id(job) for job in self.jobs() if job.done or job.cancelled}
        if not over:
            return
        if self._reading is not None and id(self._reading) in over:
            self._reading = None
        self._waiting = deque(job for job in self._waiting if id(job) not in over)
        for row in reversed(range(len(self._running))):
            if id(self._running[row]) in over:
                del self._running[row]
                if self.joins:
                    self._batch.leave(row)
