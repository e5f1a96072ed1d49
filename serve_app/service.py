"""Texts in, what the heads say of them out: tokenise, queue, encode once, ask the heads.

No HTTP and no Ray here: routes and deployments stand around it, and tests run it as it is.
Shapes: N texts, H hidden units.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtl_core.answers import Features, Output, Prediction
from mtl_core.predictor import EncodingStage, unit
from mtl_core.windows import Tokenized
from serve_app.batcher import Batch, Batcher, Job, fail
from serve_app.heads import HeadCall, HeadUnavailable
from serve_app.loaded import ServedModel
from serve_app.metrics import Metrics
from serve_app.requestlog import RequestLog
from serve_app.settings import Settings

T = TypeVar("T")
MAX_LISTED = 32_768
"""Sub-words listed in one reply: each takes some 65 bytes there, and no limit counts replies."""
INLINE_CHARACTERS = 4_000
"""Texts up to this length in all are tokenised on the event loop: it takes a millisecond or two."""


@dataclass(frozen=True)
class Part:
    """The answers for a run of a request's texts."""

    items: Sequence[Tokenized]
    pooled: NDArray[np.float32]
    """(N, H) vectors as the encoder gives them."""
    outputs: Mapping[str, Output | HeadUnavailable]
    queue: float
    """Seconds, as are the next two."""
    encoder: float
    heads: float


@dataclass(frozen=True)
class Answer:
    """The answers for all of a request's texts."""

    model: ServedModel
    parts: Sequence[Part]
    tokenize: float
    """Seconds, as are `queue` and `inference`."""
    beginnings: Sequence[int]
    """Texts of which only the beginning counts for labels and vectors."""

    @property
    def queue(self) -> float:
        """Of the first part: what the others wait for then is this request's own encoding."""
        return min(part.queue for part in self.parts)

    @property
    def inference(self) -> float:
        encoder = sum(part.encoder for part in self.parts)
        return encoder + max(part.heads for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for part in self.parts for item in part.items)

    @property
    def num_characters(self) -> int:
        return sum(len(item.text) for part in self.parts for item in part.items)

    @property
    def failures(self) -> dict[str, HeadUnavailable]:
        """Tasks that could not be answered."""
        outputs = [item for part in self.parts for item in part.outputs.items()]
        return {task: error for task, error in outputs if isinstance(error, HeadUnavailable)}

    def vectors(self) -> NDArray[np.float32]:
        """(N, H) vectors of unit length."""
        return unit(np.concatenate([part.pooled for part in self.parts]))

    def predictions(self, task: str) -> Iterator[Prediction]:
        """Each text's answer for a task that did not fail."""
        for part in self.parts:
            output = part.outputs[task]
            assert not isinstance(output, HeadUnavailable)
            yield from output.predictions(part.items)


class BatchSlice(NamedTuple):
    """Where a job's texts begin in its batch, and among those that each of its heads is sent."""

    job: Job
    first: int
    firsts: Sequence[int]


