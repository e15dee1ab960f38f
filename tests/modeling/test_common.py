"""What Transformers expects of every model, asked of every class that is registered (tests/tiny_models.py)."""

import copy
import inspect
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_utils import PreTrainedModel

from hf_tfamily.auto import SYSTEMS
from hf_tfamily.modeling.attention_patterns import distances_met
from tests.tiny_models import TINY, all_heads, batch_for, tiny_config, tiny_model

HEADS = list(all_heads())
GENERATORS = [(name, head) for name, head in HEADS if head in (AutoModelForCausalLM, AutoModelForSeq2SeqLM)]
TEXT = [(name, head) for name, head in HEADS if TINY[name].takes_ids]
each_head = pytest.mark.parametrize(("name", "head"), HEADS, ids=lambda value: getattr(value, "__name__", value))
each_text = pytest.mark.parametrize(("name", "head"), TEXT, ids=lambda value: getattr(value, "__name__", value))
each_generator = pytest.mark.parametrize(
    ("name", "head"), GENERATORS, ids=lambda value: getattr(value, "__name__", value)
)
each_system = pytest.mark.parametrize("name", [system.name for system in SYSTEMS])

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def first_output(outputs):
    """The first tensor of a model's outputs that is no loss: logits, hidden states or pixels; or the last map."""
    if "feature_maps" in outputs:
        return outputs.feature_maps[-1]
    return next(value for key, value in outputs.items() if torch.is_tensor(value) and key != "loss")


def loader(head, model: PreTrainedModel):
    """The class to load a folder with: Transformers' AutoBackbone asks the Hub and takes no folders."""
    return type(model) if "Backbone" in head.__name__ else head


def run(model: PreTrainedModel, **inputs):
    with torch.no_grad():
        return first_output(model(**inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@each_system
def test_config_round_trips(name, tmp_path):
    config = tiny_config(name)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path, num_labels=5).num_labels == 5


@each_system
def test_config_constructs_without_arguments_and_says_the_common_sizes(name):
    config = AutoConfig.for_model(name)
    for field in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        assert getattr(config, field)
    assert not TINY[name].takes_ids or config.vocab_size > 1


@each_system
def test_config_refuses_wrong_types(name):
    field = next(f for f in ("initializer_range", "layer_norm_eps") if hasattr(tiny_config(name), f))
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        tiny_config(name, **{field: "large"})


# ---------------------------------------------------------------------------------------------------------------------
# Saving, loading, initialising


@each_head
def test_saving_and_loading_changes_nothing(name, head, tmp_path):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for folder in ("whole", "shards"):
        loaded, report = loader(head, model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        torch.testing.assert_close(run(loaded, **inputs), expected, **EXACT)


@each_head
def test_loads_the_base_model_and_back(name, head, tmp_path):
    """A head takes the weights of a base checkpoint, a base model those of a head's."""
    if head is AutoModel or AutoModel not in next(system.heads for system in SYSTEMS if system.name == name):
        pytest.skip("only heads have a base model")
    base, model = tiny_model(name, AutoModel), tiny_model(name, head)
    if type(model).base_model_prefix not in dict(model.named_children()):
        pytest.skip("a model of its own")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "head")
    loaded = getattr(loader(head, model).from_pretrained(tmp_path / "base"), type(model).base_model_prefix).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in base.state_dict().items() if key in loaded)
    own = getattr(model, type(model).base_model_prefix).state_dict()
    loaded = AutoModel.from_pretrained(tmp_path / "head").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in own.items() if key in loaded)


