"""Count the files of ours that a reader follows through one call: those with at least one frame executed.

    python scripts/traced_files.py [--names]

Each case is the second call of a tiny model without padding and, but for `generate`, without a head.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import hf_tfamily  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / "modeling", ROOT / "src" / "hf_tfamily")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {"image_size": 16, "patch_size": 2, "window_size": 3, "encoder_stride": 4}


def traced_files(call: Callable[[], object]) -> list[str]:
    """Files of ours, from the root, of which `call` runs at least one frame."""
    seen = set()

    def profile(frame, event, argument):
        seen.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = (Path(name).resolve() for name in seen)
    return sorted(str(path.relative_to(ROOT)) for path in paths if any(path.is_relative_to(home) for home in OURS))


def tiny(model_type: str, auto_class: type = AutoModel, **fields) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **SIZES, **fields)
    return auto_class.from_config(config, attn_implementation="block_sparse").eval()


def forward() -> Callable[[], object]:
    model, ids = tiny("sparse_transformer"), torch.randint(96, (2, 16))
    return lambda: model(ids, use_cache=False)


def generate() -> Callable[[], object]:
    model, ids = tiny("sparse_transformer", AutoModelForCausalLM), torch.randint(96, (2, 16))
    return lambda: model.generate(ids, max_new_tokens=2, do_sample=False)


def recurrent() -> Callable[[], object]:
    model, ids = tiny("transformer_xl", mem_len=16), torch.randint(96, (2, 16))
    memory = model(ids, use_cache=True).past_key_values
    return lambda: model(ids, past_key_values=memory, use_cache=True)


def pictures() -> Callable[[], object]:
    model, values = tiny("swin_transformer", **PICTURES), torch.randn(2, 3, 16, 16)
    return lambda: model(values)


CASES = {
    "sparse_transformer under block_sparse": forward,
    "sparse_transformer, generate() of two tokens": generate,
    "transformer_xl with memory under block_sparse": recurrent,
    "swin_transformer": pictures,
}


@torch.no_grad()
def count() -> dict[str, list[str]]:
    """The files of every case's second call."""
    found = {}
    for title, prepare in CASES.items():
        call = prepare()
        call()
        found[title] = traced_files(call)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--names", action="store_true", help="list the files too")
    names = parser.parse_args().names
    for title, files in count().items():
        print(f"{len(files):3} {title}", *(files if names else ()), sep="\n    ")
