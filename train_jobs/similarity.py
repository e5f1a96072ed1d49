"""python -m train_jobs.similarity: cosines between sentences, as a heatmap and a table."""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from mtl_core.command import run_command
from mtl_core.errors import ConfigError
from mtl_core.plots import similarity_heatmap
from mtl_core.predictor import Predictor
from mtl_core.storage import download, fetch

MAX_DRAWN = 200
"""Sentences in a picture: more could not be read, and would take gigabytes to draw."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.similarity",
        description="Cosine similarity between sentences, as PNG heatmap and CSV.",
        epilog='example: python -m train_jobs.similarity --artifact runs/demo/artifact --text "A" '
        '"B" "C"',
    )
    parser.add_argument("--artifact", required=True, help="artifact folder or s3:// URL")
    parser.add_argument("--text", nargs="+", action="extend", default=[], help="the sentences")
    parser.add_argument("--input", help="text file or s3:// URL with a sentence a line")
    parser.add_argument(
        "--output",
        default="similarity.png",
        help="the picture; the table goes beside it as .csv (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    texts = list(options.text)
    if options.input:
        texts += read_lines(options.input)
    if len(texts) < 2:
        raise ConfigError("--text: give at least two sentences to compare")
    picture = Path(options.output).with_suffix(".png")
    matrix = Predictor.load(fetch(options.artifact)).similarity(texts)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with picture.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *texts])
        for text, row in zip(texts, matrix, strict=True):
            writer.writerow([text, *(f"{value:.6f}" for value in row)])
    if len(texts) > MAX_DRAWN:
        print(f"no picture: {len(texts)} sentences are more than the {MAX_DRAWN} that it takes")
        print(f"written: {picture.with_suffix('.csv')}")
        return
    similarity_heatmap(matrix, texts, picture)
    for row, text in enumerate(texts):
        for column in range(row + 1, len(texts)):
            print(f"{matrix[row, column]:+.3f}  {text}  |  {texts[column]}")
    print(f"written: {picture} and {picture.with_suffix('.csv')}")


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something."""
    with tempfile.TemporaryDirectory() as scratch:
        content = download(path, Path(scratch)).read_bytes()
    lines = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte 0x{line[error.start]:02x}"
            raise ConfigError(f"--input: {path}:{number}: {problem}; save it as UTF-8") from error
    return [line for line in lines if line]


if __name__ == "__main__":
    run_command(main)
