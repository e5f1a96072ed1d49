"""Run the notebooks from top to bottom; `--save` keeps their outputs, made small.

    python -m notebooks.execute [--save]

Each runs in an empty folder of its own. Saved outputs name no folder of the machine that made them,
and a hash of the source that they belong to.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).parent
COLOURS = 256
"""Of a picture's palette: plots need no more, and take a third of the space."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write the outputs into the files")
    options = parser.parse_args(arguments)
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    for path in sorted(HERE.glob("*.ipynb")):
        notebook: Any = nbformat.read(path, as_version=4)
        started = time.monotonic()
        try:
            execute(notebook)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")
        print(f"{path.name}: ran in {time.monotonic() - started:.0f} s")
        if options.save:
            tidy(notebook)
            nbformat.write(notebook, path)


def execute(notebook: Any) -> None:
    """Run every cell, in order, in a folder that is empty and gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        # The kernel is reached through files of this folder, and not over TCP.
        config = Config(ConnectionFileMixin={"transport": "ipc", "ip": f"{folder}/kernel"})
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, config=config, timeout=300, resources=where)
        client.execute()


def tidy(notebook: Any) -> None:
    """Leave of the outputs what a reader looks at, and of the metadata what an editor needs."""
    for cell in code_cells(notebook):
        cell.metadata = {}
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = shrunk(data["image/png"])
    notebook.metadata = {
        "kernelspec": notebook.metadata.kernelspec,
        "language_info": {"name": "python"},
        "executed_source": fingerprint(notebook),
    }


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fingerprint(notebook: Any) -> str:
    """A hash of the source of all code cells."""
    source = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(source.encode()).hexdigest()


def shrunk(png: str) -> str:
    """A base64 PNG with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    target = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, "png", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


if __name__ == "__main__":
    main()
