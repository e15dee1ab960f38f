"""How far heads learn to look back, and what it saves to let them see no farther.

    python scripts/adaptive_span.py --json benchmarks/adaptive_span.json --page benchmarks/adaptive_span.md \\
        --plot benchmarks/adaptive_span.png

Trains the recipe `adaptive_span/bible`, draws the span of every head, freezes them, and times a training step of the
same model before and after, which must give the same loss. `--model FOLDER` takes a finished run instead of training.
"""

import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarking import ALLOCATOR_NOTE, Benchmark, under_allocator

from hf_tfamily import AdaptiveSpanForCausalLM, plots
from hf_tfamily.data import load_data
from hf_tfamily.recipes import load_recipe
from hf_tfamily.training import train

RECIPE = "adaptive_span/bible"
LENGTHS = (512, 2048, 8192)
CLAIM = """\
Sukhbaatar et al. 2019, section 4: most heads learn short spans, and only a few of them, in higher layers, look far
back. Held to be found here if some span is 1 or more, the median span is below half of the mean of the longest layer,
and the longest layer is in the upper half.
"""


@plots.styled
def draw(spans: np.ndarray, ramp: int, path: Path) -> None:
    """The spans of every head, a row of bars for each layer."""
    figure = plots.new_figure(5.6, 0.9 + 0.55 * len(spans))
    axes = figure.subplots()
    height = 0.8 / spans.shape[1]
    for head in range(spans.shape[1]):
        places = np.arange(len(spans)) + (head - (spans.shape[1] - 1) / 2) * height
        axes.barh(places, np.sort(spans, axis=1)[:, head], height * 0.9, color=plots.BLUE)
        axes.barh(places, ramp, height * 0.9, left=np.sort(spans, axis=1)[:, head], color=plots.BLUE, alpha=0.3)
    axes.set(xlabel="span in bytes, and its ramp", ylabel="layer", yticks=range(len(spans)))
    axes.set_yticks(range(len(spans)), range(1, len(spans) + 1))
    plots.save(figure, path)


def verdict(spans: np.ndarray) -> str:
    """What was found of CLAIM."""
    means = spans.mean(axis=1)
    found = spans.max() >= 1 and np.median(spans) < means.max() / 2 and means.argmax() >= len(spans) / 2
    of_layers = ", ".join(f"{mean:.0f}" for mean in means)
    return (
        f"{'Found' if found else 'Not found at this size'}: the median span is {np.median(spans):.0f}, the longest "
        f"{spans.max():.0f}; means of the layers, from the first: {of_layers}."
    )


def finished(bench: Benchmark) -> AdaptiveSpanForCausalLM:
    if bench.args.model:
        return AdaptiveSpanForCausalLM.from_pretrained(bench.args.model)
    changes = ["training.max_steps=3", "training.warmup_steps=1"] if bench.quick else []
    with tempfile.TemporaryDirectory() as folder:
        return AdaptiveSpanForCausalLM.from_pretrained(train(load_recipe(RECIPE, changes), Path(folder) / "run"))


def step(model: AdaptiveSpanForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one row and all gradients."""
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def main() -> int:
    arguments = {
        "--plot": {"type": Path, "metavar": "FILE", "help": "draw the spans there"},
        "--model": {"metavar": "FOLDER", "help": "a finished run of the recipe"},
    }
    bench = Benchmark("Adaptive spans", __doc__, ["a training step"], arguments)
    model = finished(bench).eval()  # in which a span costs nothing, so that losses compare
    spans = model.spans.detach().numpy()
    if bench.args.plot:
        draw(spans, model.config.span_ramp, bench.args.plot)
    picture = "" if bench.args.plot is None else f"![spans of every head]({bench.args.plot.name})\n\n"
    note = (
        f"{CLAIM}\n{verdict(spans)}\n\n{picture}The model of the recipe `{RECIPE}` ({model.num_parameters():,} "
        "parameters), one row, block_sparse, forward and backward: with frozen spans, while spans learn (every head "
        f"computes the last {model.config.max_span + model.config.span_ramp}), and with frozen spans under sdpa. "
        f"{ALLOCATOR_NOTE}"
    )
    bench.start("a training step", note)
    frozen = copy.deepcopy(model)
    frozen.freeze_spans()
    masked = copy.deepcopy(frozen)
    masked.set_attn_implementation("sdpa")
    text = torch.from_numpy(load_data({"source": "bible_stream"}).eval).long()
    for length in LENGTHS[:1] if bench.quick else LENGTHS:
        ids = text[None, :length]
        models = {"frozen": frozen, "learning": model, "frozen, sdpa": masked}
        if length > 2048:
            del models["frozen, sdpa"]  # a bias of every pair in every layer
        losses = {name: step(one, ids) for name, one in models.items()}
        worst = max(abs(float(loss - losses["frozen"])) for loss in losses.values())
        if bench.holds(f"{length:,} bytes", worst < 1e-4, f"losses differ by {worst:.1e}"):
            times = bench.times({name: partial(step, one, ids) for name, one in models.items()})
            for name in list(models)[1:]:
                bench.add(f"{length:,} bytes", times["frozen"], times[name], peer_name=name)
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
