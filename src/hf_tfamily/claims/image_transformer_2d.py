"""Two-dimensional local attention against one-dimensional, enlarging photos."""

from ..reproduction import Claim, compare, of_recipe

TWO, ONE = "2-D blocks of 8x8", "1-D blocks of 64"
VARIANTS = {
    TWO: ("data.block=[8, 8]",),
    ONE: ("model.attention_patterns={type: block_1d, block: 64, flange: 64}", "data.block=null"),
}
COMMON = (
    *("model.image_size=16", "model.source_image_size=4", "data.size=16", "data.source_size=4", "data.eval_limit=64"),
    *("training.max_steps=1500", "training.per_device_train_batch_size=2"),
)

CLAIM = Claim(
    system="Image Transformer",
    paper="Parmar et al. 2018, arXiv:1802.05751, section 5.3",
    statement="for enlarging pictures two-dimensional blocks do better than one-dimensional ones",
    papers_figure="people fooled by enlarged faces at temperature 0.8: 36.11 % (2-D), 35.94 % (1-D)",
    experiment="The recipe `image_transformer/super_resolution` from 4x4 to 16x16 pixels for 1,500 steps of two "
    "pictures: 2-D blocks of 8x8 with a flange of 2, and 1-D blocks of 64 values behind as many.",
    criterion="with every seed 2-D has fewer bits per dimension than 1-D with any.",
    variants=tuple(VARIANTS),
    figures={"bits": "held-out bits per dimension", "psnr": "PSNR at temperature 0.8 in dB"},
    measure=of_recipe(
        "image_transformer/super_resolution", VARIANTS, {"bits": "bits_per_dim", "psnr": "psnr_t0.8"}, COMMON
    ),
    judge=lambda results: compare(results, "bits", TWO, ONE),
)
