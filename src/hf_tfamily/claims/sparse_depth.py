"""Does a Sparse Transformer of 128 layers train?"""

import math
from collections import Counter

from ..data import load_data
from ..reproduction import Claim, Figures, Finding, Results, Verdict, Workspace

LAYERS = ("128 layers", "4 layers")
CHANGES = (
    *("model.hidden_size=64", "model.num_attention_heads=2", "model.qk_head_dim=16", "model.intermediate_size=128"),
    *("model.initializer_scale=0.125", "training.max_steps=150", "training.warmup_steps=30"),
    *("training.learning_rate=1e-3", "data.eval_limit=99", "training.gradient_checkpointing=false"),
)


def measure(variant: str, seed: int, workspace: Workspace) -> Figures:
    changes = [*CHANGES, f"model.num_hidden_layers={variant.split()[0]}"]
    metrics = workspace.metrics("sparse_transformer/digits", changes, seed)
    return {"bits": metrics["bits_per_dim"], "frequencies": frequencies()}


def frequencies() -> float:
    """Bits of a level whose share of all levels is known: the entropy of the training pictures' levels."""
    counts = Counter(level for row in load_data({"source": "digits"}).train["input_ids"] for level in row[1:].tolist())
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def judge(results: Results) -> Finding:
    bound = results.mean(LAYERS[0], "frequencies")
    worst = max(results.values(LAYERS[0], "bits"))
    words = f"{LAYERS[0]}: {results.shown(LAYERS[0], 'bits')} bits per dimension, frequencies alone {bound:.3f}"
    return Finding(Verdict.FOUND if worst < 0.9 * bound else Verdict.NOT_FOUND, words)


CLAIM = Claim(
    system="Sparse Transformer",
    paper="Child et al. 2019, arXiv:1904.10509, sections 5.2 and 7.1",
    statement="networks of 128 layers train",
    papers_figure="CIFAR-10: 128 layers, 2.80 bits per dimension",
    experiment="The recipe `sparse_transformer/digits` at width 64 with the paper's initial weights for 150 steps of 8 "
    "pictures, with 128 layers and with 4.",
    criterion="with every seed 128 layers come to less than nine tenths of what guessing levels by their frequency "
    "costs.",
    variants=LAYERS,
    figures={"bits": "held-out bits per dimension", "frequencies": "frequencies alone"},
    measure=measure,
    judge=judge,
)
