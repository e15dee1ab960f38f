"""Which compression serves best."""

from ..reproduction import Claim, Finding, Results, Verdict, of_recipe

BEST = "convolution, attention reconstruction"
VARIANTS = {
    BEST: ("model.compression=conv", "model.compression_loss=attention_reconstruction"),
    "convolution, auto-encoding": ("model.compression=conv", "model.compression_loss=auto_encoding"),
    "mean pooling": ("model.compression=mean_pool",),
    "max pooling": ("model.compression=max_pool",),
    "most used": ("model.compression=most_used", "model.attn_implementation=eager"),
}


def judge(results: Results) -> Finding:
    means = {variant: results.mean(variant, "bits") for variant in VARIANTS}
    others = [variant for variant in VARIANTS if variant != BEST]
    ranked = sorted(means, key=means.get)
    words = f"from the best: {', '.join(f'{variant} {means[variant]:.4f}' for variant in ranked)}"
    worst_of_best = max(results.values(BEST, "bits"))
    if all(worst_of_best < min(results.values(other, "bits")) for other in others):
        return Finding(Verdict.FOUND, words)
    beaten = any(max(results.values(other, "bits")) < min(results.values(BEST, "bits")) for other in others)
    return Finding(Verdict.OTHER if beaten else Verdict.NOT_FOUND, words)


CLAIM = Claim(
    system="Compressive Transformer",
    paper="Rae et al. 2019, arXiv:1911.05507, section 5",
    statement="a convolution that learns to reconstruct attention is the best compression",
    papers_figure="enwik8, bits per character: convolution with attention reconstruction 0.973, most used 0.980, mean "
    "pooling 0.982, convolution with auto-encoding 0.984, max pooling 0.986",
    experiment="The recipe `compressive_transformer/bible`, 400 steps, with five compressions.",
    criterion="with every seed it has fewer bits per byte than any other compression with any; other than claimed if "
    "another compression has fewer with every seed.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe("compressive_transformer/bible", VARIANTS, {"bits": "bits_per_byte"}, ("data.eval_limit=65536",)),
    judge=judge,
)
