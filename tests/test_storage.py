"""Object stores that cannot be used: said so, with what to do, before anything is spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mtl_core.artifact import SCHEMA_VERSION
from mtl_core.command import run_command
from mtl_core.errors import ArtifactError, ConfigError
from mtl_core.storage import download, fetch, manifest_of
from tests.s3_server import ACCESS, s3_server
from tests.small_runs import experiment
from train_jobs.runs import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")
MANIFEST = {
    "schema_version": SCHEMA_VERSION,
    "name": "demo",
    "encoder": {"pooling": "mean", "max_length": 128},
    **{part: {} for part in ("tasks", "data", "versions")},
}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server with one bucket, and this process's environment pointed at it."""
    import s3fs

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_server("bucket") as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield client
    s3fs.S3FileSystem.clear_instance_cache()


def refused(url: str) -> str:
    """What a run in this folder is told."""
    config = experiment("none", output_dir=url)
    with pytest.raises(ConfigError) as caught:
        RunFolder(config).resumes(config)
    return str(caught.value)


def test_a_bucket_that_is_not_there_is_named_and_not_made(client: Any) -> None:
    message = refused("s3://misspelt/runs")
    assert "s3://misspelt/runs/small" in message
    assert "there is no bucket 'misspelt'" in message
    assert "misspelt" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    with pytest.raises(ArtifactError, match="s3://misspelt/artifact: cannot be fetched"):
        fetch("s3://misspelt/artifact")


def test_missing_credentials_are_said_so(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ACCESS:
        monkeypatch.delenv(name, raising=False)
    advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
    assert advice in refused("s3://bucket/runs")
    for read in (fetch, manifest_of):
        with pytest.raises(ArtifactError, match="Unable to locate credentials"):
            read("s3://bucket/runs/small/artifact")


def test_a_copy_of_an_artifact_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    contents = {"encoder/model.safetensors": b"encoder", "heads/topic/head.json": b"head"}
    store, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"

    def put(files: Mapping[str, bytes], hashed: Mapping[str, bytes]) -> None:
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in hashed.items()}
        manifest = json.dumps({**MANIFEST, "files": hashes}).encode()
        store.pipe({f"{root}/{n}": c for n, c in {**files, "manifest.json": manifest}.items()})

    def fails(message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            fetch(f"memory:/{root}")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    put({"encoder/model.safetensors": b"encoder"}, contents)
    fails("heads/topic/head.json")
    put({**contents, "heads/topic/head.json": b"that of the next version"}, contents)
    fails("heads/topic/head.json: not the file that manifest.json names")
    put({**contents, "../beside.json": b""}, {**contents, "../../beside.json": b""})
    fails("beside.json: lies outside the artifact")
    put(contents, contents)
    folder = fetch(f"memory:/{root}")
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    store.rm(f"{root}/encoder", recursive=True)
    assert fetch(f"memory:/{root}") == folder


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("[]", "damaged"),
        ("null", "damaged"),
        ("[" * 100_000, "damaged: RecursionError"),
        (json.dumps({**MANIFEST, "files": []}), "damaged: 'files' is no mapping"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), "is newer than this software reads"),
    ],
    ids=["list", "null", "nested", "files", "newer"],
)
def test_a_manifest_that_cannot_be_read_is_named_by_its_place_before_anything_is_copied(
    manifest: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    store, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    store.pipe(f"{root}/manifest.json", manifest.encode())
    with pytest.raises(ArtifactError, match=f"{root}/manifest.json: .*{reason}"):
        fetch(f"memory:/{root}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket="bucket", Key="in.jsonl", Body=b"{}")
    assert download("s3://bucket/in.jsonl", tmp_path).read_bytes() == b"{}"
    for url in ("s3://bucket/im.jsonl", "s3://misspelt/in.jsonl"):
        with pytest.raises(ConfigError, match=f"{url}: no such file"):
            download(url, tmp_path)
    with pytest.raises(ConfigError, match=r"s4://.*: Protocol not known: s4"):
        download("s4://bucket/in.jsonl", tmp_path)


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_is_said_so(
    client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        run_command(lambda: print(download("s3://bucket/in.jsonl", Path())))
    message = capsys.readouterr().err
    assert message.startswith("error: storage: Could not connect")
    assert "check the network, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL" in message
