"""What reads longer texts than it was trained on: ALiBi, and other ways of knowing order."""

from typing import Any

from .. import finished
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace

ALIBI, SINUSOIDAL = "alibi", "sinusoidal"
VARIANTS = (ALIBI, "t5", "transformer_xl", "rotary", SINUSOIDAL)
LENGTHS = (128, 256, 512)
MOST = 0.02  # bits per byte that reading longer may cost


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    changes = ["data.eval_limit=65536", f"model.position_encoding={variant}"]
    folder = workspace.train("vanilla_transformer/bible", changes, seed)
    return {
        f"at_{length}": finished.evaluate(folder, [f"data.length={length}"], batch_size=16, progress=False)[
            "bits_per_byte"
        ]
        for length in LENGTHS
    }


def changes_of(results: Results, variant: str) -> list[float]:
    """By how much reading the longest text costs more than reading as long as in training, seed by seed."""
    ends = (results.values(variant, f"at_{length}") for length in (LENGTHS[0], LENGTHS[-1]))
    return [longest - trained for trained, longest in zip(*ends)]


def judge(results: Results) -> Finding:
    costs = {variant: changes_of(results, variant) for variant in VARIANTS}
    words = "from 128 to 512 bytes, bits per byte change by " + ", ".join(
        f"{min(cost):+.3f} to {max(cost):+.3f} ({variant})" for variant, cost in costs.items()
    )
    alibi_holds, sinusoids_hold = (max(costs[variant]) <= MOST for variant in (ALIBI, SINUSOIDAL))
    if alibi_holds and min(costs[SINUSOIDAL]) > MOST:
        return Finding(Verdict.FOUND, words)
    return Finding(Verdict.NOT_FOUND if alibi_holds or sinusoids_hold else Verdict.OTHER, words)


def draw(results: Results, axes: Any) -> None:
    for variant in VARIANTS:
        axes.plot(LENGTHS, [results.mean(variant, f"at_{length}") for length in LENGTHS], "o-", label=variant)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set(xlabel="bytes in a test (trained with 128)", ylabel="held-out bits per byte")
    axes.legend()


CLAIM = Claim(
    system="Transformer, positions",
    paper="Press et al. 2021, arXiv:2108.12409, section 4",
    statement="with ALiBi a model trained on short texts reads longer ones no worse, and with sinusoids it does not",
    papers_figure="WikiText-103, trained at 512: perplexity 19.73 at 512 and 18.40 at 3,072 with ALiBi; sinusoids "
    "lose from a few dozen tokens more on",
    experiment="The recipe `vanilla_transformer/bible`, a decoder of 4 layers trained on 128 bytes, read in pieces of "
    "128, 256 and 512 bytes of the same held-out text.",
    criterion=f"at 512 bytes ALiBi has at most {MOST} bits per byte more than at 128, with every seed, and sinusoids "
    "have more than that.",
    variants=VARIANTS,
    figures={f"at_{length}": f"bits per byte at {length}" for length in LENGTHS},
    measure=measure,
    judge=judge,
    draw=draw,
)