class Service:
    """One encoder replica's work, whoever asks for it.

    Args:
        model: what to serve first.
        head_call: makes the line to a task's head; raises HeadUnavailable if there is none.
        metrics: where it is counted.
        settings: limits of requests, batches and what may wait.
        log: where errors of heads are noted.
    """

    def __init__(
        self,
        model: ServedModel,
        head_call: Callable[[str], HeadCall],
        metrics: Metrics,
        settings: Settings,
        log: RequestLog | None = None,
    ) -> None:
        self.model = model
        self.max_tokens = settings.max_tokens
        self.head_call = head_call
        self.metrics = metrics
        self.log = log or RequestLog()
        self.calls: dict[str, HeadCall] = {}
        self.batcher = Batcher(
            self._encode,
            self._encoded,
            settings.max_waiting,
            settings.batch_tokens,
            settings.max_waiting_tokens,
        )
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        """One thread: for a moment long texts take hundreds of times their length in memory."""
        self.asking: set[asyncio.Task[None]] = set()

    async def answer(
        self,
        texts: Sequence[str],
        tasks: Sequence[str],
        all_tags: bool = False,
        truncate: bool = True,
        vectors: bool = False,
    ) -> Answer:
        """Answer texts for tasks; none for their vectors alone.

        Args:
            texts: one or more.
            tasks: known tasks.
            all_tags: give token heads' probabilities of every tag.
            truncate: let the beginning of a text beyond the model's window stand for it where only
                the beginning would count; else such a text is refused.
            vectors: their vectors are wanted beside the tasks.

        Raises:
            TextError: a text is blank or no valid Unicode.
            TooLong: see `truncate`.
            TooMany: they have more sub-words than a request may have.
            Overloaded: too much waits already.
        """
        model = self.model
        started = time.perf_counter()
        want_states = any(model.heads[task].level == "token" for task in tasks)
        pooled = vectors or not tasks
        cut = pooled or any(model.heads[task].level == "sentence" for task in tasks)
        asked = (self.max_tokens, want_states, truncate or not cut)
        items = await self._tokenize(model.stage.windows.split, texts, *asked)
        tokenize = time.perf_counter() - started
        beginnings = [number for number, item in enumerate(items) if cut and item.long]
        parts: list[Part] = await self.batcher.submit(
            items, tuple(tasks), want_states, all_tags, model
        )
        answer = Answer(model, parts, tokenize, beginnings)
        self.metrics.texts.inc(len(texts))
        self.metrics.stage.labels("tokenise").observe(answer.tokenize)
        self.metrics.stage.labels("queue").observe(answer.queue)
        return answer

    async def tokens(self, texts: Sequence[str], special: bool) -> list[list[dict[str, Any]]]:
        """What `Windows.tokens` gives, within the limits of `answer` and MAX_LISTED.

        Raises:
            TextError, TooMany, Overloaded: as `answer`.
        """
        most = min(self.max_tokens, MAX_LISTED)
        return await self._tokenize(self.model.stage.windows.tokens, texts, special, most)

    async def _tokenize(
        self, tokenize: Callable[..., list[T]], texts: Sequence[str], *more: Any
    ) -> list[T]:
        """Tokenise texts, counted as waiting meanwhile; long ones in a thread of their own."""
        with self.batcher.held(len(texts)):
            if sum(map(len, texts)) <= INLINE_CHARACTERS:
                return tokenize(texts, *more)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.tokenizing, tokenize, texts, *more)

    async def warm_up(self, model: ServedModel, counts: Sequence[int] = (1, 4, 16)) -> None:
        """Run a model's encoder through shapes before it answers anybody; heads: `reach_heads`."""
        split, text = model.stage.windows.split, "A sentence to warm up with."
        for count in counts:
            items = split([" ".join([text] * repeat) for repeat in range(1, count + 1)])
            jobs = [self._job(item, model) for item in items]
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.batcher.thread, self._encode, jobs)

    async def reach_heads(self, model: ServedModel) -> None:
        """Ask every head of a model once, which also gives their replicas its weights.

        Raises:
            HeadUnavailable: one does not answer, as one that is not deployed yet.
        """
        loop = asyncio.get_running_loop()
        jobs = [self._job(item, model) for item in model.stage.windows.split(["ready?"])]
        features = await loop.run_in_executor(self.batcher.thread, self._encode, jobs)
        batch = Batch(jobs, features, 0.0, 0.0)
        for reply in await asyncio.gather(*[self._ask(task, batch) for task in model.heads]):
            if isinstance(reply, HeadUnavailable):
                raise reply

    def _job(self, item: Tokenized, model: ServedModel) -> Job:
        future = asyncio.get_running_loop().create_future()
        return Job([item], tuple(model.heads), True, False, future, item.num_tokens, model)

    def _encode(self, jobs: list[Job]) -> Features:
        """Runs in the worker thread."""
        stage: EncodingStage = jobs[0].model.stage
        before = stage.num_windows
        items = [item for job in jobs for item in job.items]
        wants = [job.want_states for job in jobs for _ in job.items]
        features = stage.encode(items, wants)
        self.metrics.passes.inc(stage.num_windows - before)
        return features

    def _encoded(self, batch: Batch) -> None:
        """Back on the event loop: the heads are asked while the next batch is encoded."""
        self.metrics.stage.labels("encoder").observe(batch.seconds)
        self.metrics.batch_texts.observe(len(batch.features.lengths))
        tokens = sum(job.tokens for job in batch.jobs)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.tokens.inc(tokens)
        task = asyncio.get_running_loop().create_task(self._finish(batch))
        self.asking.add(task)
        task.add_done_callback(self.asking.discard)

    async def _finish(self, batch: Batch) -> None:
        """Ask every head at once; whoever waits for one waits for no other."""
        started = time.perf_counter()
        groups: dict[tuple[str, ...], list[BatchSlice]] = {}
        first, firsts = 0, dict.fromkeys([task for job in batch.jobs for task in job.tasks], 0)
        for job in batch.jobs:
            place = BatchSlice(job, first, [firsts[task] for task in job.tasks])
            groups.setdefault(job.tasks, []).append(place)
            first += len(job.items)
            for task in job.tasks:
                firsts[task] += len(job.items)
        loop = asyncio.get_running_loop()
        asked = {task: loop.create_task(self._ask(task, batch)) for task in firsts}
        settling = [
            self._settle(batch, places, [asked[task] for task in tasks], started)
            for tasks, places in groups.items()
        ]
        if len(settling) == 1:  # as it mostly is: no further task
            await settling[0]
        else:
            await asyncio.gather(*settling, return_exceptions=True)

    async def _settle(
        self,
        batch: Batch,
        places: Sequence[BatchSlice],
        asked: Sequence[asyncio.Task[Output | HeadUnavailable]],
        started: float,
    ) -> None:
        """Hand jobs of the same tasks their share of what the heads say."""
        try:
            outputs = await asyncio.gather(*asked)
            seconds = time.perf_counter() - started
            for job, first, firsts in places:
                count = len(job.items)
                mine: dict[str, Output | HeadUnavailable] = {}
                for task, output, begin in zip(job.tasks, outputs, firsts, strict=True):
                    if isinstance(output, HeadUnavailable):
                        mine[task] = output
                    else:
                        mine[task] = output.part(begin, begin + count)
                if not job.future.done():
                    pooled = batch.features.pooled[first : first + count]
                    waited = batch.started - job.queued
                    job.future.set_result(
                        Part(job.items, pooled, mine, waited, batch.seconds, seconds)
                    )
        except Exception as error:
            fail([place.job for place in places], error)
        except asyncio.CancelledError:
            cancelled = RuntimeError("what asks the heads was cancelled")
            fail([place.job for place in places], cancelled)
            raise

    async def _ask(self, task: str, batch: Batch) -> Output | HeadUnavailable:
        """One head's answer for the batch's texts that want it."""
        started = time.perf_counter()
        rows: list[int] = []
        first = 0
        for job in batch.jobs:
            if task in job.tasks:
                rows.extend(range(first, first + len(job.items)))
            first += len(job.items)
        head = batch.jobs[0].model.heads[task]
        features = batch.features.select(rows, head.level)
        all_tags = any(job.all_tags and task in job.tasks for job in batch.jobs)
        try:
            if task not in self.calls:
                self.calls[task] = self.head_call(task)
            return await self.calls[task](head, features, all_tags)
        except HeadUnavailable as error:
            self.metrics.head_failures.labels(task, error.reason).inc()
            if error.__cause__ is not None:
                self.log.error(f"head-{task}", error.__cause__)
            return error
        finally:
            self.metrics.stage.labels(f"head-{task}").observe(time.perf_counter() - started)
