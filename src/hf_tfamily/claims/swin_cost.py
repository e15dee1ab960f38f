"""How Swin's work grows with the picture, against attention among all patches."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import plots
from ..modeling.configuration_swin_transformer import SwinTransformerConfig
from ..modeling.modeling_swin_transformer import SwinTransformerModel
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace

WINDOWS, WHOLE = "windows of 7", "one window"
SIDES = (56, 112, 224)  # pixels


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    return {f"side_{side}": float(operations(variant, side)) for side in SIDES}


def operations(variant: str, side: int) -> int:
    """Floating-point operations of one picture's forward pass."""
    grid = side // 4
    config = SwinTransformerConfig(
        image_size=side,
        embed_dim=24,
        depths=[2],
        num_heads=[2],
        window_size=7 if variant == WINDOWS else grid,
        attn_implementation="eager",
    )
    model = SwinTransformerModel(config).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def judge(results: Results) -> Finding:
    growth = {
        variant: results.mean(variant, f"side_{SIDES[-1]}") / results.mean(variant, f"side_{SIDES[0]}")
        for variant in (WINDOWS, WHOLE)
    }
    pixels = (SIDES[-1] / SIDES[0]) ** 2
    words = f"{pixels:.0f} times the pixels take {growth[WINDOWS]:.1f} times the operations with windows, and "
    words += f"{growth[WHOLE]:.1f} times without"
    linear = abs(growth[WINDOWS] / pixels - 1) < 0.02 and growth[WHOLE] > 1.5 * pixels
    return Finding(Verdict.FOUND if linear else Verdict.OTHER, words)


def draw(results: Results, axes: Any) -> None:
    for variant, colour in ((WINDOWS, plots.BLUE), (WHOLE, plots.ORANGE)):
        counts = [results.mean(variant, f"side_{side}") / 1e6 for side in SIDES]
        axes.loglog([side**2 for side in SIDES], counts, "o-", color=colour, label=variant)
    axes.set_xticks([side**2 for side in SIDES], [f"{side}x{side}" for side in SIDES])  # powers need math text
    axes.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    axes.minorticks_off()
    axes.set(xlabel="pixels", ylabel="million operations, forward")
    axes.legend()


CLAIM = Claim(
    system="Swin Transformer",
    paper="Liu et al. 2021, arXiv:2103.14030, section 3.2, equations 1 and 2",
    statement="with windows the work is linear in the number of pixels",
    papers_figure="4 h w C^2 + 2 M^2 h w C against 4 h w C^2 + 2 (h w)^2 C multiplications",
    experiment="Floating-point operations of one stage of two layers of width 24, counted in a forward pass over "
    "pictures of 56, 112 and 224 pixels a side: windows of 7x7 patches, and one window of all patches.",
    criterion="16 times the pixels take 16 times the operations, to 2 %, with windows, and more than 24 times with one "
    "window.",
    variants=(WINDOWS, WHOLE),
    figures={f"side_{side}": f"operations at {side} pixels a side" for side in SIDES},
    measure=measure,
    judge=judge,
    seeds=(0,),
    draw=draw,
)
