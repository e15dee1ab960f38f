"""Two-dimensional local attention against one-dimensional, enlarging photos."""

from ..reproduction import Claim, compare, of_recipe

TWO, ONE = "2-D blocks of 8x8", "1-D blocks of 64"
VARIANTS = {
    TWO: ("data.block=[8, 8]",),
    ONE: ("model.attention_patterns={type: block_1d, block: 64, flange: 64}", "data.block=null"),
}
COMMON = ("training.max_steps=1000", "data.eval_limit=48")

CLAIM = Claim(
    system="Image Transformer",
    paper="Parmar et al. 2018, arXiv:1802.05751, section 5.3",
    statement="for enlarging pictures two-dimensional blocks do better than one-dimensional ones",
    papers_figure="people fooled by enlarged faces at temperature 0.8: 36.11 % (2-D), 35.94 % (1-D)",
    experiment="The recipe `image_transformer/super_resolution` for 1,000 steps with 2-D blocks of 8x8 and a flange "
    "of 2, and with 1-D blocks of 64 values behind as many.",
    criterion="with every seed 2-D has fewer bits per dimension than 1-D with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per dimension", "psnr": "PSNR at temperature 0.8 in dB"},
    measure=of_recipe(
        "image_transformer/super_resolution", VARIANTS, {"bits": "bits_per_dim", "psnr": "psnr_temperature_0.8"}, COMMON
    ),
    judge=lambda results: compare(results, "bits", TWO, ONE),
)
