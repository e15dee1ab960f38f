"""Does a block that is applied again and again learn what carries over to longer strings?"""

from ..reproduction import Claim, Figures, Workspace, compare

UNIVERSAL, VANILLA = "Universal Transformer", "Transformer"
RECIPES = {UNIVERSAL: "universal_transformer/reverse", VANILLA: "vanilla_transformer/reverse"}
COMMON = ("training.max_steps=1000", "training.eval_strategy=no")


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    metrics = workspace.metrics(RECIPES[variant], COMMON, seed)
    return {"longer": metrics["longer_symbols"], "trained": metrics["symbols"]}


CLAIM = Claim(
    system="Universal Transformer",
    paper="Dehghani et al. 2018, arXiv:1807.03819, section 3.3",
    statement="trained on short strings, it does better on longer ones than the Transformer",
    papers_figure="reversing, trained on 40 symbols and tested on 400: 0.96 of the symbols right, the Transformer 0.13",
    experiment="The recipes `universal_transformer/reverse` and `vanilla_transformer/reverse`, 1,000 steps: strings "
    "of up to 16 digits are written backwards; tests are as long, and of 32 digits.",
    criterion="with every seed its share of right symbols in strings of 32 digits is above the Transformer's with any.",
    variants=(UNIVERSAL, VANILLA),
    figures={"longer": "symbols right, 32 digits", "trained": "symbols right, up to 16"},
    measure=measure,
    judge=lambda results: compare(results, "longer", UNIVERSAL, VANILLA, lower_is_better=False),
)
