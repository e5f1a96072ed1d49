"""Tables on the terminal: what they show of many labels, and that they say what they leave out."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from train_jobs.console import label_table


def drawn(rows: dict[str, Any], most: int) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(label_table("slots", rows, most, "the artifact's README.md"))
    return " ".join(capture.get().split())


def test_of_many_labels_the_worst_are_shown_with_a_note_where_all_are() -> None:
    rows = {
        f"type-{i:02d}": {"precision": 0.5, "recall": 0.5, "f1": i / 40, "support": 3}
        for i in range(39, -1, -1)
    }
    never = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    rows |= {"type-never": never}
    text = drawn(rows, 12)
    assert [f"type-{i:02d}" in text for i in range(40)] == [True] * 12 + [False] * 28
    assert "type-never" not in text, "what does not occur is no bad score"
    assert "the 12 lowest of 41; all are in the artifact's README.md" in text
    whole = drawn(rows, 41)
    assert all(name in whole for name in rows)
    assert "lowest" not in whole


def test_a_label_in_brackets_is_shown_as_it_is() -> None:
    row = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}
    text = drawn({"[other]": row, "[/INST]": row}, 12)
    assert "[other]" in text
    assert "[/INST]" in text
