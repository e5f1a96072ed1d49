"""What a training step and an embedding cost by the encoder's shape.

python benchmarks/encoders.py [--rounds 5] [--steps 4]

The encoders have random weights: this is about speed alone. Batches of 32 texts of the demo corpus,
two tasks, all parameters learning; the shapes work in turn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rounds import in_turn, ratios, steps
from transformers import AutoModel, BertConfig, DistilBertConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mtl_core import loop
from mtl_core.config import EncoderConfig, Experiment, load_experiment
from mtl_core.data.demo import demo_corpus
from mtl_core.encoder import SentenceEncoder, load_tokenizer
from mtl_core.model import MultiTaskModel
from mtl_core.predictor import Predictor

SMALL: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
SHAPES: dict[str, Any] = {
    "6 layers of 384 (MiniLM-L6)": BertConfig(num_hidden_layers=6, **SMALL),
    "12 layers of 384 (MiniLM-L12)": BertConfig(num_hidden_layers=12, **SMALL),
    "6 layers of 768 (DistilBERT)": DistilBertConfig(),
    "12 layers of 768 (BERT-base)": BertConfig(),
}


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
        runs = {name: steps(experiment(path)) for name, path in folders.items()}
        seconds = in_turn(runs, options.rounds)
        rates = in_turn({name: embedding(path) for name, path in folders.items()}, options.rounds)
    print("| encoder | ms a step | × | sentences/s | × |\n|---|---|---|---|---|")
    base = next(iter(SHAPES))
    for name in SHAPES:
        milliseconds = 1000 * median(seconds[name]) / options.steps
        cost = median(ratios(seconds[name], seconds[base]))
        rate, share = median(rates[name]), median(ratios(rates[name], rates[base]))
        print(f"| {name} | {milliseconds:.0f} | {cost:.1f} | {rate:.0f} | {share:.2f} |")
    text = f"{options.rounds} rounds of {options.steps} steps of 32 texts"
    print(f"\n{text}, {torch.get_num_threads()} threads, torch {torch.__version__}")


def random_encoder(shape: Any, folder: str) -> Path:
    """A folder with an encoder of this shape and the default model's tokenizer."""
    path = Path(folder, f"{shape.model_type}-{shape.num_hidden_layers}-{shape.hidden_size}")
    AutoModel.from_config(shape).save_pretrained(path)
    load_tokenizer(EncoderConfig().model).save_pretrained(path)
    return path


def experiment(encoder: Path) -> Experiment:
    return load_experiment(
        "train_jobs/configs/demo.yaml",
        ["training.batch_size=32", "scale.workers=1", f"encoder.model={encoder}"],
    )


def embedding(encoder: Path) -> Iterator[float]:
    """Sentences a second of embedding the demo's validation texts in fp32, again and again."""
    texts = [example.text for example in demo_corpus()["validation"]]
    loaded = SentenceEncoder.load(EncoderConfig(model=str(encoder)))
    predictor = Predictor(MultiTaskModel(loaded, {}))
    while True:
        started = time.perf_counter()
        predictor.embed(texts)
        yield len(texts) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
