"""How far back heads learn to look."""

from typing import Any

import numpy as np

from .. import plots
from ..modeling.modeling_adaptive_span import AdaptiveSpanForCausalLM
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace

MODEL, LAYERS = "adaptive_span/bible", 4


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    folder = workspace.train(variant, ["data.eval_limit=65536"], seed)
    spans = AdaptiveSpanForCausalLM.from_pretrained(folder).spans.detach().numpy()
    figures = {f"layer_{layer}": float(mean) for layer, mean in enumerate(spans.mean(axis=1), 1)}
    return {"median": float(np.median(spans)), "longest": float(spans.max()), **figures}


def judge(results: Results) -> Finding:
    verdicts = {_of_one(result.figures) for result in results}
    words = f"the median span is {results.shown(MODEL, 'median')} bytes, the longest {results.shown(MODEL, 'longest')}"
    return Finding(verdicts.pop() if len(verdicts) == 1 else Verdict.NOT_FOUND, words)


def _of_one(figures: Figures) -> Verdict:
    layers = [figures[f"layer_{layer}"] for layer in range(1, LAYERS + 1)]
    if figures["longest"] < 1:
        return Verdict.NOT_FOUND
    few_are_long = figures["median"] < max(layers) / 2
    return Verdict.FOUND if few_are_long and np.argmax(layers) >= LAYERS / 2 else Verdict.OTHER


def draw(results: Results, axes: Any) -> None:
    places = np.arange(1, LAYERS + 1)
    for seed in sorted({result.seed for result in results}):
        figures = next(result.figures for result in results if result.seed == seed)
        axes.plot([figures[f"layer_{layer}"] for layer in places], places, "o", color=plots.BLUE, alpha=0.7)
    axes.set(xlabel="mean span of a layer's heads, in bytes", ylabel="layer", yticks=places)


CLAIM = Claim(
    system="Adaptive span",
    paper="Sukhbaatar et al. 2019, arXiv:1905.07799, section 4",
    statement="most heads learn short spans, and only a few of them, in higher layers, look far back",
    papers_figure="a picture of 12 layers alone: of a limit of thousands most heads use less than a hundred",
    experiment="The recipe `adaptive_span/bible`, 4 layers of 4 heads, a limit of 480 bytes, 400 steps.",
    criterion="with every seed some span is 1 or more, the median span is below half of the mean of the layer that "
    "looks farthest, and that layer is in the upper half.",
    variants=(MODEL,),
    figures={
        "median": "median span",
        "longest": "longest span",
        **{f"layer_{layer}": f"mean of layer {layer}" for layer in range(1, LAYERS + 1)},
    },
    measure=measure,
    judge=judge,
    draw=draw,
)
