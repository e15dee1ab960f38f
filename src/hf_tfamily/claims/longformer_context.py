"""Whether an encoder makes use of what stands far away in a long document."""

from ..reproduction import Claim, Finding, Results, all_of, compare, of_recipe

NEAR, MIDDLE, FAR = "8 bytes", "32 bytes", "128 bytes"
WINDOWS = {NEAR: 9, MIDDLE: 33, FAR: 129}  # each counts the byte itself
VARIANTS = {name: (f"model.attention_patterns={{type: local, window: {of}}}",) for name, of in WINDOWS.items()}
COMMON = (
    *("training.max_steps=300", "training.per_device_train_batch_size=4"),
    *("training.eval_strategy=no", "data.eval_limit=256"),
)


def judge(results: Results) -> Finding:
    return all_of(compare(results, "bits", MIDDLE, NEAR), compare(results, "bits", FAR, MIDDLE))


CLAIM = Claim(
    system="Long encoder",
    paper="Beltagy et al. 2020, arXiv:2004.05150, section 5",
    statement="a masked language model does better where it sees more of a long document at once",
    papers_figure="bits per hidden character, base: RoBERTa of 512 tokens 1.846, Longformer of 4,096 tokens 1.705",
    experiment="The recipe `long_encoder/bible`, 300 steps of 4 rows of 511 bytes, 4 layers whose windows reach 8, 32 "
    "or 128 bytes either way; the first token is global.",
    criterion="with every seed a reach of 32 has fewer bits per hidden byte than one of 8 with any, and 128 fewer than "
    "32; other than claimed if one of them has more with every seed.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per hidden byte"},
    measure=of_recipe("long_encoder/bible", VARIANTS, {"bits": "bits_per_hidden_token"}, COMMON),
    judge=judge,
)
