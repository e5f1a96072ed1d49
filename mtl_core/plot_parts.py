"""What all pictures share: a figure, labels in any script, and saving without a display."""

from __future__ import annotations

import math
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABEL = 40


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches whose layout makes room for labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="compressed")


def square_grid(labels: Sequence[str], cell: float) -> tuple[Figure, Axes]:
    """Axes for a square matrix of cells of that many inches, with room for labels on two sides."""
    names = [short_label(label) for label in labels]
    font_size, angle = (9.0, 45) if cell > 0.3 else (7.0, 90)
    room = max((display_width(name) for name in names), default=0) * font_size * 0.62 / 72
    side = max(cell * len(names), 2.0)
    figure = new_figure(side + room + 1.9, side + room * math.sin(math.radians(angle)) + 1.3)
    axes = figure.subplots()
    label_square(axes, names, font_size, angle)
    axes.tick_params(length=0 if cell > 0.3 else 2)
    return figure, axes


def label_square(
    axes: Axes, labels: Sequence[str], font_size: float = 9.0, angle: float = 45
) -> None:
    """Name rows and columns of a square matrix."""
    names = [short_label(label) for label in labels]
    style: dict[str, Any] = {
        "parse_math": False,
        "fontsize": font_size,
        "fontfamily": font_families(),
    }
    axes.set_yticks(range(len(names)), names, **style)
    # A slanted label ends at its tick; an upright one is centred on it.
    style |= {"rotation": angle, "ha": "right", "va": "center" if angle == 90 else "top"}
    axes.set_xticks(range(len(names)), names, rotation_mode="anchor", **style)


def set_title(figure: Figure, title: str) -> None:
    """A title above the whole figure, wrapped to its width."""
    columns = int(figure.get_figwidth() * 72 / (11 * 0.65))
    lines = textwrap.wrap(short_label(title, 200), columns)
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False, fontfamily=font_families())


def short_label(label: str, limit: int = MAX_LABEL) -> str:
    """The label on one line, cut with an ellipsis; what UTF-8 cannot hold becomes "?"."""
    line = " ".join(label.encode("utf-8", "replace").decode().split())
    return line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def display_width(text: str) -> int:
    """Width in characters of a terminal, where ideographs and emoji take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def short_count(value: float) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M."""
    for limit, unit, suffix in ((10_000, 1, ""), (999_500, 1000, "k")):
        if value < limit:
            return f"{value / unit:.{4 if unit == 1 else 3}g}{suffix}"
    return f"{value / 1e6:.3g}M"


def font_families() -> list[str]:
    """The default font, then fonts for other scripts where they are installed."""
    from matplotlib.font_manager import get_font_names

    wanted = (
        "Noto Sans CJK SC",
        "WenQuanYi Zen Hei",
        "Arial Unicode MS",
        "PingFang SC",
        "Microsoft YaHei",
        "Noto Sans Arabic",
        "Noto Sans Devanagari",
        "Noto Emoji",
    )
    installed = set(get_font_names())
    return ["DejaVu Sans", *(name for name in wanted if name in installed)]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure; a character that no font has is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
