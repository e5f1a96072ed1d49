"""The artifact folder: what training leaves behind and everything else opens.

    manifest.json        schema version, tasks, labels, metrics, hashes of every weight file
    experiment.yaml      the resolved configuration
    encoder/             sentence-transformers layout
    heads/<task>/        head.json and head.safetensors, readable without the transformer
    runtime/             the encoder in faster forms, checked against the plain one; optional
    README.md, plots/    model card

Weights are safetensors only and nothing is unpickled. A folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file

from mtl_core.config import EncoderConfig, Experiment, TaskConfig, load_experiment
from mtl_core.encoder import POOLING_FILE, SentenceEncoder, declared_pooling
from mtl_core.errors import ArtifactError, ConfigError
from mtl_core.folders import file_sha256
from mtl_core.heads import Head, build_head
from mtl_core.model import MultiTaskModel

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself."""

    schema_version: int
    name: str
    tasks: dict[str, dict[str, Any]]
    """task → kind, labels, metrics by split."""
    encoder: dict[str, Any]
    """id, hash, pooling, dimension, max_length."""
    data: dict[str, Any]
    """split → content fingerprint, number of texts, whether train was divided for it."""
    versions: dict[str, str]
    files: dict[str, str]
    """weight and configuration file → sha256."""
    training: dict[str, Any] = field(default_factory=dict)
    """trained (or all frozen), steps, epochs, best_epoch, encoder_passes, seconds, skipped_rows."""


def save_weights(model: MultiTaskModel, folder: Path) -> None:
    """Write encoder/ and heads/ into an existing folder; each parameter once."""
    model.encoder.save(folder / "encoder")
    for task, head in model.head_items:
        save_head(head, folder / "heads" / task)


