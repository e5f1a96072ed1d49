"""One small artifact, its routes in this process, and one real server for all who need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_core.predictor import Predictor
from tests.servers import RealServer, local_server, real_server
from tests.small_runs import experiment, learned, write_artifact


@pytest.fixture(scope="session")
def artifact(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Topic, mood and entities of sentences that the model knows by heart."""
    state, _, _ = learned(tiny_encoders["bert"])
    folder = tmp_path_factory.mktemp("served") / "artifact"
    return write_artifact(state.model, experiment(tiny_encoders["bert"]), folder)


@pytest.fixture(scope="session")
def predictor(artifact: Path) -> Predictor:
    """The offline answers that served ones must equal."""
    return Predictor.load(artifact)


@pytest.fixture(scope="session")
def local_url(artifact: Path) -> Iterator[str]:
    """The routes without Ray, heads in this process, in fp32."""
    with local_server(artifact, runtime="torch-fp32") as (url, _):
        yield url


@pytest.fixture(scope="session")
def server(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """The real thing: Ray Serve, HAProxy, a deployment for each head."""
    folder = tmp_path_factory.mktemp("server")
    with real_server(artifact, folder, "--set", "runtime=torch-fp32") as running:
        yield running
