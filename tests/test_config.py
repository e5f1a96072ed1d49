"""An experiment file is short, complete, and every mistake in it is named with its fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtl_core import config
from mtl_core.config import (
    Config,
    Experiment,
    dump_experiment,
    expand_path,
    load_experiment,
    parse_experiment,
)
from mtl_core.errors import ConfigError

TEN_LINES = """\
tasks:
  intent: {kind: classification}
  slots: {kind: token_classification}
data:
  - path: data/snips
    columns: {words: tokens, intent: label, slots: tags}
optim:
  learning_rate: 3e-4
training:
  epochs: 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "snips.yaml"
    path.write_text(TEN_LINES, encoding="utf-8")
    return path


def raw(**changes: Any) -> dict[str, Any]:
    source = {"path": "x.jsonl", "columns": {"text": "text", "intent": "label"}}
    minimal = {"name": "x", "tasks": {"intent": {"kind": "classification"}}, "data": [source]}
    return minimal | changes


def message(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse_experiment(raw(**changes))
    return str(error.value)


def test_ten_lines_are_an_experiment_named_after_its_file(file: Path) -> None:
    experiment = load_experiment(file)
    assert experiment.name == "snips"
    assert experiment.tasks["slots"].kind == "token_classification"
    assert experiment.data[0].task_columns == {"intent": "label", "slots": "tags"}
    assert experiment.optim.learning_rate == 3e-4
    assert experiment.training.epochs == 4
    assert experiment.encoder.model == "sentence-transformers/all-MiniLM-L6-v2"


def test_the_demo_source_knows_its_own_columns() -> None:
    tasks = {"sentiment": {"kind": "classification"}, "entities": {"kind": "token_classification"}}
    experiment = parse_experiment({"name": "x", "tasks": tasks, "data": [{"demo": True}]})
    assert set(experiment.data[0].task_columns) == set(tasks)


@pytest.mark.parametrize(
    ("changes", "path", "suggestion"),
    [
        ({"optin": {}}, "optin", "optim"),
        ({"optim": {"learning_rte": 1}}, "optim.learning_rte", "learning_rate"),
        ({"training": {"epoch": 1}}, "training.epoch", "epochs"),
        (
            {"tasks": {"intent": {"kind": "classification", "lables": ["a"]}}},
            "tasks.intent.lables",
            "labels",
        ),
        ({"data": [{"pth": "x", "columns": {}}]}, "data.0.pth", "path"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_one(
    changes: Any, path: str, suggestion: str
) -> None:
    text = message(**changes)
    assert f"{path}: unknown key; did you mean '{suggestion}'?" in text


def test_an_unknown_key_far_from_all_others_gets_no_suggestion() -> None:
    assert message(zzz=1) == "experiment: zzz: unknown key"


@pytest.mark.parametrize(
    ("changes", "place", "value"),
    [
        ({"training": {"epochs": 0}}, "training.epochs", "0"),
        ({"optim": {"learning_rate": -0.1}}, "optim.learning_rate", "-0.1"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate", "nan"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1", "1.0"),
        ({"encoder": {"dropout": 1.0}}, "encoder.dropout", "1.0"),
        ({"encoder": {"pooling": "sum"}}, "encoder.pooling", "'sum'"),
        ({"scale": {"max_failures": -2}}, "scale.max_failures", "-2"),
        ({"seed": -1}, "seed", "-1"),
        ({"name": "../up"}, "name", "'../up'"),
        ({"mixing": {"temperature": 0}}, "mixing.temperature", "0"),
        ({"freeze": {"layers": -1}}, "freeze.layers", "-1"),
    ],
)
def test_a_value_out_of_range_names_the_field_and_the_value(
    changes: Any, place: str, value: str
) -> None:
    text = message(**changes)
    assert text.startswith(f"experiment: {place}: ")
    assert text.endswith(f"(got {value})")


def test_a_label_that_is_named_twice_is_refused() -> None:
    said = message(tasks={"intent": {"kind": "classification", "labels": ["a", "b", "a"]}})
    assert said.startswith("experiment: tasks.intent.labels: a label is named twice")


def test_several_mistakes_are_told_at_once() -> None:
    text = message(seed=-1, training={"epochs": 0})
    assert "\n  seed: " in text
    assert "\n  training.epochs: " in text


SOURCE = {"path": "x.jsonl", "columns": {"text": "text", "intent": "label"}}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": [SOURCE | {"hub": "x"}]}, ("data.0", "exactly one of path, hub or demo")),
        ({"data": [SOURCE | {"path": None}]}, ("exactly one of path, hub or demo",)),
        ({"data": [{"path": "x", "columns": {"text": "t"}}]}, ("names no task",)),
        ({"data": [{"path": "x", "columns": {"intent": "t"}}]}, ("`text`, `words`",)),
        (
            {"data": [SOURCE | {"columns": {"text": "t", "intents": "l", "intent": "i"}}]},
            ("data.0.columns", "'intents'", "did you mean 'intent'?"),
        ),
        (
            {"tasks": {"intent": {"kind": "classification"}, "ner": {"kind": "multilabel"}}},
            ("tasks.ner has no labels", "`ner: <column>`"),
        ),
        ({"freeze": {"heads": ["intend"]}}, ("freeze.heads", "did you mean 'intent'?")),
        ({"training": {"metric": "zzz/f1"}}, ("training.metric", "there is: intent")),
        ({"training": {"metric": "intent/f2"}}, ("training.metric", "no 'f2'", "accuracy")),
        ({"freeze": {"encoder": True, "unfreeze_every": 1}}, ("freeze", "unfreeze_every")),
        ({"scale": {"workers": [4, 2]}}, ("scale.workers", "min <= max")),
        ({"tasks": {}}, ("tasks",)),
        ({"data": []}, ("data",)),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes: Any, parts: tuple[str, ...]) -> None:
    text = message(**changes)
    for part in parts:
        assert part in text


def test_a_task_cannot_take_the_name_of_a_column() -> None:
    assert "'text' is a reserved" in message(
        tasks={"text": {"kind": "classification"}, "intent": {"kind": "classification"}}
    )


def test_names_of_tasks_differ_in_more_than_case() -> None:
    tasks = {name: {"kind": "classification"} for name in ("intent", "ner", "Intent")}
    said = message(tasks=tasks, data=[SOURCE | {"columns": {"text": "t"} | {n: n for n in tasks}}])
    assert "tasks: 'intent' and 'Intent' would be one folder" in said
    assert said.endswith("rename one")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a: [1", "not valid YAML"), ("- a\n- b", "got list"), ("", "got NoneType")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason) as error:
        load_experiment(path)
    assert str(error.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read"):
        load_experiment(tmp_path / "nowhere.yaml")


def test_overrides_are_applied_in_order(file: Path) -> None:
    experiment = load_experiment(
        file,
        [
            "training.epochs=7",
            "training.epochs=9",
            "optim.learning_rate=1e-5",
            "freeze.heads=[slots]",
            "data.0.path=other",
            "data.0.columns.intent=2",
            "tasks.intent.labels=[a, b]",
            "scale.workers=[1, 4]",
            "encoder.dropout=null",
            "name=again",
        ],
    )
    assert experiment.training.epochs == 9
    assert experiment.optim.learning_rate == 1e-5
    assert experiment.freeze.heads == ("slots",)
    assert experiment.data[0].path == "other"
    assert experiment.data[0].columns["intent"] == 2
    assert experiment.tasks["intent"].labels == ("a", "b")
    assert experiment.scale.workers == (1, 4)
    assert experiment.encoder.dropout is None
    assert experiment.name == "again"


def test_an_override_of_one_alias_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "tasks: {a: &t {kind: classification, dropout: 0.2}, b: *t}\n"
        "data: [{path: x.jsonl, columns: {text: text, a: a, b: b}}]\n"
        "training:\n  # epochs: 5\n",
        encoding="utf-8",
    )
    experiment = load_experiment(path, ["tasks.a.dropout=0.7", "training.epochs=3"])
    assert (experiment.tasks["a"].dropout, experiment.tasks["b"].dropout) == (0.7, 0.2)
    assert experiment.training.epochs == 3


def test_an_override_finds_names_that_hold_dots(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "tasks: {topic: {kind: classification}, topic.v2: {kind: classification}}\n"
        "data: [{path: x.jsonl, columns: {text: text, topic: a, topic.v2: b}}]\n",
        encoding="utf-8",
    )
    overrides = ["tasks.topic.v2.loss_weight=2", "tasks.topic.dropout=0", "optim.warmup=0"]
    experiment = load_experiment(path, [*overrides, "data.0.columns.topic.v2=c"])
    assert list(experiment.tasks) == ["topic", "topic.v2"]
    assert [task.loss_weight for task in experiment.tasks.values()] == [1.0, 2.0]
    assert [task.dropout for task in experiment.tasks.values()] == [0.0, 0.1]
    assert experiment.data[0].task_columns == {"topic": "a", "topic.v2": "c"}


def test_a_key_that_is_set_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("training:\n  epochs: 5\n\ntraining:\n  batch_size: 8\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)'training' is set twice.*line 4"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.epochs", "expected key=value"),
        ("=5", "expected key=value"),
        ("data.1.path=x", "'1' is no index into a list of 1"),
        ("data.first.path=x", "'first' is no index"),
        ("training.epochs.more=1", "'epochs' holds a value"),
        ("training.epochs=[1", "not valid YAML"),
        ("training.epochs=0", "training.epochs"),
        ("training.epoch=1", "did you mean 'epochs'"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(file: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(file, [override])
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4", ".0003", "+3e-04"])
def test_a_rate_is_a_number_however_it_is_written(file: Path, text: str) -> None:
    experiment = load_experiment(file, [f"optim.learning_rate={text}"])
    assert experiment.optim.learning_rate == pytest.approx(3e-4)


@pytest.mark.parametrize("text", ["1.2.3", "e5", "1e", "2024-01-02x", "3e-4b"])
def test_what_only_looks_like_a_number_stays_text(file: Path, text: str) -> None:
    assert load_experiment(file, [f"encoder.revision={text}"]).encoder.revision == text


def test_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_TEST_BUCKET", "s3://bucket")
    assert expand_path("${MTL_TEST_BUCKET}/data") == "s3://bucket/data"
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand_path("~/data") == "/home/someone/data"


@pytest.mark.parametrize("path", ["${MTL_TEST_UNSET}/x", "/a/$MTL_TEST_UNSET"])
def test_a_variable_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.delenv("MTL_TEST_UNSET", raising=False)
    with pytest.raises(ConfigError, match="environment variable MTL_TEST_UNSET is not set"):
        expand_path(path)


def test_what_is_dumped_loads_as_the_same_experiment(file: Path, tmp_path: Path) -> None:
    overrides = [
        "tasks.intent.labels=['yes', 'no', '1', 'null', '日本', 'on']",
        "tasks.intent.class_weights={'no': 2.5}",
        "scale.workers=[1, 3]",
        "data.0.splits={validation: dev}",
        "optim.learning_rate=1e-7",
        "optim.max_grad_norm=null",
    ]
    experiment = load_experiment(file, overrides)
    dumped = tmp_path / "other-name.yaml"
    dumped.write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(dumped) == experiment
    assert experiment.tasks["intent"].labels == ("yes", "no", "1", "null", "日本", "on")


def test_text_that_looks_like_a_rate_survives_dumping(tmp_path: Path) -> None:
    experiment = parse_experiment(raw(encoder={"revision": "3e4"}))  # a short commit hash
    dumped = tmp_path / "x.yaml"
    dumped.write_text(dump_experiment(experiment), encoding="utf-8")
    assert load_experiment(dumped) == experiment


@given(
    st.floats(min_value=1e-300, max_value=1e300),
    st.text("abz é日🙂\"'#:-\n\t[]{}", min_size=1, max_size=20),
)
def test_every_number_and_label_survives_dumping(rate: float, label: str) -> None:
    tasks = {"intent": {"kind": "classification", "labels": [label]}}
    experiment = parse_experiment(raw(optim={"learning_rate": rate}, tasks=tasks))
    text = dump_experiment(experiment)
    again = parse_experiment(config.yaml.load(text, Loader=config._Loader))
    assert again == experiment


def test_an_experiment_cannot_be_changed(file: Path) -> None:
    experiment = load_experiment(file)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.seed = 1  # type: ignore[misc]


def config_classes() -> list[type[Config]]:
    return sorted(Config.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", config_classes())
def test_every_field_says_what_it_is(kind: type[Config]) -> None:
    sections = config_classes()
    for name, field in kind.model_fields.items():
        if field.annotation in sections:
            continue  # a section's own fields speak for it
        assert field.description, f"{kind.__name__}.{name} has no docstring"
        assert field.description.rstrip().endswith((".", "…")), f"{kind.__name__}.{name}"
    assert Experiment in sections
