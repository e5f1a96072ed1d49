"""The experiments that ship are valid and fit the data they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.prepare import prepare
from mtl_core.loop import fit

CONFIGS = Path(__file__).parents[2] / "train_jobs" / "configs"
NER_TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_experiment(path).name.replace("-", "_") == path.stem


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sst2_with_conll2003_trains_on_datasets_of_their_columns(
    tmp_path: Path, tiny_encoders: dict[str, Path]
) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    glue = Features(
        sentence=Value("string"),
        label=ClassLabel(names=["negative", "positive"]),
        idx=Value("int32"),
    )
    conll = Features(
        id=Value("string"),
        tokens=List(Value("string")),
        pos_tags=List(Value("int64")),
        chunk_tags=List(Value("int64")),
        ner_tags=List(ClassLabel(names=NER_TAGS)),
    )
    words = ["EU", "rejects", "German", "call", "in", "Berlin"]
    sentences = [{"sentence": f"a fine film {i}", "label": i % 2, "idx": i} for i in range(20)]
    entities = [
        {
            "id": str(i),
            "tokens": words,
            "pos_tags": [0] * 6,
            "chunk_tags": [0] * 6,
            "ner_tags": [3, 0, 7, 0, 0, 5] if i else [3, 0, 7, 1, 0, 5],
        }
        for i in range(20)
    ]
    unlabelled = [{**row, "label": -1} for row in sentences]
    DatasetDict(
        train=Dataset.from_list(sentences, glue),
        validation=Dataset.from_list(sentences, glue),
        test=Dataset.from_list(unlabelled, glue),
    ).save_to_disk(tmp_path / "sst2")
    DatasetDict(
        {name: Dataset.from_list(entities, conll) for name in ("train", "validation", "test")}
    ).save_to_disk(tmp_path / "conll")
    experiment = load_experiment(
        CONFIGS / "sst2_conll2003.yaml",
        [
            f"data.0.hub={tmp_path / 'sst2'}",
            "data.0.subset=null",
            f"data.1.hub={tmp_path / 'conll'}",
            f"encoder.model={tiny_encoders['distilbert']}",
            "encoder.max_length=32",
            "training.epochs=1",
        ],
    )
    data = prepare(experiment)
    assert data.labels == {
        "sentiment": ("negative", "positive"),
        "ner": ("PER", "ORG", "LOC", "MISC"),
    }
    assert {task: int(present.sum()) for task, present in data.splits["test"].present.items()} == {
        "sentiment": 0,
        "ner": 20,
    }
    state = build_train_state(experiment, data)
    kinds = [event.kind for event in fit(state, data, experiment)]
    assert kinds[-2:] == ["validation", "checkpoint"]
