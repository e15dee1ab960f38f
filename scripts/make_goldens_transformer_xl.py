"""Makes tests/goldens/transformer_xl: what the last Transformers with a working Transformer-XL computes.

It needs an environment of its own:

    python3.11 -m venv txl && txl/bin/pip install torch==2.13.0 transformers==4.30.2 "numpy<2" safetensors
    txl/bin/python scripts/make_goldens_transformer_xl.py

Each golden is a small random model's config.json, and a safetensors file with its weights ("weights." + name), the ids
[2, 19] and their log-probabilities [2, 19, vocabulary], read in three segments of SEGMENTS tokens.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TransfoXLConfig, TransfoXLLMHeadModel, __version__

FOLDER = Path(__file__).parents[1] / "tests" / "goldens" / "transformer_xl"
SEGMENTS = (7, 5, 7)
SIZES = {"vocab_size": 40, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "n_layer": 2, "mem_len": 6}
MODELS = {
    # Three clusters of different widths, projections tied but the first, own u and v in every layer.
    "adaptive": {"d_embed": 16, "cutoffs": [12, 24], "div_val": 2, "clamp_len": 8, "same_length": True},
    # Three clusters of one width with one projection, shared u and v, norm first.
    "one_width": {
        "d_embed": 8,
        "cutoffs": [12, 24],
        "div_val": 1,
        "clamp_len": -1,
        "same_length": False,
        "untie_r": False,
        "pre_lnorm": True,
        "proj_share_all_but_first": False,
    },
    # One table of embeddings as wide as the model.
    "plain": {"d_embed": 16, "cutoffs": [], "div_val": 1, "clamp_len": 4, "same_length": False, "untie_r": False},
}


@torch.no_grad()
def make(name: str, fields: dict) -> None:
    config = TransfoXLConfig(
        **SIZES, **fields, init_std=0.4, proj_init_std=0.4, architectures=["TransfoXLLMHeadModel"], eos_token_id=0
    )
    model = TransfoXLLMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases off their initial 1 and 0, so that a lost one shows
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(config.vocab_size, (2, sum(SEGMENTS)))
    memory, outputs = None, []
    for segment in ids.split(SEGMENTS, dim=1):
        output = model(segment, mems=memory)
        memory = output.mems
        outputs.append(output.logits)

    FOLDER.mkdir(parents=True, exist_ok=True)
    config.to_json_file(FOLDER / f"{name}.json")
    tensors = {f"weights.{key}": tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
    tensors |= {"ids": ids, "log_probabilities": torch.cat(outputs, dim=1).contiguous()}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata={"made_with": f"transformers {__version__}"})


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, fields in MODELS.items():
        make(name, fields)
