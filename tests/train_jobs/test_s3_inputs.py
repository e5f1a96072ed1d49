"""Commands of one process with artifact and input behind s3://, as with both on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_core.build import build_train_state
from mtl_core.errors import ConfigError, DataError
from tests.s3_server import s3_server
from tests.small_runs import data, examples, experiment, write_artifact, write_rows
from train_jobs import evaluate, similarity

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def folder(
    tiny_encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder whose files are in the bucket too; what is fetched goes to a cache beside it."""
    import s3fs

    folder = tmp_path / "bucket"
    config = experiment(tiny_encoders["bert"])
    write_artifact(build_train_state(config, data(config)).model, config, folder / "artifact")
    write_rows(folder / "test.jsonl", examples(0, 20))
    (folder / "lines.txt").write_text("東京 is wonderful\nthe food was cold\n", encoding="utf-8")
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    with s3_server("bucket") as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", path.relative_to(folder).as_posix())
        yield folder
    s3fs.S3FileSystem.clear_instance_cache()


def test_evaluation(folder: Path, tmp_path: Path) -> None:
    reports = []
    for root in (str(folder), "s3://bucket"):
        for name in ("test.jsonl", ""):  # the file, and the folder that it lies in
            report = tmp_path / f"{len(reports)}.json"
            files = ("--data", f"topic={root}/{name}", "--output", str(report))
            evaluate.main(["--artifact", f"{root}/artifact", *files])
            reports.append(report.read_text(encoding="utf-8"))
    assert len(set(reports)) == 1
    assert '"topic"' in reports[0]
    wrong = ("--data", "topic=s3://bucket/text.jsonl")
    with pytest.raises(DataError, match=r"s3://bucket/text\.jsonl: no such file .* 'test\.jsonl'"):
        evaluate.main(["--artifact", "s3://bucket/artifact", *wrong])


def test_similarity(folder: Path, tmp_path: Path) -> None:
    for root, name in ((str(folder), "here"), ("s3://bucket", "there")):
        files = ("--input", f"{root}/lines.txt", "--output", str(tmp_path / name))
        similarity.main(["--artifact", f"{root}/artifact", *files])
    table = (tmp_path / "there.csv").read_text(encoding="utf-8")
    assert table == (tmp_path / "here.csv").read_text(encoding="utf-8")
    assert table.startswith(",東京 is wonderful,the food was cold\n")
    assert (tmp_path / "there.png").stat().st_size > 1000
    wrong = ("--input", "s3://bucket/line.txt")
    with pytest.raises(ConfigError, match=r"s3://bucket/line\.txt: no such file"):
        similarity.main(["--artifact", "s3://bucket/artifact", *wrong])
