"""Heads as deployments of their own, and the encoder's line to them.

A head replica starts empty and holds no path: it is sent a head's two small files once, by
whichever encoder replica first asks for that version. So encoder and heads can never disagree
about the version, a new version needs no restart, and heads need no shared storage.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mtl_core.answers import Features, Output, run_head
from mtl_core.artifact import build_stored_head
from mtl_core.heads import Head
from serve_app.metrics import Metrics

VERSIONS_KEPT = 4
PAUSE_AFTER_TIMEOUT_S = 5.0
RETRY_FOR_S = 30.0


class HeadUnavailable(RuntimeError):
    """A head gave no answer; its task is answered with 503, and counted by the reason."""

    def __init__(self, task: str, reason: str, detail: str) -> None:
        super().__init__(f"the head of task {task!r} is not available: {detail}; try again")
        self.reason = reason


@dataclass(frozen=True)
class StoredHead:
    """A head as an artifact stores it."""

    task: str
    kind: str
    level: str
    labels: tuple[str, ...]
    description: bytes
    weights: bytes

    @cached_property
    def version(self) -> str:
        return hashlib.sha256(self.description + self.weights).hexdigest()


class HeadReplica:
    """Runs whichever versions of one task's head it was given, in a thread of its own.

    A batch is a small matrix: OpenMP's threads would take longer to be called together, and then
    spin while they wait for the next one. They are counted for each thread that asks for them.
    """

    def __init__(self) -> None:
        self.known: OrderedDict[str, Head] = OrderedDict()
        self.thread = ThreadPoolExecutor(
            1, thread_name_prefix="head", initializer=torch.set_num_threads, initargs=(1,)
        )

    async def __call__(self, *args: Any) -> Output | None:
        """`answer`, beside the event loop.

        Serve would start a thread for every call of a method that is not async.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.answer, *args)

    def answer(
        self,
        version: str,
        features: Features,
        all_tags: bool = False,
        stored: tuple[bytes, bytes] | None = None,
    ) -> Output | None:
        """What the head says; None if this replica does not know the version yet.

        Args:
            version: hash of the head's files.
            features: of the texts to answer for.
            all_tags: give the probability of every tag.
            stored: contents of head.json and head.safetensors, for a replica that lacks them.
        """
        head = self.known.get(version)
        if head is None:
            if stored is None:
                return None
            head = self.known[version] = build_stored_head(*stored, version)
        self.known.move_to_end(version)
        while len(self.known) > VERSIONS_KEPT:
            self.known.popitem(last=False)
        return run_head(head, features, all_tags)


HeadCall = Callable[[StoredHead, Features, bool], Awaitable[Output]]
"""The encoder's line to one task's head; the last argument asks for every tag's probability."""


class LocalHead:
    """A head in the encoder's own process."""

    def __init__(self) -> None:
        self.replica = HeadReplica()

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        stored = (head.description, head.weights)
        try:
            output = await self.replica(head.version, features, all_tags, stored)
        except Exception as error:
            raise HeadUnavailable(head.task, "error", type(error).__name__) from error
        assert output is not None
        return output


class RemoteHead:
    """A head deployment, called through its handle.

    A call whose replica dies is sent again, for the answer depends on nothing but what is sent.
    A head that does not answer in time is left alone for a while, so that requests for other
    tasks do not pile up behind it.

    Args:
        call: sends (version, features, all_tags, stored) to a replica.
        task: for messages and metrics.
        timeout_s: how long a head has for one batch.
        metrics: where calls that are sent again are counted.
    """

    def __init__(
        self, call: Callable[..., Any], task: str, timeout_s: float, metrics: Metrics
    ) -> None:
        self.call = call
        self.task = task
        self.timeout_s = timeout_s
        self.metrics = metrics
        self.silent = False
        self.paused_until = self.answered = 0.0
        self.died = -RETRY_FOR_S

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        now = time.monotonic()
        if now < self.paused_until:
            detail = "it did not answer in time a moment ago"
            raise HeadUnavailable(self.task, "paused", detail)
        if self.silent:  # this call finds out whether it answers again; others need not wait too
            self.paused_until = now + self.timeout_s
        deadline = now + RETRY_FOR_S
        wait = 0.05
        while True:
            began = time.monotonic()
            try:
                asked = self._ask(head, features, all_tags)
                output = await asyncio.wait_for(asked, self._patience(began, deadline))
            except TimeoutError:
                if self.answered < began:  # else another of its replicas answers
                    self.silent = True
                    self.paused_until = time.monotonic() + PAUSE_AFTER_TIMEOUT_S
                detail = "it did not answer in time"
                raise HeadUnavailable(self.task, "timeout", detail) from None
            except Exception as error:
                if not replica_died(error):
                    self._heard()
                    raise HeadUnavailable(self.task, "error", type(error).__name__) from error
                self.died = time.monotonic()
                if self.died + wait > deadline:
                    raise HeadUnavailable(self.task, "died", "its replicas died") from error
            else:
                self._heard()
                return output
            self.metrics.head_retries.labels(self.task).inc()
            await asyncio.sleep(wait)
            wait = min(2 * wait, 1.0)

    def _heard(self) -> None:
        """It answers, be it with an error."""
        self.silent, self.paused_until = False, 0.0
        self.answered = time.monotonic()

    def _patience(self, now: float, deadline: float) -> float:
        """Seconds to wait for an answer: up to the deadline while a dead replica is replaced."""
        recent = now < self.died + RETRY_FOR_S
        return max(deadline - now, self.timeout_s) if recent else self.timeout_s

    async def _ask(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        output = await self.call(head.version, features, all_tags)
        if output is None:
            stored = (head.description, head.weights)
            output = await self.call(head.version, features, all_tags, stored)
        return output  # type: ignore[no-any-return]


def replica_died(error: BaseException) -> bool:
    """Whether an error means that a replica went away, not that it refused."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    if isinstance(error, RayActorError | DeploymentUnavailableError | ConnectionError):
        return True
    # Serve's gRPC transport reports a closed connection in its own class.
    code = getattr(error, "code", None)
    return callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "CANCELLED")
