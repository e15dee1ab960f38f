"""Continuous batching (`generate_batch`) writes what plain greedy `generate()` does, or is refused at the call."""

from inspect import signature

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.tiny_models import TINY, tiny_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
SIZE = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"  # as of 5.17
PAGES = ContinuousBatchingConfig(**{SIZE: 16}, num_blocks=16, max_batch_tokens=64)
NEW = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
PATTERN = {"type": "local", "window": 4}
WORKING = [
    ("rope_decoder", {}),
    ("rope_decoder", {"num_key_value_heads": 2}),
    ("rope_decoder", {"position_encoding": "none"}),
    *(
        ("vanilla_transformer", {"position_encoding": scheme})
        for scheme in ("sinusoidal", "learned", "learned_per_layer", "rotary", "none")
    ),
]
REFUSED = [
    ("rope_decoder", {"attention_patterns": PATTERN}, "knows no attention patterns"),
    ("sparse_transformer", {}, "knows no attention patterns"),
    ("image_transformer", {}, "knows no attention patterns"),
    ("vanilla_transformer", {"decoder_attention_patterns": PATTERN}, "knows no attention patterns"),
    ("vanilla_transformer", {"position_encoding": "relative"}, "position_encoding='relative'"),
    ("vanilla_transformer", {"position_encoding": "transformer_xl"}, "position_encoding='transformer_xl'"),
    ("vanilla_transformer", {"position_encoding": "alibi"}, "position_encoding='alibi'"),
    ("universal_transformer", {}, "go by step"),
    ("rope_decoder", {"position_encoding": "t5"}, "position_encoding='t5'"),
    *((name, {}, "no memory of segments") for name in TINY if TINY[name].recurrent),
]


def lively(name, backend=None, head=AutoModelForCausalLM, **changes):
    """A model whose greedy tokens differ from step to step."""
    torch.manual_seed(0)
    model = tiny_model(name, head, **changes)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    if backend is not None:
        model.set_attn_implementation(backend)
    return model


def written(model):
    results = model.generate_batch(PROMPTS, generation_config=NEW, continuous_batching_config=PAGES).values()
    assert [result.error for result in results] == [None] * len(PROMPTS)
    return [result.generated_tokens for result in results]


@pytest.mark.parametrize(
    "backend", ["eager", "sdpa", "paged|eager", pytest.param("paged|sdpa", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("name", "changes"), WORKING, ids=str)
def test_writes_what_generate_does(name, changes, backend):
    plain, expected = lively(name, **changes), []
    for prompt in PROMPTS:
        ids = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, min_new_tokens=6)
        expected.append(ids[0, len(prompt) :].tolist())
    assert written(lively(name, backend, **changes)) == expected


CALLS = {
    "generate_batch": lambda model: model.generate_batch(PROMPTS, NEW, PAGES),
    "init_continuous_batching": lambda model: model.init_continuous_batching(),
    "continuous_batching_context_manager": lambda model: model.continuous_batching_context_manager().__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "changes", "why"), REFUSED, ids=str)
def test_refuses_at_the_call(name, changes, why, call):
    model = lively(name, "sdpa", **changes)
    with pytest.raises(ValueError, match=f"{why}.*use generate\\(\\)"):
        CALLS[call](model)


def test_refuses_an_encoder():
    model = lively("vanilla_transformer", head=AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match="feeds no encoder"):
        model.generate_batch(PROMPTS, generation_config=NEW, continuous_batching_config=PAGES)


@pytest.mark.parametrize("backend", ["block_sparse", "flex_attention"])
def test_other_backends_are_refused_by_transformers(backend):
    with pytest.raises(ValueError, match=r"not supported.*paged.eager"):
        lively("rope_decoder", backend).generate_batch(PROMPTS, generation_config=NEW, continuous_batching_config=PAGES)
