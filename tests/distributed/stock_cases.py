"""What each rank of test_stock_context_parallel runs: every small stock language model, cut, equals one process or is
refused by name."""

import copy
import re
import warnings

import torch
from transformers import CONFIG_MAPPING, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from hf_tfamily.auto import SYSTEMS
from hf_tfamily.distributed import context_parallel

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "hidden_dropout_prob", "dropout")
MOST_PARAMETERS = 4_000_000
BY_NAME = re.compile("context_parallel|block_sparse|one process")


def small_model(name):
    """One whose config takes the sizes above; None for others."""
    config_class = CONFIG_MAPPING[name]
    usual = config_class()
    if usual.get_text_config() is not usual:
        return None
    config = config_class(**{key: value for key, value in SMALL.items() if getattr(usual, key, None) is not None})
    config.pad_token_id = 0
    if kinds := list(dict.fromkeys(getattr(usual, "layer_types", None) or [])):
        config.layer_types, config.num_hidden_layers = kinds, len(kinds)
    for dropout in DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    head = next((heads[type(config)] for heads in mappings if type(config) in heads), None)
    if head is None or not hasattr(head, "_from_config"):
        return None
    with torch.device("meta"):
        size = sum(p.numel() for p in head._from_config(copy.deepcopy(config)).parameters())
    return head._from_config(config).eval() if size <= MOST_PARAMETERS else None


def whole_and_cut(model):
    """Logits [2, 33, V] of one process, or None where the engine refuses the model; and a function for those of all
    ranks. Weights are large, so that order matters."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.3 if parameter.ndim > 1 else 1 + noise * 0.1
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, 20:] = 0
    batch = {"input_ids": torch.randint(3, 60, (2, 33)), "attention_mask": mask}
    model.set_attn_implementation("block_sparse")
    whole = model(**batch).logits

    def cut():
        with context_parallel(model) as ranks:
            return ranks.gather(model(**ranks.shard(batch)).logits, mask)[mask.bool()]

    return whole[mask.bool()], cut


@torch.no_grad()
def every_stock_model():
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    equal, refused, wrong = set(), {}, []
    for name in sorted(set(CONFIG_MAPPING.keys()) - {system.name for system in SYSTEMS}):
        torch.manual_seed(0)
        try:
            whole, cut = whole_and_cut(small_model(name))
        except Exception:  # not a small language model, or none for the engine: that is another test's
            continue
        try:
            if (cut() - whole).abs().max() <= 1e-3 * whole.abs().max():
                equal.add(name)
            else:
                wrong.append(name)
        except ValueError as error:
            refused[name] = str(error)
    assert not wrong
    assert all(BY_NAME.search(why) for why in refused.values()), refused
    assert {"llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "qwen3", "modernbert"} <= equal
    assert {"bloom", "llama4_text", "roberta"} <= set(refused)


CASES = {"every stock model": every_stock_model}
