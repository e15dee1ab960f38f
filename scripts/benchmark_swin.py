"""What a Swin Transformer costs on the CPU: against Transformers' own and timm's, and by the side of a picture.

    python scripts/benchmark_swin.py --json benchmarks/swin.json --page benchmarks/swin.md \\
        --plot benchmarks/swin_sides.png --timm FOLDER

Swin-T with the same random weights everywhere. Each model is first held to stock Swin in float64, logits and gradients.
timm is a peer where FOLDER has it: `pip install --no-deps --target FOLDER timm torchvision`. `--only` runs some
sections and keeps the rows of the others in FILE; `--quick` takes small models and pictures.

All contenders run under one allocator: the script starts itself again with MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ of 268435456 where the environment does not set them, so that none pays for mapping memory anew.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarking import ALLOCATOR_NOTE, Benchmark, Measure, under_allocator
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_tfamily import plots
from hf_tfamily.modeling.configuration_swin_transformer import SwinTransformerConfig
from hf_tfamily.modeling.modeling_swin_transformer import SwinTransformerForImageClassification

OURS, FORWARD, BOTH = "ours", "forward", "forward + backward"
# How many times faster than the fastest peer: (must, stretch).
GOALS = {FORWARD: (0.95, 1.1), BOTH: (0.95, 1.2)}
CLASSES = 1000
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
QUICK_SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
QUICK_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Setting:
    """One section: pictures of this size, in one type of number."""

    side: int
    batch_size: int
    dtype: torch.dtype
    compiled: bool = False

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + (", compiled" if self.compiled else "")
        return f"{self.batch_size} of {self.side}, {kind}"

    @property
    def note(self) -> str:
        text = f"Swin-T, {self.batch_size} pictures of {self.side} x {self.side}, weights and activations in "
        text += f"{str(self.dtype).removeprefix('torch.')}; the goals are set for the fastest peer. {ALLOCATOR_NOTE}"
        return text + (" Every model goes through torch.compile." if self.compiled else "")


SETTINGS = [
    Setting(224, 8, torch.float32),
    Setting(512, 2, torch.float32),
    Setting(224, 8, torch.bfloat16),
    Setting(512, 2, torch.bfloat16),
    Setting(224, 8, torch.float32, compiled=True),
]
KEPT = "kept for the backward pass"
KEPT_NOTE = """\
Tensors that autograd keeps between forward and backward, without parameters: counted, not timed.
"""
SIDES = "side of the picture"
SIDES_NOTE = f"""\
Forward, float32, one picture: Swin-T (28 million parameters) and stock ViT-S under sdpa (22 million): 12 layers as wide
as the stage of Swin-T that has half of its blocks, 384. With patches of 16 x 16 it does about as much work at 224;
patches of 8 x 8 are those of Swin-T's second stage. The last rows are exponents: cost grows like the number of pixels
to this power over the larger half of the sides. {ALLOCATOR_NOTE}
"""

# ---------------------------------------------------------------------------------------------------------------------
# Contenders


def swins(shape: dict, side: int, timm=None) -> dict[str, nn.Module]:
    """Ours and its peers, all with the same weights."""
    torch.manual_seed(0)
    fields = {**shape, "image_size": side, "num_labels": CLASSES, "drop_path_rate": 0.0}
    models: dict[str, nn.Module] = {OURS: SwinTransformerForImageClassification(SwinTransformerConfig(**fields))}
    weights = models[OURS].state_dict()
    for name in ("eager", "sdpa"):
        stock = SwinForImageClassification._from_config(SwinConfig(**fields), attn_implementation=name)
        models[f"stock {name}"] = stock
    if timm is not None:
        models["timm"] = timm.models.swin_transformer.SwinTransformer(
            img_size=side, num_classes=CLASSES, drop_path_rate=0.0, **shape
        )
    for name, model in models.items():
        model.load_state_dict(timm_weights(weights) if name == "timm" else weights)
    return {name: model.eval() for name, model in models.items()}


def import_timm(folder: Path):
    """timm from a folder that PyTorch and Transformers have not seen before, so that its torchvision is its own."""
    sys.path.append(str(folder))
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # it is built for other devices than this PyTorch, and lacks two operators
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(operators)
    import timm

    return timm


LIBRARIES: list[torch.library.Library] = []  # operators are gone when their library is
TIMM_NAMES = {
    "swin.": "",
    "encoder.": "",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "attention.q_proj": "attn.qkv",
    "attention.relative_position_bias.": "attn.",
    "layernorm": "norm",
    "classifier": "head.fc",
}


def timm_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under timm's names: one projection for three, and merging at the beginning of a stage instead of the end."""
    renamed = {}
    for name, tensor in weights.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            tensor = torch.cat([weights[name.replace(".q_proj", f".{letter}_proj")] for letter in "qkv"])
        for ours, theirs in TIMM_NAMES.items():
            name = name.replace(ours, theirs)
        if ".downsample" in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) + 1}.{rest}"
        renamed[name] = tensor
    return renamed