def save_head(head: Head, folder: Path) -> None:
    """Write head.json and head.safetensors."""
    folder.mkdir(parents=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    save_file(tensors, folder / "head.safetensors")
    text = json.dumps(head.describe(), indent=2, ensure_ascii=False) + "\n"
    (folder / "head.json").write_text(text, encoding="utf-8")


def load_head(folder: Path) -> Head:
    """One head, without its encoder, in eval mode.

    Raises:
        ArtifactError: a file is missing or does not fit.
    """
    return build_stored_head(*read_head(folder), str(folder))


def read_head(folder: Path) -> tuple[bytes, bytes]:
    """The contents of head.json and head.safetensors.

    Raises:
        ArtifactError: a file is missing.
    """
    for name in ("head.json", "head.safetensors"):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: missing; the artifact is not complete")
    return (folder / "head.json").read_bytes(), (folder / "head.safetensors").read_bytes()


def build_stored_head(description: bytes, weights: bytes, origin: str) -> Head:
    """A head in eval mode from what its two files hold.

    Raises:
        ArtifactError: they are damaged; the message names `origin`.
    """
    try:
        spec = json.loads(description)
        config = TaskConfig.model_validate(spec["config"])
        head = build_head(spec["hidden_size"], spec["labels"], config)
        head.load_state_dict(load(weights))
    except Exception as error:
        raise ArtifactError(f"{origin}: damaged head: {error}") from error
    return head.eval()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json last, with the hashes of what it vouches for."""
    content = {**manifest.__dict__, "files": _hashes(folder)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def _hashes(folder: Path) -> dict[str, str]:
    patterns = ("encoder/**/*", "heads/*/*", "runtime/**/*", "experiment.yaml")
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(paths)
        if path.is_file()
    }


def read_manifest(folder: str | Path, check_files: bool = True) -> Manifest:
    """Read and check an artifact's manifest.

    Raises:
        ArtifactError: no artifact, a newer schema, or a file that is missing or changed.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    try:
        manifest = parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing; {folder} is no artifact") from error
    for name, sha256 in manifest.files.items() if check_files else ():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{file}: missing; the artifact is not complete")
        if file_sha256(file) != sha256:
            raise ArtifactError(f"{file}: damaged: its hash is not the manifest's")
    return manifest


def parse_manifest(text: bytes, origin: str) -> Manifest:
    """What a manifest.json says.

    Raises:
        ArtifactError: it is damaged or of a newer schema; the message names `origin`.
    """
    try:
        content = json.loads(text)
        version = content["schema_version"]
        manifest = Manifest(**content) if version <= SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{origin}: damaged: {error!r}") from error
    if manifest is None:
        raise ArtifactError(
            f"{origin}: schema version {version} is newer than this software reads "
            f"({SCHEMA_VERSION}); upgrade multitask-ray"
        )
    _check_shape(manifest, origin)
    return manifest


def _check_shape(manifest: Manifest, origin: str) -> None:
    """Raise ArtifactError unless what loading relies on is there."""
    for name in ("tasks", "encoder", "files"):
        if not isinstance(getattr(manifest, name), dict):
            raise ArtifactError(f"{origin}: damaged: {name!r} is no mapping")
    for name in {"pooling", "max_length"} - manifest.encoder.keys():
        raise ArtifactError(f"{origin}: damaged: 'encoder' has no {name!r}")


def encoder_hash(manifest: Manifest) -> str:
    """Of the names and hashes of the encoder's files: what `read_manifest` checked, not a claim."""
    files = sorted(item for item in manifest.files.items() if item[0].startswith("encoder/"))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def load_parts(
    folder: str | Path, max_length: int | None = None, dropout: float | None = None
) -> tuple[SentenceEncoder, dict[str, Head]]:
    """Encoder and heads of an artifact, in eval mode, after checking every file.

    Raises:
        ArtifactError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    root = Path(folder)
    encoder = load_encoder(root, manifest, max_length, dropout)
    return encoder, {task: load_head(root / "heads" / task) for task in manifest.tasks}


def load_encoder(
    folder: Path,
    manifest: Manifest,
    max_length: int | None = None,
    dropout: float | None = None,
) -> SentenceEncoder:
    """The encoder of an artifact whose files were checked, in eval mode."""
    config = EncoderConfig(
        model=str(folder / "encoder"),
        pooling=manifest.encoder["pooling"],
        max_length=max_length or manifest.encoder["max_length"],
        dropout=dropout,
    )
    return SentenceEncoder.load(config).eval()


def load_model(folder: str | Path) -> MultiTaskModel:
    """The whole model in eval mode."""
    return MultiTaskModel(*load_parts(folder)).eval()


def load_config(folder: str | Path) -> Experiment:
    """The experiment that made an artifact."""
    try:
        return load_experiment(Path(folder) / "experiment.yaml")
    except ConfigError as error:
        raise ArtifactError(str(error)) from error


def describe_encoder(folder: Path, name: str) -> dict[str, Any]:
    """The manifest's encoder entry, from the written files."""
    encoder = folder / "encoder"
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    window = json.loads((encoder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    return {
        "id": name,
        "sha256": file_sha256(min(encoder.glob("*.safetensors"))),
        "pooling": declared_pooling(encoder / POOLING_FILE),
        "dimension": config.get("hidden_size") or config["dim"],
        "max_length": window["max_seq_length"],
    }


def library_versions() -> dict[str, str]:
    """What wrote the artifact."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "ray", "multitask-ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_card(
    manifest: Manifest,
    pictures: Sequence[str] = (),
    labels: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> str:
    """README.md in the Hub's model-card form: tables of the metrics and, by title, of labels."""
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [multi-task, text-classification, token-classification]",
        "---",
        "",
        f"# {manifest.name}",
        "",
        f"One sentence encoder ({manifest.encoder['id']}) with a head for each of "
        f"{len(manifest.tasks)} tasks. `encoder/` opens with SentenceTransformer and AutoModel.",
        "",
        "| task | kind | labels | split | metric | value |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {task} | {info['kind']} | {len(info['labels'])} "
        f"| {split} | {metric} | {100 * value:.2f} |"
        for task, info in manifest.tasks.items()
        for split, values in info["metrics"].items()
        for metric, value in values.items()
    ]
    lines += ["", *(f"![{Path(picture).stem}]({picture})" for picture in pictures), ""]
    for title, rows in (labels or {}).items():
        lines += [f"## {title}", "", *_label_lines(rows), ""]
    lines += ["Libraries: " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()), ""]
    return "\n".join(lines)


def _label_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| label | precision | recall | F1 | support |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        numbers = " | ".join(f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1"))
        escaped = html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")
        lines.append(f"| {escaped} | {numbers} | {row['support']} |")
    return lines
