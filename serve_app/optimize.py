"""python -m serve_app.optimize: an int8 encoder for CPUs, kept only if no task loses by it."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mtl_core.artifact import atomic_folder, load_model, read_manifest, write_manifest
from mtl_core.command import run_command
from mtl_core.config import ConfigError
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import prepare_scored
from mtl_core.evaluation import evaluate
from mtl_core.metrics import PRIMARY
from mtl_core.model import MultiTaskModel
from mtl_core.packing import layout
from mtl_core.runtime import (
    INT8_FOLDER,
    OpenVinoRuntime,
    Runtime,
    TorchRuntime,
    convert,
    inputs,
    load_runtime,
    passes,
    with_runtime,
)

TOLERANCE = 0.2
"""Points of a task's main metric that a faster encoder may lose."""
CALIBRATION_TEXTS = 300
BATCH_TOKENS = 512
"""In a pass while speed is measured: what a server with some clients finds waiting."""
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "mixed": {"preset": "mixed"},
    "mixed, attention in fp": {"preset": "mixed", "keep": [".*attention.*"]},
    "mixed, feed-forward outputs in fp": {"preset": "mixed", "keep": [".*output/dense.*"]},
}
"""Tried in this order, fastest first; `keep` are patterns of operations left as they are."""


@dataclass(frozen=True)
class Measured:
    """One runtime on validation data."""

    runtime: str
    scores: dict[str, float]
    """Task → main metric, in points."""
    sentences_per_second: float

    def losses(self, plain: Measured) -> dict[str, float]:
        """Points each task loses against another runtime."""
        return {task: round(plain.scores[task] - score, 3) for task, score in self.scores.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.optimize",
        description="Make an int8 encoder for CPUs, score it on the artifact's own validation "
        f"data, and keep it if no task loses more than {TOLERANCE} points.",
        epilog="example: python -m serve_app.optimize --artifact runs/demo/artifact",
    )
    parser.add_argument("--artifact", required=True, help="artifact folder")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="points a task may lose (%(default)s)",
    )
    options = parser.parse_args(arguments)
    optimize(Path(options.artifact), options.tolerance)


def optimize(artifact: Path, tolerance: float = TOLERANCE) -> bool:
    """Make, check and keep an int8 encoder; returns whether one was kept.

    Raises:
        ArtifactError: the artifact is not sound.
        DataError: its validation data cannot be read any more.
        ConfigError: nncf or openvino is not installed.
    """
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"optimize needs the package {error.name}: pip install 'multitask-ray[int8]'"
        ) from error
    manifest = read_manifest(artifact)
    _, validation = prepare_scored(artifact, "validation")
    _, train = prepare_scored(artifact, "train", limit=CALIBRATION_TEXTS)
    model = load_model(artifact)
    cpu = torch.device("cpu")
    plain = measure(TorchRuntime(model.encoder, cpu), model, validation)
    show(plain, plain)
    rows = [plain]
    for name in ("openvino-fp32", "openvino-bf16"):
        runtime = load_runtime(name, artifact, lambda: model.encoder, cpu)
        rows.append(measure(runtime, model, validation))
        show(rows[-1], plain)
    kept: str | None = None
    with atomic_folder(artifact / "runtime") as folder:
        inside = folder / Path(INT8_FOLDER).name
        for recipe, options in RECIPES.items():
            inside.mkdir(exist_ok=True)
            quantize(model, train, options, inside / "encoder.xml")
            runtime = OpenVinoRuntime(
                inside / "encoder.xml", f"int8 ({recipe})", "f32", model.encoder.pooling
            )
            rows.append(measure(runtime, model, validation))
            show(rows[-1], plain)
            if max(rows[-1].losses(plain).values()) <= tolerance:
                kept = recipe
                break
            shutil.rmtree(inside)
        report = {
            "validation_texts": len(validation),
            "tolerance": tolerance,
            "kept": kept,
            "measured": [row.__dict__ | {"losses": row.losses(plain)} for row in rows],
        }
        text = json.dumps(report, indent=2) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
    write_manifest(artifact, manifest)
    if kept:
        print(f"kept int8 ({kept}): servers with runtime auto take it up; {artifact}/runtime")
    else:
        print(f"no int8 encoder stays within {tolerance} points; servers keep bf16 or fp32")
    return kept is not None


def measure(runtime: Runtime, model: MultiTaskModel, split: EncodedSplit) -> Measured:
    """Score and time a runtime on labelled texts."""
    timed = with_runtime(model, runtime)
    scores = evaluate(timed, split).scores()
    main_metric = {t: 100 * scores[t][PRIMARY[model.head(t).kind]] for t in scores}
    texts = sequences(split)
    started = time.perf_counter()
    for _ in passes(runtime, texts, 0, BATCH_TOKENS):
        pass
    seconds = time.perf_counter() - started
    return Measured(runtime.name, main_metric, round(len(split) / seconds, 1))


def sequences(split: EncodedSplit) -> list[list[int]]:
    return [split.input_ids[first:last].tolist() for first, last in pairwise(split.starts)]


def show(row: Measured, plain: Measured) -> None:
    scores = ", ".join(f"{task} {score:.2f}" for task, score in row.scores.items())
    ratio = row.sentences_per_second / plain.sentences_per_second
    print(
        f"{row.runtime}: {scores}; {row.sentences_per_second:.0f} sentences/s ({ratio:.2f} x)",
        flush=True,
    )


def quantize(
    model: MultiTaskModel, train: EncodedSplit, recipe: Mapping[str, Any], path: Path
) -> None:
    """Post-training quantisation with SmoothQuant (Xiao et al. 2023) by NNCF."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    keep = recipe.get("keep")
    plain = convert(model.encoder)
    # Texts one by one, so that no padding enters the statistics.
    alone = [layout([[0]], len(text), [text], 0) for text in sequences(train)]
    quantized = nncf.quantize(
        plain,
        nncf.Dataset([inputs(each, len(plain.inputs)) for each in alone]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset(recipe["preset"]),
        subset_size=CALIBRATION_TEXTS,
        ignored_scope=nncf.IgnoredScope(patterns=keep, validate=False) if keep else None,
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)


if __name__ == "__main__":
    run_command(main)