def logits(model: Callable, pixels: torch.Tensor) -> torch.Tensor:
    outputs = model(pixels)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def contender(direction: str, model: Callable, pixels: torch.Tensor, parameters: list) -> Callable[[], object]:
    """A call to time."""
    labels = torch.arange(len(pixels))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return logits(model, pixels)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(logits(model, pixels), labels), parameters)

    return forward if direction == FORWARD else both


# ---------------------------------------------------------------------------------------------------------------------
# Correctness: relative errors of norms


def results(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients that every model has under the same name and shape, in a row."""
    model.zero_grad()
    found = logits(model, pixels)
    F.cross_entropy(found, torch.arange(len(pixels))).backward()
    shared = [p.grad for n, p in model.named_parameters() if ".downsample.reduction" in n or n.endswith("_bias_table")]
    shared += [next(model.parameters()).grad, *(p.grad for p in list(model.parameters())[-2:])]
    return [found.detach().double(), torch.cat([gradient.double().flatten() for gradient in shared])]


def relative_errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


def correct(bench: Benchmark, models: dict[str, nn.Module], setting: Setting) -> dict[str, nn.Module]:
    """The models whose errors are at most twice those of stock eager Swin in the same type, beside rounding."""
    pixels = pictures(setting, 2 if setting.side < 512 else 1)
    reference = models["stock eager"].double()
    exact = results(reference, pixels.double())
    for model in models.values():
        model.to(setting.dtype)
    errors = {name: relative_errors(results(model, pixels), exact) for name, model in models.items()}
    rounding = 4 * torch.finfo(setting.dtype).eps
    budget = [2 * error + rounding for error in errors["stock eager"]]
    right = {}
    for name, model in models.items():
        both = ", ".join(f"{error:.1e} (of {most:.1e})" for error, most in zip(errors[name], budget))
        detail = f"errors of logits and gradients: {both}"
        if bench.holds(name, all(e <= b for e, b in zip(errors[name], budget)), detail):
            print(f"{name}: {detail}", flush=True)
            right[name] = model
    return right


def pictures(setting: Setting, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 3, setting.side, setting.side, generator=generator).to(setting.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def against_peers(bench: Benchmark, shape: dict, setting: Setting, timm=None) -> None:
    models = correct(bench, swins(shape, setting.side, timm), setting)
    if OURS not in models:
        return
    pixels = pictures(setting, setting.batch_size)
    for direction, (must, stretch) in GOALS.items():
        calls = {
            name: contender(
                direction, torch.compile(model) if setting.compiled else model, pixels, list(model.parameters())
            )
            for name, model in models.items()
        }
        times = bench.times(calls)
        ours = times.pop(OURS)
        fastest = min(times, key=lambda name: times[name].median)
        for name, time in times.items():
            goals = {"must": must, "stretch": stretch} if name == fastest else {}
            bench.add(direction, ours, time, peer_name=name, **goals)


def against_peers_in_memory(bench: Benchmark, shape: dict, setting: Setting, timm=None) -> None:
    models = correct(bench, swins(shape, setting.side, timm), setting)
    kept = {name: kept_mib(model, pictures(setting, setting.batch_size)) for name, model in models.items()}
    for name in kept if OURS in kept else ():
        if name != OURS:
            bench.add(setting.name, kept[OURS], kept[name], peer_name=name, unit="MiB")


def kept_mib(model: nn.Module, pixels: torch.Tensor) -> float:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        outputs = logits(model, pixels)  # which hold what is kept
    del outputs
    return sum(kept.values()) / 2**20


def by_side(bench: Benchmark, shape: dict, vit_shape: dict, sides: list[int], plot: Path | None) -> None:
    """Ours is held to its own eager attention in float64: stock Swin has no windows as small as those of side 112."""
    vits = {f"ViT-S/{patch}": patch for patch in (16, 8)}
    times: dict[str, list[Measure]] = {name: [] for name in (OURS, *vits)}
    fields = {**shape, "num_labels": CLASSES}
    ours = SwinTransformerForImageClassification(SwinTransformerConfig(**fields)).eval()
    eager = copy.deepcopy(ours).double()
    eager.set_attn_implementation("eager")
    for side in sides:
        pixels = torch.randn(1, 3, side, side)
        with torch.no_grad():
            exact = logits(eager, pixels.double())
            error = float((logits(ours, pixels) - exact).norm() / exact.norm())
        if not bench.holds(f"side {side}", error < 1e-5, f"error {error:.1e}"):
            return
        contenders: dict[str, nn.Module] = {OURS: ours}
        for name, patch in vits.items():
            config = ViTConfig(**vit_shape, image_size=side, patch_size=patch, num_labels=CLASSES)
            contenders[name] = ViTForImageClassification._from_config(config, attn_implementation="sdpa").eval()
        calls = {name: contender(FORWARD, model, pixels, []) for name, model in contenders.items()}
        slow = {"ViT-S/8": calls.pop("ViT-S/8")}  # half a minute at the largest side
        found = bench.times(calls) | bench.times(slow, rounds=2)
        for name, time in found.items():
            times[name].append(time)
        for name in vits:
            bench.add(f"{side} x {side}", found[OURS], found[name], peer_name=name)
    powers = {name: exponent(sides, of_model) for name, of_model in times.items()}
    for name in vits:
        bench.add("exponent", powers[OURS], powers[name], peer_name=name, unit="")
    if plot is not None:
        draw(sides, times, powers, plot)


def exponent(sides: list[int], times: list[Measure]) -> float:
    """By which power of the number of pixels time grows over the larger half of the sides (least squares)."""
    half = len(sides) // 2
    x = torch.tensor([2 * math.log(side) for side in sides[half:]])
    y = torch.tensor([math.log(time.median) for time in times[half:]])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@plots.styled
def draw(sides: list[int], times: dict[str, list[Measure]], powers: dict[str, float], path: Path) -> None:
    """Time over the number of pixels, and time for each pixel, which is level where cost is linear."""
    figure = plots.new_figure(10, 4)
    whole, each = figure.subplots(1, 2)
    pixels = [side**2 / 1e6 for side in sides]
    for (name, of_model), colour in zip(times.items(), ("#1f5fa8", "#d9730d", "#868e96"), strict=True):
        label = f"{'Swin-T, ours' if name == OURS else name}: pixels$^{{{powers[name]:.2f}}}$"
        seconds = [time.median / 1e3 for time in of_model]
        style = {"marker": "o", "markersize": 4, "color": colour, "label": label}
        whole.plot(pixels, seconds, **style)
        each.plot(sides, [time / size for time, size in zip(seconds, pixels)], **style)
    whole.set(xlabel="megapixels", ylabel="seconds", title="forward, one picture")
    each.set(xlabel="side", ylabel="seconds for each megapixel", title="the same for each megapixel", xticks=sides)
    # Where patches are small, attention is nearly all there is; the others are compared at the bottom.
    whole.set_ylim(0, 2.5 * times["ViT-S/16"][-1].median / 1e3)
    each.set_ylim(0, 2.5 * max(time.median / 1e3 / size for time, size in zip(times["ViT-S/16"], pixels)))
    whole.legend(frameon=False)
    plots.save(figure, path)


def main() -> int:
    sections = {setting.name: setting for setting in SETTINGS}
    options = {
        "--threads": {"type": int, "default": 2},
        "--timm": {"type": Path, "metavar": "FOLDER", "help": "where timm and torchvision are installed"},
        "--plot": {"type": Path, "metavar": "FILE", "help": f"draw the section '{SIDES}' there"},
    }
    bench = Benchmark("Swin Transformer on the CPU", __doc__, [*sections, KEPT, SIDES], options)
    if not bench.cpu_time:
        torch.set_num_threads(bench.args.threads)
    timm = import_timm(bench.args.timm) if bench.args.timm else None
    shape, vit_shape = (QUICK_SWIN, QUICK_VIT) if bench.quick else (SWIN_T, VIT_S)

    def adapted(setting: Setting) -> tuple:
        """Small where the run is to be quick; and timm, where windows cover every stage's grid evenly as it wants."""
        if bench.quick:
            return shape, Setting(56, 2, setting.dtype, setting.compiled), timm
        return shape, setting, timm if setting.side % 224 == 0 else None

    for name, setting in sections.items():
        if bench.start(name, setting.note):
            against_peers(bench, *adapted(setting))
    if bench.start(KEPT, KEPT_NOTE):
        for setting in SETTINGS:
            if not setting.compiled:
                against_peers_in_memory(bench, *adapted(setting))
    if bench.start(SIDES, SIDES_NOTE):
        sides = [32, 48, 64, 96] if bench.quick else list(range(112, 897, 112))
        by_side(bench, shape, vit_shape, sides, bench.args.plot)
    return bench.finish()


if __name__ == "__main__":
    under_allocator()
    sys.exit(main())
