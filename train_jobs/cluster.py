"""The Ray cluster a command runs on: the one it is pointed at, or a local one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
from ray._private.node import Node
from ray.exceptions import AuthenticationError

from mtl_core.config import ScaleConfig
from mtl_core.errors import ConfigError
from mtl_core.forks import end, own_node

LOCAL_SETTINGS = {
    # Ray runs its workers at nice 15, which starves them beside anything else on a small machine.
    "RAY_worker_niceness": "0",
    # What was given no GPU sees none; else torch may take memory of one for nothing.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Workers wait at a checkpoint until Ray Train has asked for the one before; by default it asks
    # every two seconds, so that a checkpoint a second would halve the speed of a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Relative paths are for workers what they are for the driver.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
OWN = "MTL_OWN_RAY"
OWN_SETTINGS = {
    OWN: "1",
    # A process each that nothing here needs: nobody takes away the only node.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""For the Ray that a command starts for itself."""


@contextmanager
def ray_cluster(scripts: str | None = None) -> Iterator[Callable[[], Any]]:
    """Connect to RAY_ADDRESS (set inside `ray job submit`), or start Ray here for the duration.

    Yields what may be called when Ray has done its part, to have it end beside what is left to do.
    With `scripts`, a folder of `forked_workers`, workers of the Ray that starts here are forks.
    GPUs that torch cannot use are none to it.
    """
    if ray.is_initialized():
        yield lambda: None
        return
    address = os.environ.get("RAY_ADDRESS")
    for name, value in {**LOCAL_SETTINGS, **({} if address else OWN_SETTINGS)}.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"address": address}
    if not address:
        # Ray counts GPUs with too old a driver, and with a torch without CUDA, too.
        num_gpus = None if torch.cuda.is_available() else 0
        options = {"address": "local", "include_dashboard": False, "num_gpus": num_gpus}
    before = psutil.Process().children(recursive=True)

    def shut_down() -> None:
        family = [] if address else psutil.Process().children(recursive=True)
        ray.shutdown()
        # Agents of a node that had only just begun would go on for a minute without it.
        end([process for process in family if process not in before])

    with ThreadPoolExecutor(1) as aside:
        try:
            start_ray(scripts, options)
            yield lambda: aside.submit(shut_down)
        finally:
            aside.submit(shut_down).result()  # a second time it finds nothing to do


def start_ray(scripts: str | None, options: Mapping[str, Any]) -> None:
    """`ray.init`, whose workers are forks where `scripts` are given.

    Raises:
        ConfigError: Ray cannot be had.
    """
    address = options["address"]
    try:
        with own_node(Node, scripts) if address == "local" else nullcontext():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        where = "a local Ray" if address == "local" else f"the cluster at RAY_ADDRESS={address}"
        raise ConfigError(f"cannot reach {where}: {error}") from error


def is_own() -> bool:
    """Whether this process, the command or one of its workers, is on a Ray that it started."""
    return OWN in os.environ


def living_nodes() -> list[dict[str, float]]:
    """What each node of now has, whoever uses it."""
    found = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in found if node["Alive"]]


def total(resource: str) -> int:
    """How much of it the nodes of now have together."""
    return int(sum(node.get(resource, 0) for node in living_nodes()))


def room_for(each: Mapping[str, float], nodes: Sequence[Mapping[str, float]] = ()) -> int:
    """How many processes that ask for this fit on nodes, or on those of now."""
    return sum(
        min(int(node.get(name, 0) // amount) for name, amount in each.items())
        for node in nodes or living_nodes()
    )


def cpu_share(processes: int, use_gpu: bool) -> int:
    """The most CPUs that each of so many processes can have where all find room.

    An even share of the sum may be more than any node has. 1 where they find no room yet: any node
    that comes has that.
    """
    nodes, gpu = living_nodes(), {"GPU": 1.0} if use_gpu else {}
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    shares = range(largest, 1, -1)
    return next((n for n in shares if room_for({"CPU": n, **gpu}, nodes) >= processes), 1)


@dataclass(frozen=True)
class Workers:
    """How many workers a run may have, and the resources that each of them asks for."""

    least: int
    most: int
    each: dict[str, float]

    @property
    def use_gpu(self) -> bool:
        return "GPU" in self.each


def worker_resources(scale: ScaleConfig) -> Workers:
    """The workers of a run on the nodes of now.

    Raises:
        ConfigError: no node could ever hold what is asked for, and nothing can add one.
    """
    cpus, gpus = total("CPU"), total("GPU")
    least, most = (
        (scale.workers, scale.workers) if isinstance(scale.workers, int) else scale.workers
    )
    use_gpu = gpus >= least if scale.gpu is None else scale.gpu
    share = scale.cpus_per_worker or (1 if least != most else cpu_share(most, use_gpu))
    each = {"CPU": float(share)}
    if use_gpu:
        each["GPU"] = 1.0
    autoscales = bool(os.environ.get("RAY_ADDRESS"))
    if not autoscales:
        if use_gpu and gpus < least:
            raise ConfigError(
                f"scale: {least} GPU(s) asked for and this machine has {gpus} that PyTorch can "
                "use; set scale.gpu: false to train on CPU, or run on a cluster that has them"
            )
        if least * each["CPU"] > cpus:
            raise ConfigError(
                f"scale: {least} worker(s) of {each['CPU']:g} CPU(s) do not fit on {cpus} CPU(s); "
                "lower scale.workers or scale.cpus_per_worker"
            )
    return Workers(least, most, each)


def idle_gpus(scale: ScaleConfig) -> str | None:
    """What to tell whoever has fewer GPUs than workers and did not say which to train on."""
    workers, gpus = worker_resources(scale), total("GPU")
    if workers.use_gpu or scale.gpu is not None or not gpus:
        return None
    return (
        f"{gpus} GPU(s) for {workers.least} worker(s): training on CPUs; "
        f"scale.workers={gpus} would use them"
    )
