"""Writes tests/data/layout_135ffd8.zip: checkpoints as commit 135ffd8 exported them, for tests/test_old_layout.py.

Run it in a checkout of that commit, with the package of that commit installed:

    git worktree add --detach ../old 135ffd8 && cd ../old
    python ../new/scripts/make_layout_zip.py ../new/tests/data/layout_135ffd8.zip

The zip holds code/ once, which each checkpoint had beside its weights, and for each system a folder with config.json,
model.safetensors, and a batch with the model's answer to it.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, ".")
from hf_tfamily.hub import export
from tests.hub.examples import NAMES, main_head, write_expected
from tests.tiny_models import tiny_model

FIXED_TIME = (2026, 1, 1, 0, 0, 0)
STRIDED = {"type": "per_head", "patterns": [{"type": "full"}, {"type": "strided", "stride": 3}]}
PATTERNS = [{"type": "local", "window": 5}, STRIDED]
# Systems that follow patterns only where they are set.
PATTERNED = ("rope_decoder", "vanilla_encoder", "vanilla_transformer")
SMALLER = {"hidden_size": 16, "num_attention_heads": 2}


def example(name: str):
    """A model of weights that compress well: multiples of 1/256."""
    torch.manual_seed(0)
    changes = {} if name == "swin_transformer" else dict(SMALLER)
    if name in PATTERNED:
        changes["attention_patterns"] = PATTERNS
    model = tiny_model(name, main_head(name), **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            parameter.mul_(256).round_().div_(256)
    model.tie_weights()
    return model


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in NAMES:
            model = example(name)
            export(model, folder / name)
            write_expected(name, model, folder)
            (folder / f"{name}.safetensors").rename(folder / name / "expected.safetensors")
            print(name, model.config._attn_implementation, model.num_parameters())
        files = {f"code/{path.name}": path for path in Path("modeling").glob("*.py")}
        files |= {f"{path.parent.name}/{path.name}": path for path in folder.glob("*/*") if path.suffix != ".py"}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for inside in sorted(files):
                entry = zipfile.ZipInfo(inside, FIXED_TIME)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                archive.writestr(entry, files[inside].read_bytes())
    print(target, Path(target).stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
