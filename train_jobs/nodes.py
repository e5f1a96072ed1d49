"""Why workers wait for nodes, as the cluster's autoscaler tells it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from mtl_core.config import ScaleConfig
from mtl_core.errors import ConfigError
from train_jobs.cluster import worker_resources

VAIN_SECONDS = 10.0
"""How long the autoscaler has to repeat that no node can come before a run gives up."""

LOG_BYTES = 1 << 16
"""Of the autoscaler's log, from its end."""

HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Wait:
    """What workers wait for."""

    reason: str
    in_vain: bool = False
    """No node that can be had would end it."""


def wait_for_nodes(scale: ScaleConfig) -> None:
    """Return once there is room for the workers; a cluster that grows is made to.

    Ray Train would wait for the same room, but cannot be told to give up. Room that is taken
    between this and its own request it waits for again.

    Raises:
        ConfigError: no node that would end the wait can be had.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return
    workers = worker_resources(scale)
    since = time.time()
    group = placement_group([workers.each] * workers.least)
    not_yet = Wait(f"no room yet for {workers.least} worker(s) of {_in_words(workers.each)}")
    told, vain_since = "", None
    try:
        while not group.wait(1):
            wait = not_yet
            with contextlib.suppress(Exception):  # what cannot be asked now is asked again
                wait = why_workers_wait(since) or not_yet
            if wait.reason != told:
                told = wait.reason
                print(f"waiting: {told}")
            if not wait.in_vain:
                vain_since = None
                continue
            vain_since = vain_since or time.monotonic()
            if time.monotonic() - vain_since > VAIN_SECONDS:
                raise ConfigError(
                    f"scale: {told}; change scale.workers, scale.cpus_per_worker or scale.gpu, or "
                    "add such a node type, or a higher max_workers, to cluster.yaml"
                )
    finally:
        remove_placement_group(group)


def why_workers_wait(since: float) -> Wait | None:
    """None while nothing waits, while nodes are on their way, and where no autoscaler tells.

    `ray status` prints the same for a person. An autoscaler calls infeasible what exceeds
    max_workers just now, too; so only on a cluster without other nodes is it final.

    Args:
        since: seconds since the epoch; what a cloud refused before, the autoscaler tells for ever.
    """
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    raylet, messages = cast(Any, _raylet), cast(Any, autoscaler_pb2)
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    state = reply.autoscaling_state
    missing = _infeasible(state)
    if missing:
        nodes = reply.cluster_resource_state.node_states
        others = [n for n in nodes if n.status != messages.DEAD and HEAD not in n.total_resources]
        if state.pending_instance_requests or state.pending_instances or others:
            return Wait(f"no room for {missing} before other work ends")
        return Wait(f"no node that this cluster may start has room for {missing}", in_vain=True)
    refused = [each for each in state.failed_instance_requests if each.failed_ts >= int(since)]
    # What is refused is asked for again at once, so only a node that starts is on its way.
    if refused and not state.pending_instances:
        last = max(refused, key=lambda each: each.failed_ts)
        kind = last.ray_node_type_name
        return Wait(f"a node of type {kind} cannot be had: {_refusal(kind)}")
    return None


def _refusal(kind: str) -> str:
    """The cloud's own words, which Ray 2.60 writes to the autoscaler's log on the head alone."""
    node = cast(Any, ray)._private.worker.global_worker.node
    log = Path(node.get_logs_dir_path(), "monitor.log")
    said = []
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
        said = re.findall(rf"Failed to launch \d+ nodes of type {re.escape(kind)}: (.*)", text)
    return said[-1] if said else "`ray monitor` tells why"


def _infeasible(state: Any) -> str:
    """The workers that fit nowhere, in words."""
    requests = [
        request
        for gang in state.infeasible_gang_resource_requests
        for bundle in gang.bundle_selectors[:1]
        for request in bundle.resource_requests
    ] or [r for gang in state.infeasible_gang_resource_requests for r in gang.requests]
    plain = [_in_words(request.resources_bundle) for request in requests]
    return ", ".join(f"{count} worker(s) of {what}" for what, count in Counter(plain).items())


def _in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))
