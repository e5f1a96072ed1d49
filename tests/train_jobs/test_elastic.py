"""A node is lost while a run with an elastic number of workers goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_core.artifact import load_model
from mtl_core.config import load_experiment
from mtl_core.data.prepare import prepare
from tests.commands import history, start, wait_for, write_config
from tests.small_runs import train

SOON_WITHOUT_THE_LOST = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "12"}
"""How long Ray waits for as many workers as before."""
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes: a head without CPUs, and two with one CPU each."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    yield cluster
    cluster.shutdown()


def test_a_lost_node_costs_a_worker_and_changes_nothing_else(
    cluster: Any, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    no_dropout = {
        **experiment,
        "encoder": {**experiment["encoder"], "dropout": 0.0},
        "tasks": {name: {**task, "dropout": 0.0} for name, task in experiment["tasks"].items()},
        "training": {**experiment["training"], "epochs": 12},
    }
    config = write_config(tmp_path, no_dropout, scale={"workers": [1, 2]})
    process = start(
        "train", "--config", str(config), address=cluster.address, **SOON_WITHOUT_THE_LOST
    )
    wait_for(lambda: any(row.get("step", 0) >= 60 for row in history(tmp_path)), process)
    cluster.remove_node(nodes[1], allow_graceful=False)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    starts = [row for row in history(tmp_path) if row["event"] == "start"]
    assert [row["workers"] for row in starts] == [2, 1]
    assert 0 < starts[1]["step"] < 600

    experiment_alone = load_experiment(config)
    undisturbed, _ = train(experiment_alone, prepare(experiment_alone))
    trained = load_model(tmp_path / "runs/small/artifact").state_dict()
    for name, tensor in undisturbed.model.state_dict().items():
        # The true gradient of attention's key biases is zero: AdamW makes steps of rounding noise.
        if not name.startswith("weighting.") and not name.endswith("key.bias"):
            assert (trained[name] - tensor).abs().max() < 1e-3, name
