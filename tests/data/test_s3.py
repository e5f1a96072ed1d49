"""Sources behind s3://, read from a real S3 server of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mtl_core.config import SourceConfig, TaskConfig, parse_experiment
from mtl_core.data.shards import ShardedCorpus
from mtl_core.data.sources import read_source
from mtl_core.errors import DataError
from tests.s3_server import s3_server

TASKS = {"mood": TaskConfig(kind="classification")}
COLUMNS: dict[str, str | int] = {"text": "text", "mood": "mood"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server("corpora") as (client, environment):
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # one may know the server of an earlier test
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        rows = "".join(f'{{"text": "row {i}", "mood": "{"ab"[i % 2]}"}}\n' for i in range(20))
        for name in ("train", "validation", "test"):
            client.put_object(Bucket="corpora", Key=f"moods/{name}.jsonl", Body=rows.encode())
        yield "s3://corpora/moods"


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_behind_s3_is_cut_into_shards(bucket: str) -> None:
    experiment = parse_experiment(
        {
            "name": "x",
            "tasks": {"mood": {"kind": "classification"}},
            "data": [{"path": f"{bucket}/train.jsonl", "columns": COLUMNS}],
            "training": {"shard_texts": 6},
        }
    )
    corpus = ShardedCorpus(experiment)
    shards, held_out = corpus.cut()
    parts = [corpus.read(shards, number) for number in range(shards.num_shards)]
    assert [len(part) for part in parts] == [6, 6, 6]
    rows = [example.text for part in (*parts, held_out.splits["validation"]) for example in part]
    assert sorted(rows) == sorted(f"row {i}" for i in range(20))
