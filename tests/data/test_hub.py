"""Folders with the very columns and features of datasets on the Hub, read through `hub:`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtl_core.config import SourceConfig, TaskConfig
from mtl_core.data.examples import Corpus, Example, Span
from mtl_core.data.sources import read_source
from mtl_core.errors import DataError
from mtl_core.storage import may_pass

TASKS = {
    "topic": TaskConfig(kind="classification"),
    "ner": TaskConfig(kind="token_classification"),
}
SPLIT_NAMES = ("train", "validation", "test")
SST2: dict[str, str | int] = {"text": "sentence", "topic": "label"}


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def sst2() -> Any:
    """nyu-mll/glue, subset sst2: no row of its test split is labelled."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        {
            "sentence": Value("string"),
            "label": ClassLabel(names=["negative", "positive"]),
            "idx": Value("int32"),
        }
    )

    def split(*labels: int) -> Dataset:
        rows = [
            {"sentence": f"film {i}", "label": label, "idx": i} for i, label in enumerate(labels)
        ]
        return Dataset.from_list(rows, features=features)

    return DatasetDict(train=split(1, 0, -1), validation=split(1, 1), test=split(-1, -1))


@pytest.fixture
def conll2003() -> Any:
    """lhoestq/conll2003."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    types = ("PER", "ORG", "LOC", "MISC")
    names = ["O"] + [f"{prefix}-{name}" for name in types for prefix in "BI"]
    features = Features(
        {
            "id": Value("string"),
            "tokens": List(Value("string")),
            "pos_tags": List(ClassLabel(names=["NN", "VB"])),
            "chunk_tags": List(ClassLabel(names=["O", "B-NP"])),
            "ner_tags": List(ClassLabel(names=names)),
        }
    )
    row = {
        "id": "0",
        "tokens": ["EU", "sued", "Anna", "Bell"],
        "pos_tags": [0, 1, 0, 0],
        "chunk_tags": [1, 0, 1, 0],
        "ner_tags": [3, 0, 1, 2],
    }
    data = Dataset.from_list([row, row], features=features)
    return DatasetDict(train=data, validation=data, test=data)


def read(hub: Path | str, columns: dict[str, str | int], **options: Any) -> Corpus:
    source = SourceConfig.model_validate({"hub": str(hub), "columns": columns, **options})
    return read_source(source, TASKS, seed=1)


def check_sst2(corpus: Corpus) -> None:
    assert corpus.labels == {"topic": ("negative", "positive")}
    assert corpus.splits == {
        "train": [
            Example("film 0", {"topic": "positive"}),
            Example("film 1", {"topic": "negative"}),
        ],
        "validation": [
            Example("film 0", {"topic": "positive"}),
            Example("film 1", {"topic": "positive"}),
        ],
        "test": [],
    }


def test_sst2_saved_to_disk(tmp_path: Path, sst2: Any) -> None:
    sst2.save_to_disk(tmp_path / "sst2")
    check_sst2(read(tmp_path / "sst2", SST2))


def test_sst2_as_parquet(tmp_path: Path, sst2: Any) -> None:
    for name, data in sst2.items():
        (tmp_path / "sst2").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "sst2" / f"{name}-00000-of-00001.parquet")
    check_sst2(read(tmp_path / "sst2", SST2))


def test_the_hub_is_asked_for_id_subset_and_revision(
    sst2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load_dataset(*args: object, **options: object) -> Any:
        asked.append((args, options))
        return sst2

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_sst2(read("nyu-mll/glue", SST2, subset="sst2", revision="abc"))
    assert asked == [(("nyu-mll/glue", "sst2"), {"revision": "abc"})]


def test_conll2003(tmp_path: Path, conll2003: Any) -> None:
    conll2003.save_to_disk(tmp_path / "conll2003")
    corpus = read(tmp_path / "conll2003", {"words": "tokens", "ner": "ner_tags"})
    assert corpus.labels == {"ner": ("PER", "ORG", "LOC", "MISC")}
    spans = (Span(0, 2, "ORG"), Span(8, 17, "PER"))
    words = ((0, 2), (3, 7), (8, 12), (13, 17))
    expected = [Example("EU sued Anna Bell", {"ner": spans}, words)] * 2
    assert corpus.splits == dict.fromkeys(SPLIT_NAMES, expected)


def test_entities_with_declared_types(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    entity = {
        "start": Value("int32"),
        "end": Value("int32"),
        "label": ClassLabel(names=["b", "a"]),
    }
    rows = [{"text": "x y", "spans": [{"start": 0, "end": 1, "label": 1}]}] * 2
    features = Features({"text": Value("string"), "spans": List(entity)})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data")
    corpus = read(tmp_path / "data", {"text": "text", "ner": "spans"})
    assert corpus.labels == {"ner": ("b", "a")}
    assert corpus.splits["train"][0].targets == {"ner": (Span(0, 1, "a"),)}


def test_splits_take_other_names(tmp_path: Path, sst2: Any) -> None:
    sst2["dev"] = sst2.pop("validation")
    sst2.save_to_disk(tmp_path / "sst2")
    corpus = read(tmp_path / "sst2", SST2, splits={"test": "dev"})
    assert corpus.splits["test"] == corpus.splits["validation"]


def test_a_split_that_is_not_there(tmp_path: Path, sst2: Any) -> None:
    sst2.save_to_disk(tmp_path / "sst2")
    with pytest.raises(DataError, match=r"no split 'tset'; .* there is: train, validation, t"):
        read(tmp_path / "sst2", SST2, splits={"test": "tset"})
    del sst2["train"]
    sst2.save_to_disk(tmp_path / "held out")
    with pytest.raises(DataError, match=r"no split 'train'; .* there is: validation, test"):
        read(tmp_path / "held out", SST2)


def test_a_column_that_is_not_there(tmp_path: Path, sst2: Any) -> None:
    sst2.save_to_disk(tmp_path / "sst2")
    with pytest.raises(DataError, match=r"no column 'text'; .*sentence, label, idx"):
        read(tmp_path / "sst2", {"text": "text", "topic": "label"})


def test_a_subset_that_is_not_there(tmp_path: Path, sst2: Any) -> None:
    (tmp_path / "glue").mkdir()
    sst2["train"].to_parquet(tmp_path / "glue" / "train.parquet")
    with pytest.raises(DataError, match=r"'sst3' not found\. Available: .*; set `subset:`"):
        read(tmp_path / "glue", SST2, subset="sst3")


def test_class_names_that_are_no_tags(tmp_path: Path, conll2003: Any) -> None:
    conll2003.save_to_disk(tmp_path / "conll2003")
    with pytest.raises(DataError, match=r"columns\.ner: tag 'NN' belongs to no scheme"):
        read(tmp_path / "conll2003", {"words": "tokens", "ner": "pos_tags"})


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere", SST2)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="doesn't contain any data files"):
        read(tmp_path, SST2)


def test_without_the_hub_the_message_says_how_to_work_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/no: .*save_to_disk.* HF_HOME .* `path:`") as told:
        read("nobody/no", SST2, subset="sst2")
    assert not may_pass(told.value.__cause__)


def test_a_hub_that_does_not_answer_now_may_do_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="Couldn't reach") as told:
        read("a/b", SST2)
    assert may_pass(told.value.__cause__)


def test_an_id_that_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"a/b: Dataset 'a/b' doesn't exist\. Check the id and"):
        read("a/b", SST2)
