"""Tiny causal language models, ours and stock ones, and a text for them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
)

from tests.tiny_models import tiny_model

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
FFN = {"intermediate_size": 48}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **FFN, initializer_range=0.3),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "bloom": BloomConfig(**{**SIZES, "hidden_size": 32}),
    "gpt_neox": GPTNeoXConfig(**SIZES, **FFN),
    "mistral": MistralConfig(**SIZES, **FFN, num_key_value_heads=2, sliding_window=8),
    "mixtral": MixtralConfig(**SIZES, **FFN, num_key_value_heads=2, num_local_experts=2),
}
MAMBA = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
OURS = ("sparse_transformer", "rope_decoder", "transformer_xl", "vanilla_transformer")


def tiny(name):
    """A tiny model by its type, in evaluation mode."""
    torch.manual_seed(0)
    if name in CONFIGS:
        return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return tiny_model(name, AutoModelForCausalLM)


def text(count, seed=1):
    return torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed)).numpy()
