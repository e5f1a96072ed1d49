"""What carries progress from the first worker to the driver."""

from __future__ import annotations

from typing import Any

import ray


@ray.remote(num_cpus=0)
class ProgressLog:
    """Keeps what a worker tells until the driver asks; imports little, so it starts fast."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []

    def append(self, event: str, row: dict[str, Any]) -> None:
        self.rows.append((event, row))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        rows, self.rows = self.rows, []
        return rows


def progress_log() -> Any:
    """A log on the driver's own node: on another it would be lost with that node."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ProgressLog.options(label_selector=here).remote()  # type: ignore[attr-defined]
