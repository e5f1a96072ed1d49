"""The notebook as it is committed: run whole and in order, small, free of its maker's machine."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import code_cells, fingerprint, shrunk

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def said(notebook: Any) -> str:
    """All text of all outputs."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    for output in outputs(notebook):
        data = output.get("data", {})
        texts += [value for kind, value in data.items() if kind.startswith("text/")]
    return "\n".join(texts)


def test_it_is_valid_and_small(path: Path, notebook: Any) -> None:
    nbformat.validate(notebook)
    assert path.stat().st_size < 200_000


def test_every_cell_was_run_once_and_in_order(notebook: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_the_outputs_are_those_of_this_source(notebook: Any) -> None:
    assert notebook.metadata["executed_source"] == fingerprint(notebook), "make notebook SAVE=1"


def test_no_output_is_an_error_or_a_warning(notebook: Any) -> None:
    kinds = {(output.output_type, output.get("name")) for output in outputs(notebook)}
    assert not [kind for kind in kinds if "error" in kind or "stderr" in kind]
    assert "Traceback" not in said(notebook)


def test_no_output_names_a_folder_or_a_port_of_the_machine(notebook: Any) -> None:
    assert not re.findall(
        r"(?<![\w.<])/(?:tmp|home|root|work|Users|usr|opt|var)\b\S*", said(notebook)
    )
    assert not re.findall(r"127\.0\.0\.1|localhost:\d|0x[0-9a-f]{6,}", said(notebook))


def test_every_picture_is_a_png_that_opens(notebook: Any) -> None:
    pictures = [
        o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 4
    for picture in pictures:
        assert base64.b64decode(shrunk(picture)).startswith(b"\x89PNG")


def test_its_links_lead_somewhere(path: Path, notebook: Any) -> None:
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#]+)\)", prose)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target


def test_nothing_of_the_corpora_under_licence_is_in_it(notebook: Any) -> None:
    assert "MTL_DATA" not in "".join(cell.source for cell in notebook.cells)
