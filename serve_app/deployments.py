"""The graph on a cluster: the encoder takes the requests, every head is a deployment of its own.

Each is an application of its own, so that a head is added, scaled or taken away without touching
the encoder's replicas. serve_config.yaml names `encoder_app` and `head_app`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any

import ray.util
from ray import serve
from ray.serve._private import replica

from mtl_core.errors import ArtifactError, ConfigError, UserError
from mtl_core.runtime import usable_cpus
from serve_app.app import build_app
from serve_app.auth import KEYS_VARIABLE, Keys
from serve_app.errors import unavailable
from serve_app.gate import Gate
from serve_app.heads import HeadCall, HeadReplica, HeadUnavailable, LocalHead, RemoteHead
from serve_app.loaded import ServedModel, current_version, load_artifact
from serve_app.metrics import Metrics
from serve_app.requestlog import RequestLog
from serve_app.routes import Routes
from serve_app.service import Service
from serve_app.settings import (
    ENCODER,
    ENCODER_CPUS,
    HEAD_CPUS,
    LOOPBACK,
    Settings,
    head_name,
    parse_settings,
)

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's own lines for every call are left out: RequestLog says more and costs less."""
RETRY_REFUSED_S = 60.0
READY_FOR_S = 1.0
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 10.0
"""A replica that died is replaced within seconds, before calls to it time out; one that hangs
within half a minute."""


def bind_replicas_to_their_node() -> None:
    """Let a replica take calls on its node's address alone, where Serve binds to every one.

    These calls are pickled: where RAY_AUTH_MODE is disabled, whoever reaches the port could run
    code. The other replicas use that address, and for a Ray that was started here it is 127.0.0.1.
    """
    patched: Any = replica
    bind = patched.add_port_to_grpc_server

    def bind_to_node(server: Any, address: str) -> Any:
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return bind(server, address.replace("[::]", f"[{host}]" if ":" in host else host))

    patched.add_port_to_grpc_server = bind_to_node


bind_replicas_to_their_node()  # at import: Serve opens the port before it calls a replica's code


def remote_call(task: str) -> Callable[..., Any]:
    """What sends to a head's replicas, wherever they are.

    Raises:
        KeyError: it is not deployed.
    """
    handle = serve.get_deployment_handle(head_name(task), app_name=head_name(task))
    return handle.remote


def exposed_host() -> str | None:
    """The address that Serve's port is bound to, unless only this machine reaches it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    host = client.http_config.host if client is not None else None
    if host in LOOPBACK:
        return None
    return host or "an unknown address"  # HAProxy takes none for every one


def check_exposure(settings: Settings, keys: Keys) -> None:
    """Refuse to answer others without a key.

    Raises:
        ConfigError: the port is open to others, no key is set and `insecure` is not either.
    """
    if keys.required or settings.insecure:
        return
    host = exposed_host()
    if host is not None:
        raise ConfigError(
            f"Serve's port is bound to {host}, where others reach it, and no API key is set: set "
            f"{KEYS_VARIABLE} or keys_file, bind to 127.0.0.1, or say insecure: true"
        )


class EncoderReplica:
    """Takes requests, runs the encoder once for each text, and asks the heads."""

    def __init__(self, **args: Any) -> None:
        self.settings = parse_settings(args)
        self.keys = Keys(self.settings.keys_file, self.settings.poll_seconds)
        check_exposure(self.settings, self.keys)
        self.metrics = Metrics(replica_name())
        self.log = RequestLog(self.settings.log_requests)
        self.service = Service(
            self._load(None), self._head_call, self.metrics, self.settings, self.log
        )
        self.absent: dict[str, float] = {}
        """Heads that are not deployed, and when to look for them again: a look blocks."""
        self.watcher: asyncio.Task[None] | None = None
        self.refused = ("", 0.0)
        """The version that was refused last, and when to try it again."""
        self.waiting: ServedModel | None = None
        """A version that is ready but for a head of its own."""
        self.looking: asyncio.Task[None] | None = None
        self.look_again = 0.0

    def __serve_build_asgi_app__(self) -> Any:
        gate = Gate(self.service, self.settings, self.keys, self.log)
        return build_app(Routes(gate, self.check_ready))

    def _load(self, previous: ServedModel | None) -> ServedModel:
        settings = self.settings
        return load_artifact(
            settings.artifact,
            settings.runtime,
            settings.threads or own_cpus(),
            "cuda" if has_gpu() else "cpu",
            settings.batch_tokens,
            previous,
        )

    def _head_call(self, task: str) -> HeadCall:
        if self.settings.heads == "in_process":
            return LocalHead()
        now = time.monotonic()
        if now >= self.absent.get(task, now):
            with suppress(KeyError):
                call = remote_call(task)
                return RemoteHead(call, task, self.settings.head_timeout_s, self.metrics)
            self.absent[task] = now + READY_FOR_S
        raise HeadUnavailable(task, "missing", "it is not deployed")

    async def check_health(self) -> None:
        """Called by Serve from the start on: the first call warms up and starts watching.

        After a batch that failed, until one succeeds, it tries a sentence. After some errors
        nothing runs on a GPU any more: then this raises, too, and Serve puts another replica in
        this one's place. A busy one is left to finish.
        """
        service = self.service
        if self.watcher is None:
            self.watcher = asyncio.get_running_loop().create_task(self._watch())
            await service.warm_up(service.model)
            self._announce("loaded")
        elif service.batcher.last_failed:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_TIMEOUT_S / 2):
                    await service.warm_up(service.model, counts=(1,))

    async def check_ready(self) -> None:
        """Raise ApiError unless every head answers.

        Anyone may ask, and it costs a pass: one look at a time, and a good one holds for a moment.
        """
        last, now = self.looking, time.monotonic()
        if last is None or (last.done() and (failed(last) or now > self.look_again)):
            # Of no request: it goes on when whoever asked first has left.
            look = self.service.reach_heads(self.service.model)
            self.looking = asyncio.get_running_loop().create_task(look, context=Context())
            self.look_again = now + READY_FOR_S
        assert self.looking is not None
        try:
            await asyncio.shield(self.looking)
        except HeadUnavailable as error:
            raise unavailable(str(error)) from None

    async def _watch(self) -> None:
        """Take up new versions of the artifact as they appear."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self._refresh(loop)
            except Exception as error:
                self.log.error("artifact", error)

    async def _refresh(self, loop: asyncio.AbstractEventLoop) -> None:
        service = self.service
        try:
            version = await loop.run_in_executor(None, current_version, self.settings.artifact)
        except ArtifactError:
            return  # between two renames, or storage that does not answer: what is served stays
        refused, retry_at = self.refused
        if version == service.model.version or (version == refused and time.time() < retry_at):
            self.waiting = None
            return
        if self.waiting is None or self.waiting.version != version:
            self.waiting = None  # its memory first
            try:
                loaded = await loop.run_in_executor(None, self._load, service.model)
                await service.warm_up(loaded)
            except Exception as error:
                # Not for good: what failed may have been the storage.
                self.refused = (version, time.time() + RETRY_REFUSED_S)
                self.metrics.loads.labels("refused").inc()
                known = isinstance(error, UserError)
                reason = str(error) if known else type(error).__name__
                self.log.event("artifact refused", version=version, reason=reason)
                if not known:
                    self.log.error("artifact", error)
                return
            self.waiting = loaded
        try:
            await service.reach_heads(self.waiting)
        except HeadUnavailable as error:
            self.log.event("artifact waits for a head", version=version, reason=str(error))
            return
        service.model, self.waiting = self.waiting, None
        self._announce("taken up")

    def _announce(self, outcome: str) -> None:
        model = self.service.model
        self.metrics.loads.labels(outcome).inc()
        self.metrics.info.clear()
        self.metrics.info.labels(self.metrics.replica, model.stage.runtime.name, model.version).set(
            1
        )
        self.log.event(f"artifact {outcome}", version=model.version, tasks=list(model.heads))


