"""Count the files of ours that a reader follows through one call: those with at least one frame executed.

    python scripts/traced_files.py [--names]

Each case is a tiny model without padding (and without a head, but for `generate`), called a second time, when plans
and whatever else is kept are there.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from hf_tfamily import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerModel,
    SwinTransformerConfig,
    SwinTransformerModel,
    TransformerXLConfig,
    TransformerXLModel,
)

ROOT = Path(__file__).resolve().parents[1]
OURS = (ROOT / "modeling", ROOT / "src" / "hf_tfamily")
VOCABULARY = 96
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "vocab_size": VOCABULARY}
SMALL_SWIN = {**SIZES, "image_size": 16, "patch_size": 2, "window_size": 3, "encoder_stride": 4}


def traced_files(call: Callable[[], object]) -> list[str]:
    """Files of ours, from the root, of which `call` runs at least one frame."""
    seen = set()

    def profile(frame, event, argument):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = (Path(name).resolve() for name in seen if not name.startswith("<"))
    return sorted(str(path.relative_to(ROOT)) for path in paths if any(path.is_relative_to(home) for home in OURS))


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 16))


def forward() -> Callable[[], object]:
    model, tokens = SparseTransformerModel(SparseTransformerConfig(**SMALL)).eval(), ids()
    return lambda: model(tokens, use_cache=False)


def generate() -> Callable[[], object]:
    model, tokens = SparseTransformerForCausalLM(SparseTransformerConfig(**SMALL)).eval(), ids()
    return lambda: model.generate(tokens, max_new_tokens=2, do_sample=False)


def recurrent() -> Callable[[], object]:
    config = TransformerXLConfig(**SMALL, mem_len=16)
    model, tokens = TransformerXLModel._from_config(config, attn_implementation="block_sparse").eval(), ids()
    memory = model(ids(), use_cache=True).past_key_values
    return lambda: model(tokens, past_key_values=memory, use_cache=True)


def pictures() -> Callable[[], object]:
    model, values = SwinTransformerModel(SwinTransformerConfig(**SMALL_SWIN)).eval(), torch.randn(2, 3, 16, 16)
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
