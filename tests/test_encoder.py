"""One encoder class for every architecture, and vectors that other libraries agree with."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_core import encoder as encoder_module
from mtl_core.config import EncoderConfig
from mtl_core.encoder import SentenceEncoder, embeddings_name, layers, load_tokenizer, resolve_model
from mtl_core.errors import EncoderError
from mtl_core.folders import file_sha256

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet", "deberta-v2-conv")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = [
    "Maria Lopez waited two hours in Berlin and the food was cold.",
    "a",
    "東京 は とても 楽しい",
    "café cafe\u0301 🙂👍🏽, naïve!",
    "play the newest song by Zoë on my Friday-night playlist, please " * 3,
]


@pytest.fixture(scope="module")
def folders(tiny_encoders: dict[str, Path], tiny_deberta_conv: Path) -> dict[str, Path]:
    return tiny_encoders | {"deberta-v2-conv": tiny_deberta_conv}


def load(folder: Path, pooling: Any = "auto", max_length: int = 48) -> SentenceEncoder:
    config = EncoderConfig(model=str(folder), pooling=pooling, max_length=max_length)
    return SentenceEncoder.load(config).eval()


def tokenize(encoder: SentenceEncoder, texts: list[str]) -> tuple[Tensor, Tensor]:
    encoded = encoder.tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=encoder.max_length,
        return_tensors="pt",
    )
    return encoded["input_ids"], encoded["attention_mask"]


@torch.inference_mode()
def unit_vectors(encoder: SentenceEncoder, texts: list[str]) -> Any:
    _, pooled = encoder(*tokenize(encoder, texts))
    return torch.nn.functional.normalize(pooled, dim=-1).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_saved_encoder_gives_the_same_vectors_in_sentence_transformers(
    folders: dict[str, Path], name: str, pooling: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = load(folders[name], pooling)
    encoder.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert theirs.max_seq_length == encoder.max_length
    np.testing.assert_allclose(theirs.encode(TEXTS), unit_vectors(encoder, TEXTS), atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_saving_and_loading_changes_no_bit(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModel

    encoder = load(folders[name], "max")
    encoder.save(tmp_path)
    again = load(tmp_path)
    ids, mask = tokenize(encoder, TEXTS)
    assert torch.equal(tokenize(again, TEXTS)[0], ids)
    states, pooled = encoder(ids, mask)
    assert again.pooling == "max"
    assert torch.equal(again(ids, mask)[0], states)
    assert torch.equal(again(ids, mask)[1], pooled)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(input_ids=ids, attention_mask=mask).last_hidden_state, states)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_padding_changes_no_vector(folders: dict[str, Path], name: str, pooling: str) -> None:
    encoder = load(folders[name], pooling)
    batch = unit_vectors(encoder, TEXTS)
    alone = np.concatenate([unit_vectors(encoder, [text]) for text in TEXTS])
    np.testing.assert_allclose(batch, alone, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_lower_and_upper_part_make_the_whole_at_every_depth(
    folders: dict[str, Path], name: str
) -> None:
    encoder = load(folders[name])
    ids, mask = tokenize(encoder, TEXTS)
    whole, pooled = encoder(ids, mask)
    real = mask.bool()
    previous = torch.zeros_like(whole)
    for depth in range(1, encoder.num_layers + 1):
        states = encoder.lower(depth, ids, mask)
        assert not torch.allclose(states[real], previous[real], atol=1e-3)
        previous = states
        top, vectors = encoder.upper(depth, states, mask)
        torch.testing.assert_close(top[real], whole[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vectors, pooled, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder(ids, mask)[0], whole), "splitting must leave the encoder as it was"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_embeddings_are_found(folders: dict[str, Path], name: str) -> None:
    encoder = load(folders[name])
    stack = layers(encoder.transformer)
    assert encoder.num_layers == len(stack) == 3
    assert len({id(layer) for layer in stack}) == 3
    in_layers = {id(p) for p in stack.parameters()}
    embeddings = encoder.transformer.get_submodule(embeddings_name(encoder.transformer))
    table = encoder.transformer.get_input_embeddings().weight
    assert any(p is table for p in embeddings.parameters())
    assert not in_layers & {id(p) for p in embeddings.parameters()}


@torch.inference_mode()
def test_the_layers_are_in_the_order_in_which_they_run(folders: dict[str, Path]) -> None:
    encoder = load(folders["bert"])
    ran: list[int] = []
    for depth, layer in enumerate(layers(encoder.transformer)):
        layer.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
    encoder(*tokenize(encoder, TEXTS))
    assert ran == [0, 1, 2]


@torch.inference_mode()
def test_every_way_through_the_lower_layers_counts_as_a_pass(folders: dict[str, Path]) -> None:
    encoder = load(folders["bert"])
    ids, mask = tokenize(encoder, TEXTS)
    encoder(ids, mask)
    states = encoder.lower(2, ids, mask)
    encoder.upper(2, states, mask)
    assert encoder.num_passes == 2


def test_the_default_model_gives_the_vectors_that_sentence_transformers_gives(minilm: str) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [
        *TEXTS,
        "x" * 300,
        " leading and trailing spaces ",
        "tabs\tand\nnew lines",
        "ALL CAPITALS!!!",
        "1234567890 12:30 €3.50",
        "Ångström Çeşme Łódź",
        "Привет, как дела?",
        "مرحبا بالعالم",
        "שלום עולם",
        "한국어 문장입니다",
        "हिन्दी में एक वाक्य",
        "👩‍👩‍👧‍👦 family ❤️",
        "zero\u200bwidth\u00a0space",
        "[SEP] [CLS] [MASK] special",
        "word " * 400,
    ]
    encoder = SentenceEncoder.load(EncoderConfig(model=minilm, max_length=128)).eval()
    theirs = SentenceTransformer(resolve_model(minilm), device="cpu")
    theirs.max_seq_length = 128
    np.testing.assert_allclose(unit_vectors(encoder, texts), theirs.encode(texts), atol=1e-5)


def test_a_folder_of_the_models_name_goes_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = Path(resolve_model(MINILM))
    assert file_sha256(packaged / "model.safetensors").startswith("53aa5117")
    Path(MINILM).mkdir(parents=True)
    assert resolve_model(MINILM) == MINILM


def test_a_package_with_other_weights_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    package, _ = encoder_module.BUNDLED_MODELS[MINILM]
    monkeypatch.setitem(encoder_module.BUNDLED_MODELS, MINILM, (package, "0" * 64))
    assert resolve_model(MINILM) == MINILM


def test_a_package_never_stands_in_for_a_revision() -> None:
    assert resolve_model(MINILM, revision="main") == MINILM


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(EncoderError, match="no folder"):
        resolve_model(name)


@pytest.mark.parametrize("load_part", [load_tokenizer, lambda name: load(Path(name))])
def test_an_unknown_model_without_network_says_what_to_do(load_part: Any) -> None:
    with pytest.raises(EncoderError) as error:
        load_part("nobody/no-such-model")
    message = str(error.value)
    assert "'nobody/no-such-model'" in message
    assert "folder" in message
    assert "HF_HOME" in message
    assert MINILM in message


@pytest.mark.parametrize("answer", ["", "y\n" * 9])
@pytest.mark.parametrize("load_part", [load_tokenizer, lambda name: load(Path(name))])
def test_code_that_comes_with_a_model_is_never_run(
    load_part: Any,
    answer: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "model")
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    own = {"AutoConfig": "evil.A", "AutoModel": "evil.B", "AutoTokenizer": ["evil.C", None]}
    for file, change in {
        "config.json": {"model_type": "evil"},
        "tokenizer_config.json": {"tokenizer_class": "C"},
    }.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **change, "auto_map": own}))
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    with pytest.raises(EncoderError, match="code of its own, and foreign code is never run"):
        load_part(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub_model(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of `someone/tiny` in the Hub's cache as a download would have left it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "c" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(folders["bert"], repository / "snapshots" / commit)


@pytest.mark.parametrize("revision", [None, "main", "c" * 40])
@pytest.mark.parametrize("declared", [None, "cls", "max"])
def test_a_hub_model_is_pooled_as_it_declares(
    hub_model: Path, declared: str | None, revision: str | None
) -> None:
    if declared:
        (hub_model / "1_Pooling").mkdir()
        mode = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}[declared]
        (hub_model / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
    config = EncoderConfig(model="someone/tiny", revision=revision)
    assert SentenceEncoder.load(config).pooling == (declared or "mean")
    chosen = config.model_copy(update={"pooling": "mean"})
    assert SentenceEncoder.load(chosen).pooling == "mean"


@pytest.mark.parametrize(
    ("declared", "found"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["max"], "include_prompt": True}, "max"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "pooling_mode_last"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": ["cls", "mean"]}, r"cls \+ mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, r"cls \+ max"),
    ],
)
def test_a_pooling_that_we_do_not_have_is_taken_for_no_other(
    folders: dict[str, Path], tmp_path: Path, declared: dict[str, Any], found: str
) -> None:
    folder = shutil.copytree(folders["bert"], tmp_path / "declared")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    if found in ("mean", "cls", "max"):
        assert load(folder).pooling == found
        return
    with pytest.raises(EncoderError, match=rf"encoder\.pooling: \S+ declares {found}"):
        load(folder)
    assert load(folder, "cls").pooling == "cls"


@pytest.mark.parametrize(("name", "window"), [("bert", 130), ("roberta", 128), ("mpnet", 128)])
@torch.inference_mode()
def test_the_window_is_what_the_position_table_can_hold(
    folders: dict[str, Path], name: str, window: int
) -> None:
    encoder = load(folders[name], max_length=window)
    ids, mask = tokenize(encoder, ["a " * 400])
    assert ids.shape == (1, window)
    assert encoder(ids, mask)[0].isfinite().all()
    with pytest.raises(EncoderError, match=rf"max_length: {window + 1} is more than the {window}"):
        load(folders[name], max_length=window + 1)


def test_dropout_is_the_checkpoints_unless_the_experiment_says_otherwise(
    folders: dict[str, Path], unusual_encoders: dict[str, Path]
) -> None:
    def rates(dropout: float | None) -> set[float]:
        for folder in (*folders.values(), *unusual_encoders.values()):
            config = EncoderConfig(model=str(folder), dropout=dropout)
            for module in SentenceEncoder.load(config).modules():
                if isinstance(module, torch.nn.Dropout):
                    found.add(module.p)
        return found

    found: set[float] = set()
    assert rates(0.0) == {0.0}
    found = set()
    assert rates(None) == {0.1}


def test_a_long_text_is_known_by_its_beginning_whatever_the_model_says(
    tiny_encoders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_encoders["bert"], tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))
    numbers = "one two three four five six seven eight nine"
    ids = [
        load_tokenizer(str(folder))(numbers, truncation=True, max_length=5)["input_ids"]
        for folder in (tiny_encoders["bert"], tmp_path / "model")
    ]
    assert ids[0] == ids[1]
