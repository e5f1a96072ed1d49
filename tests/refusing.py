"""A cloud that has no GPUs to give, for Ray's autoscaler in a process of its own."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

import tests.ray_start  # noqa: F401

QUOTA = "You have requested more vCPU capacity than your current vCPU limit of 0 allows"


class NoGpus(FakeMultiNodeProvider):
    """Raylets where a cloud would start machines, and what EC2 says where the quota is used up."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        if "GPU" in resources:
            raise NodeLaunchException("VcpuLimitExceeded", QUOTA, None)
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
