"""Shaw's relative positions against absolute ones."""

from ..reproduction import Claim, compare, of_recipe

RELATIVE, SINUSOIDAL, LEARNED = "relative", "sinusoidal", "learned"
VARIANTS = {name: (f"model.position_encoding={name}",) for name in (RELATIVE, SINUSOIDAL, LEARNED)}

CLAIM = Claim(
    system="Transformer, positions",
    paper="Shaw et al. 2018, arXiv:1803.02155, section 4.2, table 1",
    statement="relative positions do better than sinusoidal ones",
    papers_figure="WMT 2014 English to German, base: BLEU 26.8 against 26.5; big: 29.2 against 27.9",
    experiment="The recipe `vanilla_transformer/bible`, a decoder of 4 layers that reads 128 bytes, for 600 steps; one "
    "table of distances up to 16 for each layer, sinusoids, and learned places.",
    criterion="with every seed relative positions have fewer bits per byte than sinusoidal ones with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per byte"},
    measure=of_recipe("vanilla_transformer/bible", VARIANTS, {"bits": "bits_per_byte"}, ("data.eval_limit=65536",)),
    judge=lambda results: compare(results, "bits", RELATIVE, SINUSOIDAL),
)
