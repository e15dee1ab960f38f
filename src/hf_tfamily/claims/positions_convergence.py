"""How fast rotary positions learn, against sinusoidal ones."""

from typing import Any

from .. import plots
from ..reproduction import Claim, Figures, Finding, Results, Workspace, all_of, compare

ROTARY, SINUSOIDAL = "rotary", "sinusoidal"
STEPS = (150, 300, 600)


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    """A training of its own for each number of steps, each with the whole of its schedule."""
    changes = ["data.eval_limit=65536", f"model.position_encoding={variant}"]
    return {
        f"after_{steps}": workspace.metrics(
            "vanilla_transformer/bible", [*changes, f"training.max_steps={steps}"], seed
        )["bits_per_byte"]
        for steps in STEPS
    }


def judge(results: Results) -> Finding:
    return all_of(*(compare(results, f"after_{steps}", ROTARY, SINUSOIDAL) for steps in STEPS[:2]))


def draw(results: Results, axes: Any) -> None:
    for variant, colour in ((ROTARY, plots.BLUE), (SINUSOIDAL, plots.ORANGE)):
        for steps in STEPS:
            values = results.values(variant, f"after_{steps}")
            axes.plot([steps] * len(values), values, "o", color=colour, alpha=0.6)
        axes.plot(STEPS, [results.mean(variant, f"after_{steps}") for steps in STEPS], color=colour, label=variant)
    axes.set(xlabel="steps of training", ylabel="held-out bits per byte", xticks=STEPS)
    axes.legend()


CLAIM = Claim(
    system="Transformer, positions",
    paper="Su et al. 2021, arXiv:2104.09864, section 4.3, figure 3",
    statement="rotary positions converge faster than sinusoidal ones",
    papers_figure="the loss curves of pre-training alone, no number",
    experiment="The recipe `vanilla_transformer/bible`, a decoder of 4 layers that reads 128 bytes, trained for 150, "
    "300 and 600 steps with a schedule of their length.",
    criterion="after 150 and after 300 steps rotary positions have fewer bits per byte, with every seed.",
    variants=(ROTARY, SINUSOIDAL),
    figures={f"after_{steps}": f"bits per byte after {steps} steps" for steps in STEPS},
    measure=measure,
    judge=judge,
    draw=draw,
)
