"""PEFT's adapters on every system: they wrap layers and embeddings, so no forward may read the sizes of a layer."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from hf_tfamily.peft_defaults import register_peft_defaults
from tests.tiny_models import TINY, batch_for, tiny_model

peft = pytest.importorskip("peft")
register_peft_defaults()

PATTERN = {"type": "local", "window": 4}
RECURRENT = [name for name in TINY if TINY[name].recurrent]
MAIN = {
    "swin_transformer": AutoModelForImageClassification,
    "long_encoder": AutoModelForMaskedLM,
    "vanilla_encoder": AutoModelForMaskedLM,
    "vanilla_transformer": AutoModelForSeq2SeqLM,
}
SYSTEMS = [(name, MAIN.get(name, AutoModelForCausalLM)) for name in TINY]
SYSTEMS.append(("vanilla_transformer", AutoModelForCausalLM))
TEXT = [(name, head) for name, head in SYSTEMS if TINY[name].takes_ids]
CAUSAL = [name for name, head in SYSTEMS if head is AutoModelForCausalLM]
each_system = pytest.mark.parametrize(("name", "head"), SYSTEMS, ids=lambda value: getattr(value, "__name__", value))
each_text = pytest.mark.parametrize(("name", "head"), TEXT, ids=lambda value: getattr(value, "__name__", value))
tied_and_untied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

FEW = [5, 6]  # tokens
LORA = {"init_lora_weights": False}
ADAPTERS = {
    "trainable tokens": lambda: peft.LoraConfig(trainable_token_indices=FEW, **LORA),
    "trainable tokens alone": lambda: peft.TrainableTokensConfig(token_indices=FEW, init_weights=False),
    "all linear": lambda: peft.LoraConfig(target_modules="all-linear", **LORA),
    "DoRA": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, **LORA),
    "modules to save": lambda: peft.LoraConfig(modules_to_save=["embed_tokens", "lm_head"], **LORA),
    "IA3": lambda: peft.IA3Config(init_ia3_weights=False),
}
OTHERS = [  # positions with weights of their own, an adaptive softmax
    ("vanilla_encoder", AutoModelForMaskedLM, {"position_encoding": "relative"}),
    ("vanilla_encoder", AutoModelForMaskedLM, {"position_encoding": "transformer_xl"}),
    ("vanilla_encoder", AutoModelForMaskedLM, {"position_encoding": "learned_per_layer"}),
    ("transformer_xl", AutoModelForCausalLM, {"cutoffs": [20, 50], "div_val": 2}),
]


def model_and_batch(name, head, **changes):
    torch.manual_seed(0)
    if name == "sparse_transformer":  # whose own pattern shows so few tokens nothing but themselves
        changes = {"attention_patterns": PATTERN, **changes}
    model, inputs = tiny_model(name, head, **changes), batch_for(name, head)
    if name == "sparse_transformer":  # an output layer of 0 would hide every gradient
        torch.nn.init.normal_(model.lm_head.weight)
    for key in ("input_ids", "decoder_input_ids", "labels"):
        if key in inputs and inputs[key].ndim == 2:
            inputs[key][:, 3:5] = torch.tensor(FEW)
    return model, inputs


def generated(model, inputs):
    if not model.can_generate():
        return None
    return model.generate(input_ids=inputs["input_ids"], do_sample=False, max_new_tokens=6)


def learns_and_merges(config, name, head, folder, merges: bool = True, **changes) -> None:
    """Every adapted parameter has a gradient; saved, loaded and merged, the model says the same."""
    model, inputs = model_and_batch(name, head, **changes)
    adapted = peft.get_peft_model(model, config).train()
    adapted(**inputs).loss.backward()
    for key, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), key
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01).step()
    adapted.eval()
    with torch.no_grad():
        expected, tokens = adapted(**inputs).logits, generated(adapted, inputs)
        adapted.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(model_and_batch(name, head, **changes)[0], folder).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        if not merges:
            return
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        if tokens is not None:
            assert torch.equal(generated(merged, inputs), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


@tied_and_untied
@pytest.mark.parametrize("adapter", ADAPTERS)
@each_text
def test_adapters_of_text(name, head, adapter, tied, tmp_path):
    learns_and_merges(ADAPTERS[adapter](), name, head, tmp_path, tie_word_embeddings=tied)


@tied_and_untied
@each_text
def test_lora_on_embeddings(name, head, tied, tmp_path):
    """Merged where nothing is tied: PEFT itself would change a tied output layer too, and warns."""
    config = peft.LoraConfig(target_modules=["embed_tokens"], **LORA)
    learns_and_merges(config, name, head, tmp_path, merges=not tied, tie_word_embeddings=tied)


@pytest.mark.parametrize("adapter", ["all linear", "DoRA", "IA3"])
@pytest.mark.parametrize(("name", "head", "changes"), OTHERS, ids=str)
def test_adapters_of_other_parts(name, head, changes, adapter, tmp_path):
    learns_and_merges(ADAPTERS[adapter](), name, head, tmp_path, **changes)


@pytest.mark.parametrize("layer", ["keys", "values"])
def test_lora_on_vectors_of_distances(layer, tmp_path):
    config = peft.LoraConfig(target_modules=[layer], **LORA)
    learns_and_merges(config, "vanilla_encoder", AutoModelForMaskedLM, tmp_path, position_encoding="relative")


def test_biases_of_distances_are_saved(tmp_path):
    config = peft.LoraConfig(modules_to_save=["biases"], **LORA)
    learns_and_merges(config, "vanilla_encoder", AutoModelForMaskedLM, tmp_path, position_encoding="transformer_xl")


@pytest.mark.parametrize("adapter", ["all linear", "DoRA", "IA3", "embeddings", "modules to save"])
def test_adapters_of_swin(adapter, tmp_path):
    configs = {
        **ADAPTERS,
        "embeddings": lambda: peft.LoraConfig(target_modules=["projection"], **LORA),
        "modules to save": lambda: peft.LoraConfig(modules_to_save=["classifier", "patch_embeddings"], **LORA),
    }
    learns_and_merges(configs[adapter](), "swin_transformer", AutoModelForImageClassification, tmp_path)


@each_system
def test_lora_by_default(name, head):
    """Default targets train alone."""
    model, inputs = model_and_batch(name, head)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    adapted(**inputs).loss.backward()
    learning = {key for key, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora_" in key and ("q_proj" in key or "v_proj" in key) for key in learning)


@pytest.mark.parametrize("tuner", ["IA3Config", "LoHaConfig"])
@each_system
def test_other_tuners_by_default(name, head, tuner):
    model, inputs = model_and_batch(name, head)
    adapted = peft.get_peft_model(model, getattr(peft, tuner)())
    adapted(**inputs).loss.backward()
    assert any(parameter.grad is not None for parameter in adapted.parameters())


@pytest.mark.parametrize("adapter", ["all linear", "trainable tokens"])
def test_a_mixture_has_no_table_of_ids(adapter, tmp_path):
    """The refusal says what to do instead, and that works."""
    model, _ = model_and_batch("image_transformer", AutoModelForCausalLM, output="logistic_mixture")
    with pytest.raises(NotImplementedError, match=r"name the target_modules.*or save with save_embedding_layers=False"):
        peft.get_peft_model(model, ADAPTERS[adapter]()).save_pretrained(tmp_path)
    config = peft.LoraConfig(target_modules=["q_proj", "embed_values", "lm_head"], **LORA)
    model, inputs = model_and_batch("image_transformer", AutoModelForCausalLM, output="logistic_mixture")
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = adapted.eval()(**inputs).logits
    model, _ = model_and_batch("image_transformer", AutoModelForCausalLM, output="logistic_mixture")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_an_adapter_alone_brings_its_base(name, tmp_path):
    """`AutoPeftModelForCausalLM` needs the base's folder; without a task_type also the leave to import this package."""
    tiny_model(name, AutoModelForCausalLM).save_pretrained(tmp_path / "base")
    for config, options in (
        (peft.LoraConfig(task_type="CAUSAL_LM", **LORA), {}),
        (peft.LoraConfig(**LORA), {"import_allowlist": ["hf_tfamily"]}),
    ):
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options).eval()
        inputs = batch_for(name, AutoModelForCausalLM)
        torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def prompted(config_class, name, head=AutoModelForCausalLM, **changes):
    """A model behind three virtual tokens, and a batch."""
    task = "SEQ_2_SEQ_LM" if head is AutoModelForSeq2SeqLM else "CAUSAL_LM"
    options = {"encoder_hidden_size": 32} if config_class is peft.PromptEncoderConfig else {}
    model, inputs = model_and_batch(name, head, **changes)
    adapted = peft.get_peft_model(model, config_class(num_virtual_tokens=3, task_type=task, **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return adapted, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def learns_and_generates(adapted, inputs) -> None:
    """Virtual tokens have gradients, and step by step with a cache is what all tokens at once give."""
    adapted(**inputs).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = adapted.eval().generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6
    )
    decodes = adapted.config.is_encoder_decoder
    written = found[:, :1] if decodes else ids
    for _ in range(6):
        step = {"decoder_input_ids": written} if decodes else {}
        read = {"input_ids": ids, "attention_mask": mask}
        if not decodes:
            read = {"input_ids": written, "attention_mask": torch.ones_like(written)}
        with torch.no_grad():
            logits = adapted(**read, **step).logits
        written = torch.cat([written, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(written[:, -6:], found[:, -6:])


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "image_transformer"])
def test_prompts(name, config):
    """Virtual tokens before the text, given as inputs_embeds."""
    learns_and_generates(*prompted(getattr(peft, config), name))


@pytest.mark.parametrize("changes", [{}, {"attention_patterns": PATTERN, "decoder_attention_patterns": PATTERN}])
@pytest.mark.parametrize("name", ["rope_decoder", "sparse_transformer", "vanilla_transformer"])
def test_prefixes(name, changes):
    """Virtual keys before the text, in a cache that PEFT makes; patterns see them where they see earlier tokens."""
    if name != "vanilla_transformer":
        changes = {key: value for key, value in changes.items() if key == "attention_patterns"}
    learns_and_generates(*prompted(peft.PrefixTuningConfig, name, **changes))


@pytest.mark.parametrize("config", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_encoder_and_decoder(config):
    learns_and_generates(*prompted(getattr(peft, config), "vanilla_transformer", AutoModelForSeq2SeqLM))


@pytest.mark.parametrize("name", RECURRENT)
def test_prefixes_are_no_memory(name):
    adapted, inputs = prompted(peft.PrefixTuningConfig, name)
    with pytest.raises(ValueError, match="instead of prefix tuning, use prompt tuning or LoRA"):
        adapted(**inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Defaults


@pytest.mark.parametrize("order", ["hf_tfamily, peft", "peft, hf_tfamily"])
@pytest.mark.slow
def test_defaults_are_there_once_asked_for_in_whichever_order(order):
    code = f"import {order}; from peft.utils import constants as c; "
    code += "table = c.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING; before = 'swin_transformer' in table; "
    code += "from hf_tfamily.peft_defaults import register_peft_defaults; register_peft_defaults(); "
    code += "print(before, table['swin_transformer'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False ['q_proj', 'v_proj']"
