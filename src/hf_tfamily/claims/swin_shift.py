"""Do windows that shift do better than windows that stay?"""

from ..reproduction import Claim, compare, of_recipe

SHIFTED, STAYING = "shifted windows", "windows that stay"
VARIANTS = {SHIFTED: (), STAYING: ("model.shifted_windows=false",)}
COMMON = (
    *("data.source=digit_classes", "model.image_size=8", "model.patch_size=1", "model.window_size=2"),
    *("model.encoder_stride=2", "training.max_steps=400", "training.eval_strategy=no", "training.save_strategy=no"),
)

CLAIM = Claim(
    system="Swin Transformer",
    paper="Liu et al. 2021, arXiv:2103.14030, section 4.4, table 4",
    statement="shifting the windows helps",
    papers_figure="ImageNet, Swin-T: 81.3 % with shifted windows, 80.2 % without",
    experiment="The recipe `swin_transformer/fashion_mnist` on handwritten digits of 8x8 pixels, 400 steps: patches "
    "of a pixel and windows of 2x2, so that no window sees a digit and neighbours must be heard.",
    criterion="with every seed shifted windows are right more often than staying ones with any.",
    variants=tuple(VARIANTS),
    figures={"accuracy": "held-out accuracy"},
    measure=of_recipe("swin_transformer/fashion_mnist", VARIANTS, {"accuracy": "accuracy"}, COMMON),
    judge=lambda results: compare(results, "accuracy", SHIFTED, STAYING, lower_is_better=False),
    seeds=(0, 1, 2),
)
