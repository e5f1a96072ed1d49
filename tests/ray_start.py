"""`ray start` of nodes whose workers are forks of `tests.preloaded`, where the environment says so.

    python -m tests.ray_start start --head …

Nodes that Ray's autoscaler starts are such, too. Not for jobs: their workers are to import what was
submitted.
"""

from __future__ import annotations

import os
from typing import Any

import ray._private.node

from mtl_core.forks import SCRIPTS
from tests.preloaded import FOLDER


class Node(ray._private.node.Node):
    """Starts workers with other scripts than Ray's own."""

    def __init__(self, ray_params: Any, **options: Any) -> None:
        setup, worker = (f"{os.environ[FOLDER]}/{script}" for script in SCRIPTS)
        ray_params.update(setup_worker_path=setup, worker_path=worker)
        super().__init__(ray_params, **options)


if FOLDER in os.environ:
    ray._private.node.Node = Node  # type: ignore[misc]

if __name__ == "__main__":
    from ray.scripts.scripts import main

    main()