def failed(task: asyncio.Task[None]) -> bool:
    """Whether a task that has ended was cancelled or raised an error."""
    return task.cancelled() or task.exception() is not None


class DeployedHead(HeadReplica):
    """A head's replica, defined here so that whatever process unpickles it imports this module."""


def replica_name() -> str:
    return serve.get_replica_context().replica_tag


def own_cpus() -> int:
    """CPUs for the encoder: what the replica asked for; all there are if less than one."""
    import ray

    context = ray.get_runtime_context()
    asked = context.get_assigned_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
    return int(asked) if asked >= 1 else usable_cpus()


def has_gpu() -> bool:
    import ray

    return bool(ray.get_gpu_ids())


def encoder_app(args: dict[str, Any]) -> serve.Application:
    """The encoder's application; `args` are Settings."""
    return build_app_of({"args": args, "deployments": [{"name": ENCODER}]})


def head_app(args: dict[str, Any]) -> serve.Application:
    """One head's application; `args` is {task: name}."""
    return build_app_of({"args": args, "deployments": [{"name": "head"}]})


def build_app_of(application: Mapping[str, Any]) -> serve.Application:
    """An application of serve_config.yaml, with the options its one deployment is given there.

    Raises:
        ConfigError: its args are wrong.
    """
    args = application["args"]
    (deployment,) = application["deployments"]
    options = {name: value for name, value in deployment.items() if name != "name"}
    if deployment["name"] == ENCODER:
        settings = parse_settings(args)
        encoder = encoder_deployment().options(**options)
        return encoder.bind(**settings.model_dump(exclude_unset=True))
    if set(args) != {"task"} or not isinstance(args["task"], str):
        raise ConfigError("a head's args are {task: NAME} and nothing else")
    return head_deployment(args["task"]).options(**options).bind()


def encoder_deployment() -> serve.Deployment:
    deployment = serve.deployment(
        name=ENCODER,
        max_ongoing_requests=10_000,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": ENCODER_CPUS},
        graceful_shutdown_timeout_s=30.0,
        logging_config=QUIET,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    return deployment(serve.ingress()(EncoderReplica))


def head_deployment(task: str) -> serve.Deployment:
    deployment = serve.deployment(
        name=head_name(task),
        max_ongoing_requests=64,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": HEAD_CPUS},
        logging_config=QUIET,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )
    return deployment(DeployedHead)
