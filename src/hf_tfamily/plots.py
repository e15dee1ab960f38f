"""Pictures: samples of a model, its loss curve, and attention patterns. The only file that needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.sequences import require

INK, GREY, BLUE, ORANGE = "#1f2328", "#8c959f", "#1f5fa8", "#d9730d"
STYLE = {
    "font.size": 10,
    "text.color": INK,
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


def new_figure(width: float, height: float, **layout: Any):
    """A figure and its axes in this file's style, drawn without a display."""
    with require("matplotlib").rc_context(STYLE):
        figure = require("matplotlib.figure").Figure(figsize=(width, height))
        return figure, figure.subplots(**layout)


def save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with require("matplotlib").rc_context(STYLE):
        figure.savefig(path)


def sample_grid(pictures: Sequence, path: str | Path, columns: int, row_names: Sequence[str] = ()) -> None:
    """Write PIL `pictures`, all of one size, in rows of `columns`; `row_names` stand at the left of the rows."""
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    height, width, gap = arrays[0].shape[0], arrays[0].shape[1], max(1, arrays[0].shape[0] // 12)
    rows = math.ceil(len(arrays) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, array in enumerate(arrays):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = array

    figure, axes = new_figure(columns * 0.75, rows * 0.75 * height / width)
    axes.imshow(sheet, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([(height - 1) / 2 + row * (height + gap) for row in range(len(row_names))], row_names)
    axes.tick_params(length=0)
    save(figure, path)


def loss_curve(log_history: Sequence[dict], uniform: float, path: str | Path, title: str = "") -> None:
    """Write the bits per dimension of a Trainer's `log_history` over its steps, below the `uniform` bound."""
    figure, axes = new_figure(6.4, 3.6)
    axes.set_title(title)
    drawn = []
    for key, name, style in (
        ("loss", "training", {"color": BLUE, "alpha": 0.55}),
        ("eval_loss", "held out", {"color": ORANGE, "marker": "o", "markersize": 3}),
    ):
        points = [(entry["step"], entry[key] / math.log(2)) for entry in log_history if key in entry]
        if points:
            steps, bits = zip(*points)
            drawn += bits
            axes.plot(steps, bits, label=f"{name}: {bits[-1]:.3f} at the end", **style)
    axes.axhline(uniform, color=GREY, linestyle="--", linewidth=1, label=f"uniform: {uniform:.3f}")
    axes.set_ylim(min([*drawn, uniform]) * 0.96, uniform * 1.04)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per dimension")
    axes.grid(axis="y", color=GREY, alpha=0.2)
    axes.legend(loc="best")
    save(figure, path)
