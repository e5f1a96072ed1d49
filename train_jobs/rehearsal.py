"""Before a sweep's trials: that the cluster can hold one, and that all its nodes reach the folder.

A node that joins the cluster later is not asked.
"""

from __future__ import annotations

import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mtl_core.config import ScaleConfig
from mtl_core.storage import storage_errors
from train_jobs.folders import out_of_reach
from train_jobs.nodes import wait_for_nodes
from train_jobs.sweep import Sweep
from train_jobs.sweep_folder import SweepFolder

PROOF = "sweep.yaml"
"""A file of the folder that every node has to read as the driver wrote it."""


def rehearse(scale: ScaleConfig, sweep: Sweep) -> None:
    """Wait for room for one trial, and read the sweep's folder on every node that there is then.

    Raises:
        ConfigError: no node that would make room can be had, or a node does not reach the folder.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return  # this machine alone, whose size was looked at already
    wait_for_nodes(scale)
    read = ray.remote(read_proof)
    # Nothing is reserved, so that no node has to be idle; one that dies meanwhile is passed over.
    asked = [
        read.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True),
        ).remote(sweep)
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    written = SweepFolder(sweep).read(PROOF)
    for node, content, reason in ray.get(asked):
        if content != written:
            raise out_of_reach(node, sweep.output_dir, reason)


def read_proof(sweep: Sweep) -> tuple[str, str | None, str]:
    """This node's address, the file as it is seen from here, and why it is not."""
    node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    try:
        return node, SweepFolder(sweep).read(PROOF), ""
    except storage_errors() as error:
        return node, None, f" ({type(error).__name__}: {error})"
