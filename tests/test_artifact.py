"""The artifact folder gives back what was put in, opens in other tools, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mtl_core.artifact import (
    SCHEMA_VERSION,
    load_config,
    load_head,
    load_model,
    load_parts,
    model_card,
    read_manifest,
)
from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.errors import ArtifactError
from mtl_core.folders import atomic_folder, copy_tree
from mtl_core.model import MultiTaskModel
from mtl_core.predictor import Predictor
from tests.small_runs import LABELS, changed, data, experiment, write_artifact

ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
TEXTS = ["Maria Lopez had the food in São Paulo", "a new phone in Berlin, cold", "日本語 🙂", "?"]


def untrained(folder: Path, **changes: Any) -> tuple[MultiTaskModel, Experiment]:
    config = experiment(folder, **changes)
    return build_train_state(config, data(config)).model.eval(), config


@pytest.fixture(scope="module")
def artifact(tiny_encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that tests only read."""
    return write_artifact(
        *untrained(tiny_encoders["bert"]), tmp_path_factory.mktemp("artifact") / "whole"
    )


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """One to damage."""
    folder = tmp_path / "artifact"
    for path in artifact.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(artifact)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def answers(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    """Logits of every task for every token or text, one text at a time."""
    tokens = [model.encoder.tokenizer(text, return_tensors="pt") for text in TEXTS]
    logits: dict[str, list[torch.Tensor]] = {task: [] for task in model.heads}
    with torch.inference_mode():
        for item in tokens:
            states, pooled = model.encoder(item["input_ids"], item["attention_mask"])
            for task, head in model.head_items:
                logits[task].append(head(pooled if head.level == "sentence" else states[0]))
    return {task: torch.cat(parts) for task, parts in logits.items()}


def tensor_sizes(path: Path) -> dict[str, int]:
    """Name → bytes of every tensor in a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118


# What comes back


@pytest.mark.parametrize("name", ENCODERS)
def test_a_loaded_model_gives_the_same_logits_to_the_bit(
    name: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    model, config = untrained(tiny_encoders[name], tasks={"hidden_size": 16})
    folder = write_artifact(model, config, tmp_path / "artifact")
    loaded = load_model(folder)
    assert not loaded.training
    assert not changed(answers(model), answers(loaded))
    assert loaded.encoder.pooling == model.encoder.pooling
    assert loaded.encoder.max_length == 48
    assert {task: head.labels for task, head in loaded.head_items} == LABELS
    assert load_config(folder) == config


def test_pooling_survives(tiny_encoders: dict[str, Path], tmp_path: Path) -> None:
    model, config = untrained(tiny_encoders["bert"], encoder={"pooling": "max"})
    folder = write_artifact(model, config, tmp_path / "artifact")
    assert read_manifest(folder).encoder["pooling"] == "max"
    assert load_model(folder).encoder.pooling == "max"
    assert not changed(answers(model), answers(load_model(folder)))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_is_stored_once(
    name: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    model, config = untrained(tiny_encoders[name])
    folder = write_artifact(model, config, tmp_path / "artifact")
    files = {path: tensor_sizes(path) for path in folder.rglob("*.safetensors")}
    stored = sum(size for sizes in files.values() for size in sizes.values())
    assert stored == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert set(files) == {
        folder / "encoder" / "model.safetensors",
        *(folder / "heads" / task / "head.safetensors" for task in model.heads),
    }
    for task, head in model.head_items:
        names = set(files[folder / "heads" / task / "head.safetensors"])
        assert names == set(head.state_dict())


def test_weights_are_safetensors_only(artifact: Path) -> None:
    endings = {path.suffix for path in artifact.rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".yaml", ".txt", ".md"}
    assert not [p for p in artifact.rglob("*") if p.is_file() and is_pickled(p)]


def is_pickled(path: Path) -> bool:
    return path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


HEAD_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("transformers", "tokenizers"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
from pathlib import Path
import torch
from mtl_core.artifact import load_head

for task in ("topic", "mood", "entities"):
    head = load_head(Path(sys.argv[1]) / "heads" / task)
    print(task, head(torch.ones(1, head.hidden_size)).double().sum().item(), head.training)
"""


def test_a_head_loads_where_there_is_no_transformers(artifact: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", HEAD_ALONE, str(artifact)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        task, total, training = line.split()
        expected = load_model(artifact).head(task)(torch.ones(1, 32)).double().sum().item()
        assert float(total) == expected
        assert training == "False"
    assert len(run.stdout.splitlines()) == 3


def test_an_encoder_can_be_opened_with_another_maximum_length(artifact: Path) -> None:
    encoder, _ = load_parts(artifact, max_length=16)
    assert encoder.max_length == 16


# Other tools


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("bert", "max"), ("mpnet", "mean")],  # positions of the second begin after padding's
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_opens_the_encoder(
    name: str, pooling: str, tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model, config = untrained(tiny_encoders[name], encoder={"pooling": pooling})
    folder = write_artifact(model, config, tmp_path / "artifact")
    theirs = SentenceTransformer(str(folder / "encoder"), device="cpu")
    assert theirs.max_seq_length == 48
    ours = torch.from_numpy(Predictor.load(folder).embed(TEXTS))
    torch.testing.assert_close(torch.from_numpy(theirs.encode(TEXTS)), ours, rtol=0, atol=1e-5)


def test_auto_model_opens_the_encoder(artifact: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(artifact / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(artifact / "encoder")
    with torch.inference_mode():
        states = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
        ours = load_model(artifact).encoder
        item = ours.tokenizer(TEXTS[0], return_tensors="pt")
        assert torch.equal(states, ours(item["input_ids"], item["attention_mask"])[0])


# What is wrong


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def apply(folder: Path) -> Path:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        return folder / name

    return apply


def truncate(name: str) -> Callable[[Path], Path]:
    def apply(folder: Path) -> Path:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        return folder / name

    return apply


def flip(name: str) -> Callable[[Path], Path]:
    def apply(folder: Path) -> Path:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        return folder / name

    return apply


def remove(name: str) -> Callable[[Path], Path]:
    def apply(folder: Path) -> Path:
        (folder / name).unlink()
        return folder / name

    return apply


DAMAGE = {
    "one bit of the encoder": (flip("encoder/model.safetensors"), "damaged"),
    "one bit of a head": (flip("heads/topic/head.safetensors"), "damaged"),
    "half an encoder": (truncate("encoder/model.safetensors"), "damaged"),
    "half a tokenizer": (truncate("encoder/tokenizer.json"), "damaged"),
    "half a manifest": (truncate("manifest.json"), "damaged"),
    "no encoder": (remove("encoder/model.safetensors"), "missing"),
    "no encoder config": (remove("encoder/config.json"), "missing"),
    "no head": (remove("heads/mood/head.safetensors"), "missing"),
    "no head.json": (remove("heads/mood/head.json"), "missing"),
    "no manifest": (remove("manifest.json"), "missing"),
    "newer schema": (
        rewrite("manifest.json", lambda m: m.update(schema_version=SCHEMA_VERSION + 1, new=1)),
        f"schema version {SCHEMA_VERSION + 1} is newer than .* upgrade",
    ),
    "schema in words": (
        rewrite("manifest.json", lambda m: m.update(schema_version="two")),
        "damaged",
    ),
    "no schema": (rewrite("manifest.json", lambda m: m.pop("schema_version")), "damaged"),
    "no tasks": (rewrite("manifest.json", lambda m: m.pop("tasks")), "damaged"),
    "tasks as text": (rewrite("manifest.json", lambda m: m.update(tasks="x")), "damaged"),
    "files as text": (rewrite("manifest.json", lambda m: m.update(files="x")), "damaged"),
    "no pooling": (rewrite("manifest.json", lambda m: m["encoder"].pop("pooling")), "damaged"),
    "other head": (rewrite("heads/topic/head.json", lambda h: h["labels"].pop()), "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_artifact_is_named_with_the_file_and_the_reason(case: str, copy: Path) -> None:
    damage, reason = DAMAGE[case]
    path = damage(copy)
    with pytest.raises(ArtifactError, match=reason) as caught:
        load_model(copy)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate("head.safetensors"), "damaged head"),
        (truncate("head.json"), "damaged head"),
        (remove("head.safetensors"), "missing"),
        (remove("head.json"), "missing"),
        (rewrite("head.json", lambda h: h["labels"].pop()), "damaged head"),
        (rewrite("head.json", lambda h: h.pop("hidden_size")), "damaged head"),
    ],
)
def test_a_damaged_head_alone_is_named_too(
    damage: Callable[[Path], Path], reason: str, copy: Path
) -> None:
    folder = copy / "heads" / "topic"
    damage(folder)
    with pytest.raises(ArtifactError, match=reason) as caught:
        load_head(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_artifact_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"manifest.json: missing; .* is no artifact"):
        load_model(tmp_path)


def test_a_damaged_configuration_is_an_artifact_error(copy: Path) -> None:
    (copy / "experiment.yaml").write_text("name: [", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"experiment\.yaml"):
        load_config(copy)


def test_what_the_manifest_says_can_be_read_without_hashing_everything(copy: Path) -> None:
    flip("encoder/model.safetensors")(copy)
    assert set(read_manifest(copy, check_files=False).tasks) == set(LABELS)


# Writing


def fill_half_way(folder: Path) -> None:
    with atomic_folder(folder) as partial:
        (partial / "new").write_text("new")
        raise RuntimeError("half way")


def test_a_folder_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        fill_half_way(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError("not now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), atomic_folder(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert [path.name for path in folder.iterdir()] == ["old"]


@pytest.mark.parametrize("old", [True, False])
def test_a_whole_folder_takes_the_place_of_the_old_one(old: bool, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "artifact"
    if old:
        folder.mkdir(parents=True)
        (folder / "old").write_text("old")
    with atomic_folder(folder) as partial:
        (partial / "new").write_text("new")
        assert folder.exists() == old
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
    assert [path.name for path in folder.iterdir()] == ["new"]


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_s_files_are_on_the_disk_before_it_has_its_name(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut might leave them empty, in a folder that counts as whole."""
    folder, kept = tmp_path / "artifact", set[bytes]()

    def fsync(file: int) -> None:
        assert not folder.exists()
        kept.add(os.pread(file, os.fstat(file).st_size, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(folder, replace) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "one").write_text("one")
        (partial / "two").write_text("two")
    assert kept == {b"one", b"two"}


def test_a_copied_artifact_is_sound_and_its_own(artifact: Path, tmp_path: Path) -> None:
    copy_tree(artifact, tmp_path)
    assert not changed(answers(load_model(artifact)), answers(load_model(tmp_path)))
    os.unlink(tmp_path / "manifest.json")
    assert (artifact / "manifest.json").is_file()


def test_the_model_card_has_a_row_for_every_score(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    manifest.tasks["topic"]["metrics"] = {"test": {"accuracy": 0.98765}}
    card = model_card(manifest, ["plots/confusion_topic.png"])
    assert "| topic | classification | 3 | test | accuracy | 98.77 |" in card
    assert "![confusion_topic](plots/confusion_topic.png)" in card
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")


def test_the_model_card_has_a_row_for_every_label(artifact: Path) -> None:
    row = {"precision": 0.5, "recall": 0.98765, "f1": 0.25, "support": 7}
    rows = {f"type {number}": row for number in range(50)} | {"a|b": row, "<none>\n": row}
    card = model_card(read_manifest(artifact), (), {"slots: by label (test)": rows})
    _, table = card.split("## slots: by label (test)\n\n| label | ")
    for number in range(50):
        assert f"| type {number} | 50.00 | 98.77 | 25.00 | 7 |" in table
    assert r"| a\|b | 50.00 |" in table
    assert "| &lt;none&gt; | 50.00 |" in table
