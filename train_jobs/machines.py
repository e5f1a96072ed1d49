"""AWS machines for Ray's autoscaler: spot where asked for, and on demand where spot is refused.

Named in cluster.yaml as the provider. Ray 2.60 by itself asks for a refused node type again and
again: its autoscaler steps back from a type only when a machine that AWS granted does not come up.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

SPOT_REFUSED = (
    "InsufficientInstanceCapacity",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "UnfulfillableCapacity",
    "Unsupported",
)
"""EC2's error codes that mean: not on spot, not now."""


class SpotFirst(AWSNodeProvider):
    """Ray's AWS provider with a second try."""

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        """Start machines; a spot machine that AWS refuses in every zone is started on demand."""
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as error:
            if "InstanceMarketOptions" not in node_config or error.category not in SPOT_REFUSED:
                raise
            print(f"no spot machine ({error.category}: {error.description}): on demand instead")
        on_demand = {k: v for k, v in node_config.items() if k != "InstanceMarketOptions"}
        return super().create_node(on_demand, tags, count)
