"""Sources behind s3://, read from a real S3 server of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mtl_core.config import SourceConfig, TaskConfig
from mtl_core.data.examples import DataError
from mtl_core.data.sources import read_source

TASKS = {"mood": TaskConfig(kind="classification")}
COLUMNS: dict[str, str | int] = {"text": "text", "mood": "mood"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora")
    rows = "".join(f'{{"text": "row {i}", "mood": "{"ab"[i % 2]}"}}\n' for i in range(20))
    for name in ("train", "validation", "test"):
        client.put_object(Bucket="corpora", Key=f"moods/{name}.jsonl", Body=rows.encode())
    yield "s3://corpora/moods"
    server.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_folder_and_a_file_behind_s3_are_read_and_a_missing_one_is_named(bucket: str) -> None:
    folder = read_source(SourceConfig(path=bucket, columns=COLUMNS), TASKS, seed=1)
    assert {name: len(rows) for name, rows in folder.splits.items()} == {
        "train": 20,
        "validation": 20,
        "test": 20,
    }
    file = SourceConfig(path=f"{bucket}/train.jsonl", columns=COLUMNS)
    assert len(read_source(file, TASKS, seed=1).splits["train"]) == 18
    missing = SourceConfig(path=f"{bucket}/none.jsonl", columns=COLUMNS)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_source(missing, TASKS, seed=1)
