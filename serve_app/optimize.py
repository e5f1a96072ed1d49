"""python -m serve_app.optimize: an int8 encoder for CPUs, kept if no task loses and speed gains."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from mtl_core.artifact import load_model, read_manifest, write_manifest
from mtl_core.command import run_command
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import prepare_scored
from mtl_core.errors import ConfigError
from mtl_core.evaluation import evaluate
from mtl_core.folders import atomic_folder
from mtl_core.metrics import PRIMARY
from mtl_core.model import MultiTaskModel
from mtl_core.packing import layout
from mtl_core.runtime import (
    INT8_FOLDER,
    OpenVinoRuntime,
    Runtime,
    TorchRuntime,
    choose_runtime,
    convert,
    inputs,
    load_runtime,
    passes,
    with_runtime,
)

TOLERANCE = 0.2
"""Points of a task's main metric that a faster encoder may lose."""
WORTHWHILE = 1.05
"""Times as fast as what `auto` takes otherwise it must be, on the processor at hand."""
TIMED_ROUNDS = 5
CALIBRATION_TEXTS = 300
BATCH_TOKENS = 512
"""In a pass while speed is measured: what a server with some clients finds waiting."""
RECIPES: Mapping[str, Sequence[str]] = {
    "mixed": (),
    "mixed, attention in fp": (".*attention.*",),
    "mixed, feed-forward outputs in fp": (".*output/dense.*",),
}
"""Patterns of operations that are left as they are; tried in this order, fastest first."""


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
        description="Make an int8 encoder for CPUs, score and time it on the artifact's own "
        f"validation data, and keep it if no task loses more than {TOLERANCE} points and it is "
        f"at least {WORTHWHILE} x as fast as what servers take otherwise. Run it on a machine "
        "like theirs: which is faster depends on the processor.",
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
        DataError: its validation data cannot be read any more, or has changed.
        ConfigError: nncf or openvino is not installed.
    """
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"optimize needs the package {error.name}: pip install -c constraints.txt -e '.[int8]'"
        ) from error
    manifest = read_manifest(artifact)
    scored = prepare_scored(artifact, "validation")
    for line in scored.remarks:
        print(line)
    validation = scored.splits["validation"]
    train = prepare_scored(artifact, "train", limit=CALIBRATION_TEXTS).splits["train"]
    model = load_model(artifact)
    cpu = torch.device("cpu")
    plain = measure(TorchRuntime(model.encoder, cpu), model, validation)
    show(plain, plain)
    rows, texts = [plain], sequences(validation)
    others: dict[str, Runtime] = {}
    for name in ("openvino-fp32", "openvino-bf16"):
        others[name] = load_runtime(name, artifact, manifest, lambda: model.encoder, cpu)
        rows.append(measure(others[name], model, validation))
        show(rows[-1], plain)
    rival = others[choose_runtime(None, cpu)]
    with atomic_folder(artifact / "runtime") as folder:
        inside = folder / Path(INT8_FOLDER).name
        int8, tried = quantized(model, (train, validation), plain, tolerance, inside)
        ratio = speed_ratio(int8, rival, texts) if int8 else 0.0
        kept = int8.name if int8 and ratio >= WORTHWHILE else None
        if kept is None:
            shutil.rmtree(inside, ignore_errors=True)
        report = {
            "validation_texts": len(validation),
            "tolerance": tolerance,
            "kept": kept,
            "times_as_fast": {rival.name: round(ratio, 3)} if int8 else {},
            "measured": [row.__dict__ | {"losses": row.losses(plain)} for row in rows + tried],
        }
        text = json.dumps(report, indent=2) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
    write_manifest(artifact, manifest)
    if kept:
        print(f"kept {kept}, {ratio:.2f} x as fast as {rival.name}: runtime auto takes it up")
        return True
    if int8:
        print(f"{int8.name} loses nothing, but is {ratio:.2f} x as fast as {rival.name} here")
    else:
        print(f"no int8 encoder stays within {tolerance} points")
    print(f"no int8 encoder kept: runtime auto stays with {rival.name}")
    return False


def quantized(
    model: MultiTaskModel,
    data: tuple[EncodedSplit, EncodedSplit],
    plain: Measured,
    tolerance: float,
    folder: Path,
) -> tuple[Runtime | None, list[Measured]]:
    """The first recipe's encoder that stays within the tolerance, if any, and what all scored.

    Args:
        model: whose encoder it is.
        data: to calibrate on, and to score.
        plain: what it is compared with.
        tolerance: points that a task may lose.
        folder: for the encoder; without it where none is returned.
    """
    train, validation = data
    rows = []
    for recipe, kept in RECIPES.items():
        folder.mkdir(exist_ok=True)
        path = folder / "encoder.xml"
        quantize(model, train, kept, path)
        runtime = OpenVinoRuntime(path, f"int8 ({recipe})", "f32", model.encoder.pooling)
        rows.append(measure(runtime, model, validation))
        show(rows[-1], plain)
        if max(rows[-1].losses(plain).values()) <= tolerance:
            return runtime, rows
        shutil.rmtree(folder)
    return None, rows


def measure(runtime: Runtime, model: MultiTaskModel, split: EncodedSplit) -> Measured:
    """Score and time a runtime on labelled texts."""
    timed = with_runtime(model, runtime)
    scores = evaluate(timed, split).scores()
    main_metric = {t: 100 * scores[t][PRIMARY[model.head(t).kind]] for t in scores}
    speed = len(split) / seconds(runtime, sequences(split))
    return Measured(runtime.name, main_metric, round(speed, 1))


def speed_ratio(runtime: Runtime, rival: Runtime, texts: Sequence[Sequence[int]]) -> float:
    """How many times as fast as another a runtime is: the median of rounds by turns."""
    ratios = []
    for _ in range(TIMED_ROUNDS):
        mine, others = seconds(runtime, texts), seconds(rival, texts)
        ratios.append(others / mine)
    return median(ratios)


def seconds(runtime: Runtime, texts: Sequence[Sequence[int]]) -> float:
    """What encoding the texts once takes."""
    started = time.perf_counter()
    for _ in passes(runtime, texts, 0, BATCH_TOKENS):
        pass
    return time.perf_counter() - started


def sequences(split: EncodedSplit) -> list[list[int]]:
    return [split.input_ids[first:last].tolist() for first, last in pairwise(split.starts)]


def show(row: Measured, plain: Measured) -> None:
    scores = ", ".join(f"{task} {score:.2f}" for task, score in row.scores.items())
    ratio = row.sentences_per_second / plain.sentences_per_second
    print(
        f"{row.runtime}: {scores}; {row.sentences_per_second:.0f} sentences/s ({ratio:.2f} x)",
        flush=True,
    )


def quantize(model: MultiTaskModel, train: EncodedSplit, kept: Sequence[str], path: Path) -> None:
    """Post-training quantisation with SmoothQuant (Xiao et al. 2023) by NNCF."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    plain = convert(model.encoder)
    # Texts one by one, so that no padding enters the statistics.
    alone = [layout([[0]], len(text), [text], 0) for text in sequences(train)]
    quantized = nncf.quantize(
        plain,
        nncf.Dataset([inputs(each, len(plain.inputs)) for each in alone]),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=CALIBRATION_TEXTS,
        ignored_scope=nncf.IgnoredScope(patterns=list(kept), validate=False) if kept else None,
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)


if __name__ == "__main__":
    run_command(main)
