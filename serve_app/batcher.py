"""What waits while the encoder is busy becomes its next batch.

No timer and no fixed batch size: an idle encoder takes a request at once, a busy one finds all
that has gathered. The event loop only moves references; one worker thread runs the model.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from mtl_core.answers import Features
from mtl_core.predictor import chunks
from mtl_core.windows import Tokenized


class Overloaded(RuntimeError):
    """So much waits already that this request would wait too long."""


@dataclass(eq=False)
class Job:
    """The texts of one request, or a part of them that fits a batch."""

    items: Sequence[Tokenized]
    tasks: tuple[str, ...]
    want_states: bool
    all_tags: bool
    future: asyncio.Future[Any]
    tokens: int
    model: Any
    """The version the texts were tokenised for; a batch holds one version only."""
    queued: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Batch:
    """Jobs that went through the encoder together."""

    jobs: list[Job]
    features: Features
    started: float
    seconds: float


class Batcher:
    """A bounded queue of jobs and the one thread that empties it.

    Args:
        encode: runs in the worker thread: jobs → features of their texts, in order.
        done: called on the event loop with each finished batch; settles the jobs' futures.
        max_waiting: texts that may be unanswered at a time.
        batch_tokens: sub-words in a batch, unless a single job has more.
        max_waiting_tokens: unanswered sub-words with which no more is taken; the texts that reach
            it may go beyond it.
    """

    def __init__(
        self,
        encode: Callable[[list[Job]], Features],
        done: Callable[[Batch], None],
        max_waiting: int,
        batch_tokens: int,
        max_waiting_tokens: int,
    ) -> None:
        self.encode = encode
        self.done = done
        self.max_waiting = max_waiting
        self.batch_tokens = batch_tokens
        self.max_waiting_tokens = max_waiting_tokens
        self.queue: deque[Job] = deque()
        self.unanswered = self.unanswered_tokens = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.task: asyncio.Task[None] | None = None
        self.last_failed = False
        """Whether the last batch raised an error: its texts may be at fault, or the encoder."""

    async def submit(
        self,
        items: Sequence[Tokenized],
        tasks: tuple[str, ...],
        want_states: bool,
        all_tags: bool,
        model: Any,
    ) -> list[Any]:
        """Queue texts and wait for what `done` makes of them, one result a part.

        Raises:
            Overloaded: the queue is full.
        """
        self.check_room(len(items))
        size = sum(item.num_tokens for item in items)
        loop = asyncio.get_running_loop()
        jobs = [
            Job(part, tasks, want_states, all_tags, loop.create_future(), tokens, model)
            for part, tokens in chunks(items, self.batch_tokens)
        ]
        self.unanswered += len(items)
        self.unanswered_tokens += size
        self.queue.extend(jobs)
        if self.task is None:
            # Of no request: Serve cancels all calls of the one in whose context they were made.
            self.task = loop.create_task(self._work(), context=Context())
        try:
            return [await job.future for job in jobs]
        finally:
            # Also when the client has gone: its jobs leave the queue, or are dropped on return.
            self.unanswered -= len(items)
            self.unanswered_tokens -= size
            for job in jobs:
                job.future.cancel()

    @contextmanager
    def held(self, texts: int) -> Iterator[None]:
        """Count texts as waiting while they are tokenised, which takes time and memory too.

        Raises:
            Overloaded: the queue is full.
        """
        self.check_room(texts)
        self.unanswered += texts
        try:
            yield
        finally:
            self.unanswered -= texts

    def check_room(self, texts: int) -> None:
        """Raise Overloaded unless so many more may wait; an idle replica takes any number.

        Of tokens only those that wait count: a long request is not put off until all is idle.
        """
        if self.unanswered and self.unanswered + texts > self.max_waiting:
            waiting = f"{self.unanswered} texts are waiting, of at most {self.max_waiting}"
        elif self.unanswered_tokens >= self.max_waiting_tokens:
            waiting = f"{self.unanswered_tokens} tokens are waiting, of {self.max_waiting_tokens}"
        else:
            return
        raise Overloaded(f"{waiting}; try again later")

    async def _work(self) -> None:
        """Run batches until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while jobs := self._take():
                started = time.perf_counter()
                try:
                    features = await loop.run_in_executor(self.thread, self.encode, jobs)
                    seconds = time.perf_counter() - started
                    self.done(Batch(jobs, features, started, seconds))
                    self.last_failed = False
                except Exception as error:
                    self.last_failed = True
                    fail(jobs, error)
        finally:
            self.task = None

    def _take(self) -> list[Job]:
        """The jobs that have waited longest, up to a batch; cancelled ones fall out."""
        jobs: list[Job] = []
        tokens = 0
        while self.queue:
            job = self.queue[0]
            if not job.future.done():
                full = tokens + job.tokens > self.batch_tokens
                if jobs and (full or job.model is not jobs[0].model):
                    break
                jobs.append(job)
                tokens += job.tokens
            self.queue.popleft()
        return jobs


def fail(jobs: Sequence[Job], error: Exception) -> None:
    """End jobs with an error, but those that have ended already."""
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)
