"""A corpus cut into shards holds what the same corpus holds when it is read whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtl_core.build import build_train_state
from mtl_core.config import Experiment, parse_experiment
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import Data, prepare, prepare_scored, reopen
from mtl_core.data.shards import ShardLoader
from mtl_core.encoder import tokenizer_of
from mtl_core.errors import ConfigError, DataError, EncoderError
from mtl_core.world import World
from tests.commands import ROOT
from tests.small_runs import write_artifact

ROWS = [{"text": f"line {i}", "label": "abc"[i % 3]} for i in range(1, 501)]
COLUMNS = {"text": "text", "t": "label"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def experiment(
    encoder: Path, *sources: dict[str, Any], size: int = 100, **tasks: Any
) -> Experiment:
    return parse_experiment(
        {
            "name": "x",
            "tasks": tasks or {"t": {"kind": "classification"}},
            "data": [{"columns": COLUMNS, **source} for source in sources],
            "encoder": {"model": str(encoder), "max_length": 16},
            "training": {"shard_texts": size},
        }
    )


@pytest.fixture
def encoder(tiny_encoders: dict[str, Path]) -> Path:
    return tiny_encoders["bert"]


def write(path: Path, rows: list[dict[str, Any]] = ROWS, end: str = "\n") -> dict[str, Any]:
    path.write_text("\n".join(map(json.dumps, rows)) + end, encoding="utf-8")
    return {"path": str(path)}


def parquet(folder: Path) -> dict[str, Any]:
    pd.DataFrame(ROWS).to_parquet(folder / "rows.parquet", row_group_size=20)
    return {"path": str(folder / "rows.parquet")}


def saved(folder: Path) -> dict[str, Any]:
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["c", "b", "a"])}
    )
    data = datasets.Dataset.from_list(ROWS, features=classes)
    datasets.DatasetDict(train=data).save_to_disk(folder / "saved")
    return {"hub": str(folder / "saved")}


SOURCES = {
    "jsonl": lambda folder: write(folder / "rows.jsonl"),
    "jsonl without a last newline": lambda folder: write(folder / "rows.jsonl", end=""),
    "jsonl with blank lines": lambda folder: write(folder / "rows.jsonl", end="\n\n \n"),
    "parquet": parquet,
    "hub": saved,
}


def loader(experiment: Experiment, data: Data) -> ShardLoader:
    assert data.shards is not None
    return ShardLoader(experiment, data.shards, data.keys["train"], data.labels, World())


def texts(split: EncodedSplit, experiment: Experiment, task: str = "t") -> Counter[tuple[str, int]]:
    """The words of every row with the number of its label."""
    tokenizer = tokenizer_of(experiment)
    ids = [split.input_ids[a:b] for a, b in zip(split.starts, split.starts[1:], strict=False)]
    rows = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Counter(zip(rows, split.targets[task].tolist(), strict=True))


def shards(experiment: Experiment, data: Data) -> list[EncodedSplit]:
    opened = loader(experiment, data)
    return [opened.open(number, None) for number in opened.order(0)]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_row_stands_in_one_shard_or_in_validation(
    kind: str, encoder: Path, tmp_path: Path
) -> None:
    chosen = experiment(encoder, SOURCES[kind](tmp_path))
    data = prepare(chosen)
    whole = prepare(
        chosen.model_copy(
            update={"training": chosen.training.model_copy(update={"shard_texts": None})}
        )
    )
    assert data.labels == whole.labels
    parts = [*shards(chosen, data), data.splits["validation"]]
    assert 4 <= len(parts) - 1 <= 5
    assert all(80 <= len(part) <= 120 for part in parts[:-1])
    assert 40 <= len(parts[-1]) <= 60
    everything = sum((texts(part, chosen) for part in parts), Counter())
    assert everything == texts(whole.splits["train"], chosen) + texts(
        whole.splits["validation"], chosen
    )
    assert len(everything) > 1


def test_a_shard_has_its_part_of_every_source_from_everywhere_in_it(
    encoder: Path, tmp_path: Path
) -> None:
    many = [{"text": f"many {i}", "label": "a"} for i in range(1000)]
    few = [{"text": f"few {i}", "label": "b"} for i in range(250)]
    for name, rows in (("validation", [many[0], few[0]]), ("train", many)):
        (tmp_path / "many").mkdir(exist_ok=True)
        write(tmp_path / "many" / f"{name}.jsonl", rows)
    sources = {"path": str(tmp_path / "many")}, write(tmp_path / "few.jsonl", few)
    chosen = experiment(encoder, *sources, size=120)
    data = prepare(chosen)
    found = shards(chosen, data)
    assert len(found) == 11
    for shard in found:
        labels = Counter(shard.targets["t"].tolist())
        assert labels[0] in range(85, 100)
        assert labels[1] in range(17, 25)
    assert data.labels == {"t": ("a", "b")}


def test_the_cut_goes_by_content_and_seed(encoder: Path, tmp_path: Path) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    first = prepare(chosen)
    os.utime(tmp_path / "rows.jsonl", (0, 0))
    again = prepare(chosen)
    assert first.keys == again.keys
    assert first.shards.fingerprint() == again.shards.fingerprint()
    other = prepare(chosen.model_copy(update={"seed": 1}))
    assert other.shards.fingerprint() != first.shards.fingerprint()
    write(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "text": "line 501"}])
    assert prepare(chosen).keys["train"] != first.keys["train"]


def test_a_corrected_label_of_a_parquet_file_makes_new_shards(
    encoder: Path, tmp_path: Path
) -> None:
    chosen = experiment(encoder, parquet(tmp_path))
    first = prepare(chosen)
    size = (tmp_path / "rows.parquet").stat().st_size
    rows = [{**row, "label": {"a": "b", "b": "a", "c": "c"}[row["label"]]} for row in ROWS]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet", row_group_size=20)
    assert (tmp_path / "rows.parquet").stat().st_size == size
    assert prepare(chosen).keys["train"] != first.keys["train"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_small_source_is_spread_over_the_shards_of_a_large_one(
    kind: str, encoder: Path, tmp_path: Path
) -> None:
    large = [{"text": f"large {i}", "label": "large"} for i in range(10_000)]
    few = [{"text": f"few {i}", "label": "few"} for i in range(30)]
    if kind == "jsonl":
        small = write(tmp_path / "few.jsonl", few)
    elif kind == "parquet":
        pd.DataFrame(few).to_parquet(tmp_path / "few.parquet")
        small = {"path": str(tmp_path / "few.parquet")}
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(few)).save_to_disk(tmp_path / "few")
        small = {"hub": str(tmp_path / "few")}
    chosen = experiment(encoder, write(tmp_path / "large.jsonl", large), small, size=1000)
    data = prepare(chosen)
    found = shards(chosen, data)
    assert len(found) == 10
    assert all(len(shard) <= 1010 for shard in found)
    number = data.labels["t"].index("few")
    drawn = [int((shard.targets["t"] == number).sum()) for shard in found]
    assert set(drawn) == {2, 3}
    held_out = data.splits["validation"].targets["t"]
    assert sum(drawn) + int((held_out == number).sum()) == len(few)


def test_a_source_of_fewer_rows_than_shards_is_in_some_of_them(
    encoder: Path, tmp_path: Path
) -> None:
    large = [{"text": f"large {i}", "label": "large"} for i in range(2000)]
    few = [{"text": f"few {i}", "label": "few"} for i in range(4)]
    sources = write(tmp_path / "large.jsonl", large), write(tmp_path / "few.jsonl", few)
    chosen = experiment(encoder, *sources)
    data = prepare(chosen)
    assert len(shards(chosen, data)) == 19
    assert sum(texts(shard, chosen).total() for shard in shards(chosen, data)) in (1803, 1804)


def test_labels_that_only_one_source_declares_are_looked_for_in_the_others(
    encoder: Path, tmp_path: Path
) -> None:
    other = [{"text": f"other {i}", "label": "d"} for i in range(100)]
    chosen = experiment(encoder, saved(tmp_path), write(tmp_path / "other.jsonl", other))
    assert prepare(chosen).labels == {"t": ("c", "b", "a", "d")}


def test_the_line_of_a_wrong_byte_is_that_of_the_file(encoder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    lines[399] = b'{"text": "caf\xe9", "label": "a"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"rows\.jsonl:400: byte 0xe9 is not utf-8"):
        prepare(experiment(encoder, source))


def test_another_process_finds_the_same_shards_with_and_without_a_cache(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    data = prepare(chosen)
    for place in ("cache", "elsewhere"):
        monkeypatch.setenv("MTL_CACHE", str(tmp_path / place))
        found = reopen(chosen, data.labels, data.keys)
        assert found.shards.fingerprint() == data.shards.fingerprint()
        assert found.keys == data.keys
        assert found.splits.keys() == data.splits.keys()
    write(tmp_path / "rows.jsonl", ROWS[:-1])
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "third"))
    with pytest.raises(DataError, match="differ from those that the run's driver found"):
        reopen(chosen, data.labels, data.keys)


def test_an_artifact_is_scored_on_what_its_training_held_out(encoder: Path, tmp_path: Path) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    data = prepare(chosen)
    artifact = write_artifact(
        build_train_state(chosen, data).model, chosen, tmp_path / "artifact", data
    )
    validation = prepare_scored(artifact, "validation").splits["validation"]
    assert texts(validation, chosen) == texts(data.splits["validation"], chosen)
    train = prepare_scored(artifact, "train").splits["train"]
    trained = sum((texts(shard, chosen) for shard in shards(chosen, data)), Counter())
    assert texts(train, chosen) == trained
    few = prepare_scored(artifact, "train", limit=3).splits["train"]
    assert len(few) == 3
    assert not texts(few, chosen) - trained
    with pytest.raises(DataError, match="no labelled rows in test"):
        prepare_scored(artifact, "test")
    write(tmp_path / "rows.jsonl", ROWS[::-1])
    with pytest.raises(DataError, match="validation has changed since the artifact was made"):
        prepare_scored(artifact, "validation")


def test_rows_skipped_in_what_is_carved_for_validation_are_counted(
    encoder: Path, tmp_path: Path
) -> None:
    rows = [row | {"text": text} for row in ROWS for text in (row["text"], " ")]
    source = write(tmp_path / "rows.jsonl", rows)
    chosen = experiment(encoder, {**source, "on_bad_row": "skip"})
    data = prepare(chosen)
    assert data.skipped == {source["path"]: 100 - len(data.splits["validation"])}
    artifact = write_artifact(
        build_train_state(chosen, data).model, chosen, tmp_path / "artifact", data
    )
    assert prepare_scored(artifact, "validation").skipped == data.skipped
    assert prepare_scored(artifact, "train").skipped == {source["path"]: 500}


def test_the_columns_of_held_out_files_are_checked(encoder: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl")
    chosen = experiment(encoder, {"path": str(tmp_path)})
    lacking = [{"text": row["text"]} for row in ROWS]
    write(tmp_path / "test.jsonl", lacking)
    write(tmp_path / "validation.jsonl", lacking)
    data = prepare(chosen)
    problem = "no column 'label', so"
    assert data.notes == (
        f"{tmp_path}/validation.jsonl: {problem} a part of train takes its place; there is: text",
        f"{tmp_path}/test.jsonl: {problem} it is not scored; there is: text",
    )
    assert len(data.splits["validation"])


def test_epochs_go_through_all_shards_in_orders_of_their_own(encoder: Path, tmp_path: Path) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"), size=20)
    orders = [loader(chosen, prepare(chosen)).order(epoch) for epoch in range(3)]
    assert [sorted(order) for order in orders] == [orders[0]] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_labels_that_are_named_spare_reading_the_corpus(encoder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, *[{"text": " ", "label": "a"}] * 3]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:50[123]: the text is empty"):
        prepare(experiment(encoder, source))
    named = experiment(encoder, source, t={"kind": "classification", "labels": ["a", "b", "c"]})
    data = prepare(named)
    with pytest.raises(DataError, match=r"rows\.jsonl:50[123]: the text is empty"):
        shards(named, data)
    skipping = experiment(encoder, {**source, "on_bad_row": "skip"})
    assert sum(len(shard) for shard in shards(skipping, prepare(skipping))) in range(440, 460)


def test_a_label_that_is_not_named_is_found_when_its_shard_is_read(
    encoder: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl")
    named = experiment(encoder, source, t={"kind": "classification", "labels": ["a", "b"]})
    with pytest.raises(DataError, match="label 'c' of task 't' is not a known one"):
        shards(named, prepare(named))


def test_a_part_that_was_made_is_not_made_again(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    data = prepare(chosen)
    first = shards(chosen, data)
    monkeypatch.setattr("mtl_core.data.shards.encode_split", None)
    assert [len(shard) for shard in shards(chosen, data)] == [len(shard) for shard in first]


def test_the_following_shard_is_made_while_one_is_trained_on(encoder: Path, tmp_path: Path) -> None:
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    opened = loader(chosen, prepare(chosen))
    opened.open(0, 1)
    opened.making[1].result(30)
    opened.close()
    assert len(list((tmp_path / "cache/encoded").glob(f"{opened.key}-*"))) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "rows.csv"}, "reads JSONL and Parquet files"),
        ({"path": "rows.jsonl.gz"}, "uncompressed"),
        ({"path": "gone.jsonl"}, r"no such file or folder; in its folder: .*rows\.csv"),
        ({"path": "rows.jsonl", "encoding": "utf-16"}, "uncompressed"),
        (
            {"path": "rows.jsonl", "columns": {"text": "txt", "t": "label"}},
            "no column 'txt'; did you mean 'text'",
        ),
        (
            {"path": "rows.jsonl", "columns": {"text": "text", "t": "lable"}},
            "no column 'lable'; did you mean 'label'",
        ),
        ({"path": "one.jsonl"}, "too few rows to cut"),
        ({"path": "empty.jsonl"}, "too few rows to cut"),
        ({"path": "empty.parquet"}, "too few rows to cut"),
        ({"path": "bad.parquet"}, "no readable Parquet file"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    source: dict[str, Any], message: str, encoder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl")
    write(tmp_path / "one.jsonl", ROWS[:1])
    pd.DataFrame(ROWS[:0], columns=["text", "label"]).to_parquet(tmp_path / "empty.parquet")
    for name in ("rows.csv", "rows.jsonl.gz", "bad.parquet", "empty.jsonl"):
        (tmp_path / name).write_text("" if name == "empty.jsonl" else "text,label\na,b\n")
    with pytest.raises(DataError, match=message):
        prepare(experiment(encoder, {**source, "path": str(tmp_path / source["path"])}))


@pytest.mark.parametrize("empty", [0, 3, 7])
def test_row_groups_without_rows_are_passed_over(empty: int, encoder: Path, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS[:350])
    with pq.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        for number in range(8):
            rows = 0 if number == empty else 50
            first = 50 * (number - (number > empty))
            writer.write_table(table.slice(first, rows))
    chosen = experiment(encoder, {"path": str(tmp_path / "rows.parquet")})
    data = prepare(chosen)
    parts = [*shards(chosen, data), data.splits["validation"]]
    found = sum((texts(part, chosen) for part in parts), Counter())
    assert found.total() == 350


def test_one_row_group_gives_about_the_fraction_to_validation(
    encoder: Path, tmp_path: Path
) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    data = prepare(experiment(encoder, {"path": str(tmp_path / "rows.parquet")}, size=500))
    assert len(data.splits["validation"]) in range(40, 61)


@pytest.mark.parametrize("seed", range(6))
def test_a_label_whose_only_row_became_validation_stays_known(
    seed: int, encoder: Path, tmp_path: Path
) -> None:
    rows = [*ROWS[:10], {"text": "rare", "label": "rare"}]
    chosen = experiment(encoder, write(tmp_path / "rows.jsonl", rows), size=11)
    chosen = chosen.model_copy(update={"seed": seed})
    assert prepare(chosen).labels == {"t": ("a", "b", "c", "rare")}


def test_row_groups_larger_than_a_shard_are_refused(encoder: Path, tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        DataError, match=r"a row group has 500 rows; write it with row groups of 1,"
    ):
        prepare(experiment(encoder, {"path": str(tmp_path / "rows.parquet")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": [{"path": "x.jsonl", "columns": COLUMNS, "limit": 5}]}, r"data\.0\.limit"),
        ({"tasks": {"t": {"kind": "classification", "class_weights": "balanced"}}}, "balanced"),
        ({"training": {"shard_texts": 0}}, "shard_texts"),
    ],
)
def test_settings_that_need_the_whole_corpus_are_refused(
    change: dict[str, Any], message: str
) -> None:
    base = experiment(Path("x"), {"path": "x.jsonl"}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=message):
        parse_experiment({**base, **change})


def test_a_rank_hears_that_another_could_not_read_its_texts(encoder: Path, tmp_path: Path) -> None:
    class Unlucky(World):
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1

    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    data = prepare(chosen)
    assert data.shards is not None
    unlucky = Unlucky(rank=1, size=2, local_rank=1)
    opened = ShardLoader(chosen, data.shards, data.keys["train"], data.labels, unlucky)
    with pytest.raises(DataError, match="another worker could not read its texts"):
        opened.open(0, 1)
    assert not opened.making


@pytest.mark.parametrize("error", [EncoderError("no tokenizer"), RuntimeError("no thread")])
def test_a_rank_tells_the_others_whatever_kept_it_from_its_texts(
    error: Exception, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []

    class Telling(World):
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            told.extend(tensor.tolist())
            return tensor

    def refuse(_: Any) -> None:
        raise error

    chosen = experiment(encoder, write(tmp_path / "rows.jsonl"))
    data = prepare(chosen)
    assert data.shards is not None
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr("mtl_core.data.shards.tokenizer_of", refuse)
    world = Telling(rank=0, size=2)
    opened = ShardLoader(chosen, data.shards, data.keys["train"], data.labels, world)
    with pytest.raises(type(error), match=str(error)):
        opened.open(0, 1)
    assert told == [1.0]


PREPARE = """
import json, sys, time
from pathlib import Path
from mtl_core.config import parse_experiment
from mtl_core.data.prepare import prepare
from mtl_core.data.shards import ShardLoader
from mtl_core.encoder import tokenizer_of
from mtl_core.world import World

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

raw = json.loads(sys.argv[1])
chosen = parse_experiment(raw)
tokenizer_of(chosen)
before = peak()
started = time.perf_counter()
data = prepare(chosen)
if data.shards is not None:
    ShardLoader(chosen, data.shards, data.keys["train"], data.labels, World()).open(0, None)
print(json.dumps([time.perf_counter() - started, peak() - before]))
"""


@pytest.mark.slow
def test_the_first_shard_of_a_large_corpus_costs_a_small_part_of_the_whole(
    encoder: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"a line with the number {i}", "label": "abc"[i % 3]} for i in range(40_000)]
    source = {**write(tmp_path / "rows.jsonl", rows), "validation_fraction": 0.01}
    named = {"kind": "classification", "labels": ["a", "b", "c"]}
    found = []
    for size in (None, 1000):
        raw = experiment(encoder, source, size=size, t=named).model_dump_json()
        command = [sys.executable, "-c", PREPARE, raw]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        found.append(json.loads(done.stdout))
    (seconds, memory), (first_seconds, first_memory) = found
    assert first_seconds < seconds / 4
    assert first_memory < memory / 2, found  # some of it is for any corpus