@each_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, head, dtype, tmp_path):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    model.save_pretrained(tmp_path)
    loaded = loader(head, model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    assert run(loaded, **inputs).isfinite().all()


@each_head
def test_initialises_from_meta_as_directly(name, head):
    """`from_pretrained` makes models without storage: buffers that no checkpoint holds must come back."""
    model = tiny_model(name, head)
    with torch.device("meta"):
        empty = head.from_config(model.config)
    empty.to_empty(device="cpu")
    for tensor in [*empty.parameters(), *empty.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.init_weights()
    buffers = dict(model.named_buffers())
    for key, value in empty.named_buffers():
        torch.testing.assert_close(value, buffers[key], **EXACT)
    for key, value in empty.named_parameters():
        assert value.isfinite().all(), f"{key} is not initialised"


@each_head
def test_copies_are_independent(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    twin, expected = copy.deepcopy(model), run(model, **inputs)
    for parameter in twin.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(run(model, **inputs), expected, **EXACT)


@each_head
def test_another_number_of_labels(name, head, tmp_path):
    if "num_labels" not in inspect.getsource(type(tiny_model(name, head))) and "Classification" not in head.__name__:
        pytest.skip("no classes")
    tiny_model(name, head, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        head.from_pretrained(tmp_path, num_labels=7)
    model = head.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert run(model, **batch_for(name, head, labels=False)).shape[-1] == 7


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


@each_text
def test_embeddings_may_be_given(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        pytest.skip("takes ids only")
    if head is AutoModelForSequenceClassification:
        inputs = {key: value[:1] for key, value in inputs.items()}
    expected = run(model, **inputs)
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(run(model, inputs_embeds=embeddings, **inputs), expected, **CLOSE)


@each_text
def test_embeddings_can_be_exchanged(name, head):
    model = tiny_model(name, head)
    table = model.get_input_embeddings()
    assert isinstance(table, torch.nn.Module)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    if hasattr(model, "lm_head"):
        assert model.get_output_embeddings() is not None


@each_text
@pytest.mark.parametrize("change", [10, -3])
def test_vocabulary_can_be_resized(name, head, change):
    spare = {"num_values": 90} if name == "image_transformer" else {}  # values keep their ids
    model, inputs = tiny_model(name, head, **spare), batch_for(name, head, labels=False)
    size = model.config.vocab_size
    expected = run(model, **inputs)
    model.resize_token_embeddings(size + change)
    assert model.config.vocab_size == size + change
    assert model.get_input_embeddings().weight.shape[0] == size + change
    resized = run(model, **inputs)
    if model.get_output_embeddings() is not None:
        assert resized.shape[-1] == size + change
        kept = min(size, size + change)
        expected, resized = expected[..., :kept], resized[..., :kept]
    torch.testing.assert_close(resized, expected, **CLOSE)


@each_generator
def test_tied_and_untied_embeddings(name, head, tmp_path):
    for tied in (True, False):
        model = tiny_model(name, head, tie_word_embeddings=tied)
        weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (weights[0] is weights[1]) is tied
        model.save_pretrained(tmp_path / str(tied))
        loaded = head.from_pretrained(tmp_path / str(tied))
        weights = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
        assert (weights[0] is weights[1]) is tied


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@each_head
def test_tuples_hold_what_named_outputs_do(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head)
    with torch.no_grad():
        named, plain = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    for value, other in zip(named.to_tuple(), plain, strict=True):
        if torch.is_tensor(value):
            torch.testing.assert_close(other, value, **EXACT)


@each_head
def test_hidden_states_and_attentions(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    prefixes = ("encoder_", "decoder_") if model.config.is_encoder_decoder else ("",)
    for prefix in prefixes:
        states, attentions = outputs[f"{prefix}hidden_states"], outputs[f"{prefix}attentions"]
        assert len(states) == len(attentions) + 1 or TINY[name].hierarchical
        assert all(weights.shape[1] >= 1 and weights.dim() == 4 for weights in attentions)
    if "feature_maps" in outputs:
        return  # its hidden states are maps, views of what flows on
    states[0].retain_grad()
    attentions[0].retain_grad()
    first_output(outputs).sum().backward()
    assert states[0].grad is not None
    assert attentions[0].grad is not None


@each_head
def test_rows_do_not_depend_on_their_batch(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    alone = torch.cat([run(model, **{key: value[i : i + 1] for key, value in inputs.items()}) for i in range(2)])
    torch.testing.assert_close(run(model, **inputs), alone, **CLOSE)


@each_head
def test_backends_agree(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    model.set_attn_implementation("eager")
    expected = run(model, **inputs)
    for backend, supported in (("sdpa", "_supports_sdpa"), ("flex_attention", "_supports_flex_attn")):
        if getattr(model, supported):
            model.set_attn_implementation(backend)
            torch.testing.assert_close(run(model, **inputs), expected, **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def gradients(model: PreTrainedModel, inputs) -> dict[str, torch.Tensor]:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    torch.manual_seed(0)
    outputs = model(**inputs)
    (outputs.loss if "loss" in outputs else first_output(outputs).square().sum()).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


@each_head
def test_every_parameter_learns(name, head):
    model = tiny_model(name, head)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # a head that begins with logits of 0 sends nothing back
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    found = gradients(model, batch_for(name, head))
    missing = {key for key, gradient in found.items() if gradient is None or not gradient.isfinite().all()}
    if head is not AutoModelForCausalLM:  # it alone adds the compression losses
        missing = {key for key in missing if ".compression." not in key}
    unused = model._keys_to_ignore_on_load_missing or ()  # a backbone's norm after the last stage
    assert not {key for key in missing if not any(re.search(pattern, key) for pattern in unused)}


@each_head
@pytest.mark.parametrize("implementation", ["eager", None])
def test_learns_after_inference(name, head, implementation):
    """What inference mode leaves in caches, training may use; eager and the system's default backend."""
    model, inputs = tiny_model(name, head), batch_for(name, head)
    if implementation:
        model.set_attn_implementation(implementation)
    distances_met.cache_clear()
    with torch.inference_mode():
        model(**inputs)
    assert any(gradient is not None for gradient in gradients(model, inputs).values())


@each_head
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, head, reentrant):
    model = tiny_model(name, head).double()  # re-entrant checkpointing adds up in another order
    inputs = {
        key: value.double() if value.is_floating_point() else value for key, value in batch_for(name, head).items()
    }
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    for key, gradient in gradients(model, inputs).items():
        if expected[key] is None:  # re-entrant checkpointing hands out zeros instead
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, expected[key], **CLOSE)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@each_head
def test_stock_trainer_lowers_the_loss(name, head, tmp_path):
    if head is AutoModel or "Backbone" in head.__name__:
        pytest.skip("no loss")
    model, batch = tiny_model(name, head), batch_for(name, head)
    rows = [{key: value[i % 2] for key, value in batch.items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def prompt(name: str, batch_size: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    inputs = TINY[name].inputs(batch_size, length)
    return {key: value for key, value in inputs.items() if not key.startswith("decoder_")}


def lively(name: str, head: type) -> PreTrainedModel:
    """A model whose logits depend on its input; some begin at 0."""
    model = tiny_model(name, head)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


FIXED_LENGTH = {"max_new_tokens": 9, "min_new_tokens": 9}


@each_generator
def test_generation_with_a_cache_equals_that_without(name, head):
    model, inputs = lively(name, head), prompt(name)
    greedy = {"do_sample": False, **FIXED_LENGTH}
    cached = model.generate(**inputs, **greedy, use_cache=True)
    if TINY[name].recurrent:  # without a memory these models see less by design; one pass over all must agree
        logits = run(model, input_ids=cached[:, :-1], use_cache=True)
        torch.testing.assert_close(cached[:, 6:], logits[:, 5:].argmax(-1))
    else:
        torch.testing.assert_close(model.generate(**inputs, **greedy, use_cache=False), cached)


@each_generator
def test_beams_and_samples(name, head):
    model, inputs = lively(name, head), prompt(name)
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, do_sample=False, **FIXED_LENGTH)
    assert beams.shape[0] == 4
    torch.manual_seed(1)
    samples = model.generate(**inputs, do_sample=True, num_return_sequences=3, top_k=5, **FIXED_LENGTH)
    assert samples.shape[0] == 6
    scored = model.generate(
        **inputs, do_sample=False, output_scores=True, return_dict_in_generate=True, output_logits=True, **FIXED_LENGTH
    )
    assert len(scored.scores) == len(scored.logits) == 9


@each_generator
def test_beams_find_what_exhaustive_scoring_prefers(name, head):
    """The best beam is at least as likely as the greedy continuation, by the model's own scores without a cache."""
    if TINY[name].recurrent or head is AutoModelForSeq2SeqLM:
        pytest.skip("scored by tests of its own")
    model, inputs = lively(name, head), prompt(name)

    def log_likelihood(ids):
        log_probabilities = run(model, input_ids=ids[:, :-1], use_cache=False).log_softmax(-1)
        return log_probabilities.gather(-1, ids[:, 1:, None])[:, 5:, 0].sum(-1)

    greedy = model.generate(**inputs, do_sample=False, **FIXED_LENGTH)
    beams = model.generate(**inputs, do_sample=False, num_beams=4, **FIXED_LENGTH)
    assert (log_likelihood(beams) >= log_likelihood(greedy) - 1e-3).all()


@each_generator
def test_left_padding_changes_nothing(name, head):
    model, short = lively(name, head), prompt(name, batch_size=1)["input_ids"]
    padded = torch.nn.functional.pad(short, (3, 0), value=0)
    mask = (torch.arange(9) >= 3).long()[None]
    both = torch.cat([padded, torch.randint(1, 90, (1, 9))])
    masks = torch.cat([mask, torch.ones_like(mask)])
    alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), do_sample=False, **FIXED_LENGTH)
    together = model.generate(input_ids=both, attention_mask=masks, do_sample=False, **FIXED_LENGTH)
    torch.testing.assert_close(together[:1, -9:], alone[:, -9:])


@each_generator
def test_generates_from_embeddings(name, head):
    model, inputs = lively(name, head), prompt(name)
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        pytest.skip("takes ids only")
    greedy = {"do_sample": False, **FIXED_LENGTH}
    expected = model.generate(**inputs, **greedy)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model.generate(inputs_embeds=embeddings, **greedy)[:, -9:], expected[:, -9:])


@each_generator
def test_generates_from_nothing_but_the_prompts_first_token(name, head):
    model = lively(name, head)
    one = prompt(name, length=1)
    assert model.generate(**one, do_sample=False, **FIXED_LENGTH).shape[1] >= 9


@each_text
def test_ids_out_of_range_are_refused(name, head):
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    inputs["input_ids"][0, 3] = model.config.vocab_size
    with pytest.raises((ValueError, IndexError), match=str(model.config.vocab_size)):
        model(**inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.slow
@each_head
def test_exports(name, head):
    if TINY[name].recurrent:
        pytest.skip("its memory is no input of one graph")
    model, inputs = tiny_model(name, head), batch_for(name, head, labels=False)
    flags = {"use_cache": False} if TINY[name].takes_ids and "Masked" not in head.__name__ else {}
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, **flags}, strict=False)
        exported = first_output(program.module()(**inputs, **flags))
    torch.testing.assert_close(exported, run(model, **inputs, **flags), **CLOSE)
