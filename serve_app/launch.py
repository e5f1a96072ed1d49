"""Starting Ray and Serve for one artifact, and stopping what was started."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from mtl_core.errors import ConfigError
from mtl_core.forks import end, own_node


def start_ray(
    host: str, port: int, num_cpus: int | None = None, scripts: str | None = None
) -> None:
    """Connect to RAY_ADDRESS, or start Ray here, and start Serve on a host and port.

    Args:
        host, port: what Serve listens on.
        num_cpus: CPUs that a local Ray may hand out, whatever the machine has.
        scripts: of `forked_workers`, for a local Ray, so that its workers are forks.

    Raises:
        ConfigError: Ray cannot be had, Serve runs there already on another address, or its proxy
            is not ready in time.
    """
    import ray
    from ray import serve
    from ray._private.node import Node
    from ray.exceptions import AuthenticationError, RayError
    from ray.serve.config import HTTPOptions

    address = os.environ.get("RAY_ADDRESS")
    if address and "://" not in address:
        check_listening(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            with own_node(Node, scripts), outliving_the_terminal():
                ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, **quiet)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise ConfigError(f"cannot reach {where}: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"Serve's proxy did not start: {reason}\nOn a busy machine give it longer, where "
            "Ray starts: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, in seconds"
        ) from error
    check_address(host, port)


@contextmanager
def outliving_the_terminal() -> Iterator[None]:
    """What starts meanwhile does not end when the terminal closes, as Ray sees to it for Ctrl-C.

    It is this process that is interrupted then, from now on, and only once: after the terminal the
    shell says so, too.
    """
    if not ends_with_terminal():
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGHUP, interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # which new processes take over
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def ends_with_terminal() -> bool:
    """Whether a closed terminal is to end this process: not under nohup."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def gpus() -> float:
    """GPUs that Ray found."""
    import ray

    found: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    return found


def check_listening(address: str) -> None:
    """See that something listens where Ray will look; Ray itself would try for many minutes.

    Raises:
        ConfigError: nothing does.
    """
    from ray._private.services import canonicalize_bootstrap_address

    where = None
    try:
        # Ray takes 127.0.0.1 for this machine's own address, unless it was told to stay local.
        where = canonicalize_bootstrap_address(address)
        host, _, port = (where or "").rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        meant = f", which Ray takes for {where}" if where and where != address else ""
        raise ConfigError(f"RAY_ADDRESS={address}{meant}: no Ray listens there: {error}") from error


def check_address(host: str, port: int) -> None:
    """Where Serve ran before, it stays on the address it has.

    Raises:
        ConfigError: that is another one.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    http = client.http_config
    if (http.host, http.port) != (host, port):
        raise ConfigError(
            f"Serve runs on this cluster already, on {http.host}:{http.port}: give "
            f"--host {http.host} --port {http.port}, or end it first with `serve shutdown`"
        )


def deploy(config: Mapping[str, Any]) -> None:
    """Run the applications of a Serve config and wait until they are up.

    Raises:
        ConfigError: an application did not come up; the message is its own.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serve_app.deployments import build_app_of

    targets = [
        serve.RunTarget(build_app_of(app), app["name"], app.get("route_prefix"))
        for app in config["applications"]
    ]
    try:
        serve.run_many(targets)
    except (RuntimeError, RayServeException) as error:
        reason = deployment_error([app["name"] for app in config["applications"]]) or error
        raise ConfigError(f"the deployments did not come up: {reason}") from error


def deployment_error(names: Sequence[str]) -> str | None:
    """Why one of these applications did not come up, in its replica's own words if it has any."""
    from ray import serve

    found = serve.status().applications
    for name in names:
        state = found.get(name)
        if state is not None and state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            # A traceback, of which Ray's users need the last line.
            said = [d.message.strip().splitlines()[-1:] for d in state.deployments.values()]
            return f"{name}: {'; '.join(line for lines in said for line in lines) or state.message}"
    return None


def deploy_on_cluster(config: Mapping[str, Any], timeout_s: float = 600.0) -> None:
    """Bring a cluster to a Serve config; what is the same already goes on untouched.

    Raises:
        ConfigError: an application did not come up; the message is its own.
    """
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    names = [app["name"] for app in config["applications"]]
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    deadline = time.monotonic() + timeout_s
    while True:
        found = serve.status().applications
        states = {name: found[name] for name in names if name in found}
        if reason := deployment_error(names):
            raise ConfigError(f"the deployments did not come up: {reason}")
        if len(states) == len(names) and all(s.status == "RUNNING" for s in states.values()):
            return
        if time.monotonic() > deadline:
            raise ConfigError(f"the deployments are not up after {timeout_s:g} s: serve status")
        time.sleep(0.2)


def stop() -> None:
    """Drain and stop Serve, and the Ray that was started here; leave no process behind."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        if ray.is_initialized():
            # What the encoder still answers needs the heads, so they go after it.
            with suppress(RayServeException, TimeoutError):
                serve.delete("encoder")
            stop_serve()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        family = psutil.Process().children(recursive=True)
        ray.shutdown()
        end(family)


def stop_serve(patience_s: float = 30.0) -> None:
    """`serve.shutdown`, but without a call that waits for the end of the very actor it calls.

    Ray takes the end of that call for a failure and prints it.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + patience_s
    with suppress(ValueError, ray.exceptions.RayError):  # it is gone
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=patience_s)
        while time.monotonic() < deadline:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.1)


def wait_for_signal(meanwhile: Callable[[], None], seconds: float, message: str) -> None:
    """Return at Ctrl-C, SIGTERM or when the terminal closes.

    A second Ctrl-C or SIGTERM interrupts whatever then goes on.

    Args:
        meanwhile: called again and again; a signal interrupts it, too.
        seconds: the pause between calls.
        message: printed once a signal would be noticed.
    """
    numbers = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * ends_with_terminal()
    # Not an Event: its lock may be held by the very thread that the signal interrupts.
    woken, waker = socket.socketpair()
    with woken, waker:
        waker.setblocking(False)
        before = signal.set_wakeup_fd(waker.fileno())
        busy = False

        def notice(*_: Any) -> None:
            if busy:
                raise KeyboardInterrupt

        for number in numbers:
            signal.signal(number, notice)
        print(message, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                busy = True
                if not select.select([woken], [], [], 0)[0]:
                    meanwhile()
                busy = False
                if select.select([woken], [], [], seconds)[0] and woken.recv(1)[0] in numbers:
                    break
        signal.set_wakeup_fd(before)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def check_port(host: str, port: int) -> int:
    """The port to bind to: a free one for 0.

    Raises:
        ConfigError: something listens there already.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise ConfigError(
                f"--port: {host}:{port} cannot be had: {error.strerror}; stop what listens there, "
                "or choose another port"
            ) from error
