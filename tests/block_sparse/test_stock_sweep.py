"""Every text model of Transformers, with the sizes that its config has by default: it runs, or is refused by name.

Models are made without storage, two layers each (or one of every kind), and run on tensors without values.
"""

import re
import warnings

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from hf_tfamily import Local, set_attention_patterns
from hf_tfamily.auto import SYSTEMS

BY_NAME = re.compile("block_sparse|cannot be put under attention patterns")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def stock_models():
    """(name, model) of those that a default config describes and that run without values under sdpa or eager."""
    ours = {system.name for system in SYSTEMS}
    for name in sorted(set(CONFIG_MAPPING.keys()) - ours):
        try:
            model = small_model(CONFIG_MAPPING[name]())
            if model is not None:
                run(model)
                yield name, model
        except Exception:
            continue


def small_model(config):
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
    head = next((heads[type(config)] for heads in mappings if type(config) in heads), None)
    if head is None or not hasattr(head, "_from_config"):
        return None
    text = config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or []))
    if kinds:
        text.layer_types = kinds
    text.num_hidden_layers = len(kinds) or 2
    for experts in EXPERTS:
        if getattr(text, experts, None):
            setattr(text, experts, max(4, getattr(text, "num_experts_per_tok", 2) or 2))
    with torch.device("meta"):
        return head._from_config(config).eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.zeros(1, 96, dtype=torch.long, device="meta"))


@pytest.mark.slow
def test_every_stock_model_runs_or_is_refused_by_name():
    ran, refused, wrong = {True: set(), False: set()}, {True: set(), False: set()}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, model in stock_models():
            for under_pattern in (False, True):
                try:
                    if under_pattern:
                        set_attention_patterns(model, Local(64), attention_dropout=0.0)
                    else:
                        model.set_attn_implementation("block_sparse")
                    run(model)
                    ran[under_pattern].add(name)
                except (ValueError, AttributeError) as error:
                    refused[under_pattern].add(name)
                    if not BY_NAME.search(str(error)):
                        wrong.append((name, under_pattern, repr(error)))
                except Exception as error:
                    wrong.append((name, under_pattern, repr(error)))
    assert not wrong
    assert {"llama", "mistral", "gemma3_text", "qwen2", "gpt2", "bert", "modernbert", "opt"} <= ran[True] & ran[False]
    assert len(ran[True]) > 60, len(ran[True])
    assert len(ran[False]) > 80, len(ran[False])
