"""Pictures: samples of a model, its loss curve, and attention patterns. The only file that needs matplotlib."""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.sequences import require
from .pattern_views import LATER, QUERY, Panel, keys_per_query

INK, GREY, BLUE, ORANGE = "#1f2328", "#8c959f", "#1f5fa8", "#d9730d"
TRAINING_LINE = {"color": BLUE, "alpha": 0.6}
HELD_OUT_LINE = {"color": ORANGE, "marker": "o", "markersize": 3}
VIEW_COLOURS = ("#0b2f57", "#e8ecf0", "#2f6fb7", "#9dc3ea", "#d9730d", "#f3bf8f")  # query, unseen, parts 1, 2, ...
VIEW_NAMES = ("a query", "not seen", "seen", "seen by the second part", "by the third", "by the fourth")
PANEL_TITLE = {"fontsize": 9, "loc": "center", "fontweight": "normal"}
WRITTEN_CLASSES = 40  # beyond, a confusion matrix has no room for names and numbers
CAPTION_LETTERS = 18
CORNER = {"ha": "right", "va": "top", "fontsize": 8, "color": GREY}
WORDS = {"fontsize": 8, "color": GREY}
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names and titles are anybody's, and $ begins no formula in them
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
}


def styled(draw: Callable) -> Callable:
    """Run a drawing function in this file's style; it needs matplotlib, but no display."""

    @functools.wraps(draw)
    def draw_in_style(*args: Any, **kwargs: Any) -> None:
        with require("matplotlib").rc_context(STYLE):
            draw(*args, **kwargs)

    return draw_in_style


def new_figure(width: float, height: float):
    """An empty figure, size in inches."""
    return require("matplotlib.figure").Figure(figsize=(width, height))


def save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@styled
def sample_grid(pictures: Sequence, path: str | Path, columns: int, row_names: Sequence[str] = ()) -> None:
    """Write PIL `pictures`, all of one size, in rows of `columns`; `row_names` stand at the left of the rows."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    height, width = arrays[0].shape[:2]
    gap = max(1, height // 12)
    rows = math.ceil(len(arrays) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, array in enumerate(arrays):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = array

    figure = new_figure(columns * 0.75, rows * 0.75 * height / width)
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([(height - 1) / 2 + row * (height + gap) for row in range(len(row_names))], row_names)
    axes.tick_params(length=0)
    save(figure, path)


@styled
def captioned_pictures(
    pictures: Sequence, captions: Sequence[str], corrections: Sequence[str | None], path: str | Path, columns: int
) -> None:
    """Write PIL `pictures` in rows of `columns`; below each what it is taken for and, if that is wrong, what it is."""
    rows = math.ceil(len(pictures) / columns)
    figure = new_figure(1.3 * columns, 1.65 * rows)
    cells = figure.subplots(rows, columns, squeeze=False)
    for axes in cells.flat:
        axes.set_axis_off()
    for axes, picture, caption, correction in zip(cells.flat, pictures, captions, corrections):
        axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
        lines, colour = [shorten(caption)], INK
        if correction is not None:
            lines, colour = [*lines, f"is: {shorten(correction)}"], ORANGE
        axes.text(
            0.5, -0.04, "\n".join(lines), transform=axes.transAxes, ha="center", va="top", fontsize=8, color=colour
        )
    save(figure, path)


@styled
def confusion_matrix(counts: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Write counts [K, K] of true classes (rows) taken for classes (columns), coloured by their share of the row."""
    few = len(names) <= WRITTEN_CLASSES
    side = max(4.5, 0.55 * len(names)) if few else 9
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if few:
        labels = [shorten(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), labels)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else INK if count else GREY
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    save(figure, path)


def shorten(name: str) -> str:
    """A class's name in at most so many letters as a caption has room for."""
    return textwrap.shorten(name, CAPTION_LETTERS, placeholder=" …") if " " in name else name[:CAPTION_LETTERS]


