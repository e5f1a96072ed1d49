"""What a training step and an embedding cost by the encoder's shape.

python benchmarks/encoders.py [--rounds 5] [--steps 4]

The encoders have random weights: this is about speed alone. Batches of 32 texts of the demo corpus,
two tasks, all parameters learning. A round gives each shape the same number of steps, another one
first each time, so that whatever else the machine does befalls all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertConfig, DistilBertConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mtl_core import loop
from mtl_core.build import build_model, fit_to_data
from mtl_core.config import EncoderConfig, load_experiment
from mtl_core.data.demo import demo_corpus
from mtl_core.data.prepare import prepare
from mtl_core.encoder import SentenceEncoder, load_tokenizer
from mtl_core.loop import fit
from mtl_core.model import MultiTaskModel
from mtl_core.predictor import Predictor
from mtl_core.state import TrainState

SMALL: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
SHAPES: dict[str, Any] = {
    "6 layers of 384 (MiniLM-L6)": BertConfig(num_hidden_layers=6, **SMALL),
    "12 layers of 384 (MiniLM-L12)": BertConfig(num_hidden_layers=12, **SMALL),
    "6 layers of 768 (DistilBERT)": DistilBertConfig(),
    "12 layers of 768 (BERT-base)": BertConfig(),
}
SETTINGS = ["training.batch_size=32", "scale.workers=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    options = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    loop.LOG_EVERY = options.steps
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: random_encoder(shape, folder) for name, shape in SHAPES.items()}
        seconds = in_turn({name: steps(path) for name, path in folders.items()}, options.rounds)
        rates = in_turn({name: rounds_of(path) for name, path in folders.items()}, options.rounds)
    print("| encoder | ms a step | × | sentences/s | × |\n|---|---|---|---|---|")
    base = next(iter(SHAPES))
    for name in SHAPES:
        a_step, cost = middle(seconds[name], seconds[base])
        rate, share = middle(rates[name], rates[base])
        a_step /= options.steps
        print(f"| {name} | {1000 * a_step:.0f} | {cost:.1f} | {rate:.0f} | {share:.2f} |")
    text = f"{options.rounds} rounds of {options.steps} steps of 32 texts"
    print(f"\n{text}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def random_encoder(shape: Any, folder: str) -> Path:
    """A folder with an encoder of this shape and the default model's tokenizer."""
    path = Path(folder, f"{shape.model_type}-{shape.num_hidden_layers}-{shape.hidden_size}")
    AutoModel.from_config(shape).save_pretrained(path)
    load_tokenizer(EncoderConfig().model).save_pretrained(path)
    return path


def in_turn(contenders: dict[str, Iterator[float]], rounds: int) -> dict[str, list[float]]:
    """A figure of each contender in each round, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            figure = next(contenders[name])
            if number:
                found[name].append(figure)
    return found


def steps(encoder: Path) -> Iterator[float]:
    """Seconds between two progress events of a run, one after the other."""
    changes = [*SETTINGS, f"encoder.model={encoder}"]
    experiment = load_experiment("train_jobs/configs/demo.yaml", changes)
    data = prepare(experiment)
    model = build_model(experiment, data.labels)
    fit_to_data(model, experiment, data.splits["train"])
    run = fit(TrainState(model, experiment), data, experiment)
    while True:
        started = time.perf_counter()
        event = next(run)
        assert event.kind == "step", "the epoch is too short for so many rounds"
        yield time.perf_counter() - started


def rounds_of(encoder: Path) -> Iterator[float]:
    """Sentences a second of embedding the demo's validation texts in fp32, again and again."""
    texts = [example.text for example in demo_corpus()["validation"]]
    loaded = SentenceEncoder.load(EncoderConfig(model=str(encoder)))
    predictor = Predictor(MultiTaskModel(loaded, {}))
    while True:
        started = time.perf_counter()
        predictor.embed(texts)
        yield len(texts) / (time.perf_counter() - started)


def middle(figures: list[float], base: list[float]) -> tuple[float, float]:
    """The median, and the median ratio to the base in the same round."""
    ratios = [mine / other for mine, other in zip(figures, base, strict=True)]
    return statistics.median(figures), statistics.median(ratios)


if __name__ == "__main__":
    main()