@styled
def loss_curve(
    log_history: Sequence[dict], unit: str, nats: float, uniform: float | None, path: str | Path, title: str = ""
) -> None:
    """Write the losses of a Trainer's `log_history` over its steps, and what a `uniform` guess costs if not None.

    Args:
        unit: what losses are shown in, such as "bits per dimension", of which one has so many `nats`.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    axes.set_title(title)
    shown = [] if uniform is None else [uniform]
    for key, name, line in (("loss", "training", TRAINING_LINE), ("eval_loss", "held out", HELD_OUT_LINE)):
        points = [(entry["step"], entry[key] / nats) for entry in log_history if key in entry]
        if points:
            steps, losses = zip(*points)
            shown += losses
            axes.plot(steps, losses, label=f"{name}: {losses[-1]:.3f} at the end", **line)
    if uniform is not None:
        axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1, label=f"uniform guess: {uniform:.3f}")
    axes.set_ylim(min(shown) * 0.95, max(shown) * 1.05)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(unit)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    axes.legend()
    save(figure, path)


@styled
def loss_by_position(losses: Sequence[float], unit: str, path: str | Path, title: str = "") -> None:
    """Write the mean loss at each place in a segment; where memory helps, the first places are no worse."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    axes.set_title(title)
    axes.plot(range(1, len(losses) + 1), losses, **TRAINING_LINE)
    mean = float(np.mean(losses))
    axes.axhline(mean, color=GREY, linestyle="--", linewidth=1, label=f"mean: {mean:.3f}")
    axes.set_ylim(bottom=min(losses) * 0.9)
    axes.set_xlabel("place in the segment")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color=GREY, alpha=0.2)
    axes.legend()
    save(figure, path)


@styled
def pattern_pictures(panels: Sequence[Panel], path: str | Path, title: str = "", columns: int = 4) -> None:
    """Write the panels side by side, each like figure 3 of Child et al. 2019: the grid above, the matrix below."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.6 * columns, 4.1 * rows)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    cells = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1, 2] * rows)
    for axes in cells.flat:
        axes.set_axis_off()
    used = set()
    for place, panel in enumerate(panels):
        row, column = 2 * (place // columns), place % columns
        above, below = cells[row : row + 2, column]
        above.set_title("\n".join([*textwrap.wrap(panel.title, 34), panel.note]), **PANEL_TITLE)
        if panel.shape is not None:
            grid = panel.grid()
            used.update(np.unique(grid))
            _draw_codes(above, grid, later="#f8f9fa")
        view = panel.matrix()
        used.update(np.unique(view))
        _draw_codes(below, view, later="white")
        below.text(0.5, -0.01, "keys", transform=below.transAxes, ha="center", va="top", **WORDS)
        below.text(-0.01, 0.5, "queries", transform=below.transAxes, ha="right", va="center", rotation=90, **WORDS)
        corner = f"{panel.length} tokens,\n{keys_per_query(view):.1f} keys per query"
        below.text(1, 0.98, corner, transform=below.transAxes, **CORNER)
    _legend_of_codes(figure, used)
    save(figure, path)


def _legend_of_codes(figure, used: set[int]) -> None:
    """What the colours mean that occur."""
    patch = require("matplotlib.patches").Patch
    handles = [
        patch(color=colour, label=name)
        for code, (colour, name) in enumerate(zip(VIEW_COLOURS, VIEW_NAMES), QUERY)
        if code in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


def _draw_codes(axes, view: np.ndarray, later: str) -> None:
    """Draw a view's codes as coloured cells, with gaps between them where there is room."""
    palette = [later, *VIEW_COLOURS]  # codes begin at LATER
    to_rgb = require("matplotlib.colors").to_rgb
    axes.imshow(np.array([to_rgb(colour) for colour in palette])[view - LATER], interpolation="nearest")
    if max(view.shape) <= 64:
        line = {"color": "white", "linewidth": 12 / max(view.shape)}
        for edge in range(view.shape[0] + 1):
            axes.axhline(edge - 0.5, **line)
        for edge in range(view.shape[1] + 1):
            axes.axvline(edge - 0.5, **line)
