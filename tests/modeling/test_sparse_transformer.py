"""The Sparse Transformer equals the paper's equations, whatever computes it, and behaves as Transformers expects."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling.checks import check_positions
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import (
    SparseTransformerForCausalLM,
    SparseTransformerForSequenceClassification,
    SparseTransformerModel,
)
from tests.reference import sparse_transformer as loops

PATTERNS = {
    "interleaved": [{"type": "local", "window": 3}, {"type": "strided", "stride": 4}],
    "merged": {"type": "fixed", "block": 4, "summary": 2},
    "per_head": {
        "type": "per_head",
        "patterns": [{"type": "fixed_block", "block": 4}, {"type": "fixed_summary", "block": 4, "summary": 1}],
    },
}
IMPLEMENTATIONS = ("eager", "sdpa", "block_sparse", "flex_attention")
DIFFERENTIABLE = ("eager", "sdpa", "block_sparse")  # flex_attention has no backward pass on the CPU
LENGTH = 13

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_differentiable = pytest.mark.parametrize("implementation", DIFFERENTIABLE)


def tiny_config(pattern="interleaved", **overrides):
    """Queries and keys half the size of values, an uneven feed-forward layer, positions in rows and columns."""
    fields = {
        "vocab_size": 11,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "qk_head_dim": 2,
        "v_head_dim": 4,
        "intermediate_size": 24,
        "position_shape": [4, 5],
        "attention_patterns": PATTERNS[pattern],
    }
    return SparseTransformerConfig(**fields | overrides)


def tiny_model(pattern="interleaved", implementation="eager", **overrides):
    """A model in evaluation mode whose every weight, the zero ones of the paper included, is random."""
    config = tiny_config(pattern, **overrides)
    model = SparseTransformerForCausalLM._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name and name.endswith("weight")))
    return model


def random_ids(*shape):
    return torch.randint(11, shape)


def run(model, *args, **kwargs):
    """The model's output; flex_attention without gradients and without its seconds of compilation."""
    if model.config._attn_implementation != "flex_attention":
        return model(*args, **kwargs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


def logits_by_loops(model, ids, positions=None):
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    return loops.logits(weights, model.config, ids.tolist(), positions)


def assert_equal(actual, expected):
    """Equal in float64, to rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def loss_of(logits, ids):
    """Next-token loss in the dtype of the logits, which Transformers' own rounds to float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids):
    model.zero_grad()
    loss_of(model(ids).logits, ids).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# The paper's equations


@every_implementation
@every_pattern
def test_logits_equal_the_loops(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(2, LENGTH)
    expected = torch.stack([logits_by_loops(model, row) for row in ids])
    assert_equal(run(model, ids).logits, expected)


@every_differentiable
@every_pattern
def test_gradients_equal_those_of_the_loops(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(1, LENGTH)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    logits = loops.logits(weights, model.config, ids[0].tolist())
    loss_of(logits[None], ids).backward()
    for name, gradient in gradients(model, ids).items():
        assert_equal(gradient, weights[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_implementation
@every_pattern
def test_low_precision_errs_at_most_twice_as_much_as_eager(pattern, implementation, dtype):
    model, ids = tiny_model(pattern).to(dtype), random_ids(2, LENGTH)
    wide = copy.deepcopy(model).double()

    def within_budget(actual, eager, exact):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        return (actual - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding

    exact, eager = wide(ids).logits, model(ids).logits
    exact_gradients, eager_gradients = flat(gradients(wide, ids)), flat(gradients(model, ids))
    model.set_attn_implementation(implementation)
    assert within_budget(run(model, ids).logits, eager, exact)
    if implementation in DIFFERENTIABLE:
        assert within_budget(flat(gradients(model, ids)), eager_gradients, exact_gradients)


# Rows that are not plain


@pytest.mark.parametrize("side", ["left", "right"])
@every_implementation
@every_pattern
def test_a_padded_row_equals_itself_without_padding(pattern, implementation, side):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    padding, tokens = (slice(None, 5), slice(5, None)) if side == "left" else (slice(8, None), slice(None, 8))
    mask[0, padding] = 0
    logits = run(model, ids, attention_mask=mask).logits
    assert_equal(logits[0, tokens], logits_by_loops(model, ids[0, tokens]))
    assert_equal(logits[1], logits_by_loops(model, ids[1]))


@every_implementation
@every_pattern
def test_packed_documents_equal_themselves_alone(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(1, LENGTH)
    position_ids = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    logits = run(model, ids, position_ids=position_ids).logits[0]
    assert_equal(logits[:5], logits_by_loops(model, ids[0, :5]))
    assert_equal(logits[5:], logits_by_loops(model, ids[0, 5:]))


@every_implementation
@every_pattern
@torch.no_grad()
def test_the_last_document_of_a_packed_row_goes_on(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(1, LENGTH)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None]
    read = run(model, ids[:, :-1], position_ids=positions[:, :-1], use_cache=True)
    step = run(model, ids[:, -1:], position_ids=positions[:, -1:], past_key_values=read.past_key_values)
    assert_equal(step.logits[0, -1], logits_by_loops(model, ids[0, 5:])[-1])


@every_implementation
@every_pattern
def test_positions_may_start_late(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(1, 8)
    logits = run(model, ids, position_ids=torch.arange(7, 15)[None]).logits[0]
    assert_equal(logits, logits_by_loops(model, ids[0], positions=list(range(7, 15))))


def test_embeddings_may_be_given_instead_of_ids():
    model, ids = tiny_model(), random_ids(2, LENGTH)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    generated = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False)[:, LENGTH:])


# Generation


@every_implementation
@every_pattern
def test_steps_with_a_cache_equal_one_pass(pattern, implementation):
    model, ids = tiny_model(pattern, implementation).double(), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = run(model, ids, attention_mask=mask).logits
    cache, done = None, 0
    for step in (5, 1, 4, 1, 2):
        end = done + step
        outputs = run(model, ids[:, done:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        assert_equal(outputs.logits[1], expected[1, done:end])
        assert_equal(outputs.logits[0, max(3 - done, 0) :], expected[0, max(done, 3) : end])
        cache, done = outputs.past_key_values, end


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("pattern", ["interleaved", "per_head"])
def test_greedy_generation_follows_the_full_forward_pass(pattern, options):
    model, start = tiny_model(pattern), random_ids(1, 5)
    expected = start
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(start, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(model.generate(start, max_new_tokens=8, do_sample=False, **options), expected)


@pytest.mark.parametrize("beams", [1, 3])
@every_differentiable
@every_pattern
def test_left_padded_rows_generate_what_they_generate_alone(pattern, implementation, beams):
    model = tiny_model(pattern, implementation)
    short, long = random_ids(1, 4), random_ids(1, 9)
    batch = torch.cat([nn.functional.pad(short, (5, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0, 9:], model.generate(short, **options)[0, 4:])
    assert torch.equal(together[1], model.generate(long, **options)[0])


def test_sampling_is_the_same_with_and_without_a_cache():
    model, start = tiny_model(), random_ids(2, 3)
    samples = []
    for use_cache in (True, False):
        set_seed(1)
        samples.append(model.generate(start, max_new_tokens=9, do_sample=True, use_cache=use_cache))
    assert torch.equal(*samples)
    assert len(set(samples[0][0].tolist())) > 2


def test_generation_continues_from_a_cache():
    model, start = tiny_model(), random_ids(2, 4)
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(start, max_new_tokens=8, **options)
    first = model.generate(start, max_new_tokens=3, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(second.sequences, whole.sequences)


def test_a_class_as_start_token_fills_every_position():
    model = tiny_model(vocab_size=11)
    classes = torch.tensor([[9], [10]])
    samples = model.generate(classes, max_new_tokens=20, do_sample=False, suppress_tokens=[9, 10])
    assert samples.shape == (2, 21)
    assert samples[:, 1:].max() < 9
    assert not torch.equal(samples[0, 1:], samples[1, 1:])
    with pytest.raises(ValueError, match=r"20 positions .* reaches from position 20 to 20"):
        model.generate(classes, max_new_tokens=21, do_sample=False)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
def test_sampling_in_half_precision_has_float32_products(implementation, dtype, autocast):
    """Each query-key product is 160,000 and the same for all keys, so it changes nothing unless it overflows."""

    def logits(upcast):
        set_seed(2)
        model, ids = tiny_model(implementation=implementation, upcast_sampling=upcast), random_ids(2, LENGTH)
        with torch.no_grad():
            for layer in model.model.layers:
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    projection.weight[::2] = 0
                    projection.bias[::2] = 400
        exact = model(ids, use_cache=False).logits
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            model = model if autocast else model.to(dtype)
            return model(ids, use_cache=True).logits, exact

    actual, exact = logits(upcast=True)
    torch.testing.assert_close(actual.float(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    if implementation == "eager":
        actual, exact = logits(upcast=False)
        assert not (actual - exact).abs().max() < 0.5


# Outputs, training, compilation


@every_pattern
def test_hidden_states_and_attentions(pattern):
    model, ids = tiny_model(pattern), random_ids(2, LENGTH)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, LENGTH, 16)] * 4
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, LENGTH, LENGTH)] * 3
    seen = [loops.pattern_of(model.config, 0).visible(h, 9, 4) for h in range(4)]
    assert (outputs.attentions[0][0, :, 9, 4] > 0).tolist() == seen
    assert model(ids, return_dict=False)[0].shape == (2, LENGTH, 11)


def test_only_eager_has_attention_weights():
    model, ids = tiny_model(implementation="sdpa"), random_ids(1, 4)
    assert model(ids, output_attentions=True).attentions == ()  # and Transformers warns


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_reads_the_last_token_of_each_row(side):
    config = tiny_config(num_labels=3, pad_token_id=0)
    model = SparseTransformerForSequenceClassification(config).eval()
    assert model.config._attn_implementation == "block_sparse"
    ids = random_ids(2, 8).clamp(min=1)
    hidden = slice(0, 3) if side == "left" else slice(5, 8)
    mask = torch.ones_like(ids)
    mask[0, hidden] = ids[0, hidden] = 0
    labels = torch.tensor([2, 0])
    output = model(ids, attention_mask=mask, labels=labels)
    alone = torch.cat([model(ids[:1, mask[0].bool()]).logits, model(ids[1:]).logits])
    torch.testing.assert_close(output.logits, alone)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(alone, labels))


def test_loss_shifts_labels_and_not_shift_labels():
    model, ids = tiny_model(), random_ids(2, LENGTH)
    logits = model(ids).logits
    labels = ids.clone()
    labels[:, 4] = -100
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(ids, shift_labels=labels).loss, expected)


def test_logits_may_be_kept_for_the_last_positions_only():
    model, ids = tiny_model(), random_ids(2, LENGTH)
    assert torch.equal(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_differentiable
def test_recomputation_changes_no_gradient(implementation, use_reentrant):
    model, ids = tiny_model("per_head", implementation, resid_dropout=0.5).train(), random_ids(2, LENGTH)
    set_seed(3)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    set_seed(3)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name])


def test_dropout_is_at_the_ends_of_residual_branches_alone():
    model, ids = tiny_model(resid_dropout=0.999999).train(), random_ids(2, LENGTH)
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [f"model.layers.{layer}.dropout" for layer in range(3)]
    hidden = model.model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(h, hidden[0]) for h in hidden[:3])  # both branches of every block are gone


def test_stock_trainer_takes_a_step(tmp_path):
    model = tiny_model(implementation=None, resid_dropout=0.1)
    before = model.lm_head.weight.clone()
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, LENGTH)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        bf16=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    reloaded = SparseTransformerForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@pytest.mark.parametrize("pattern", ["interleaved", "per_head"])
def test_compiles_into_one_graph(pattern, implementation):
    model, ids = tiny_model(pattern, implementation, num_hidden_layers=2), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(compiled(ids, attention_mask=mask).logits[:, 3:], expected[:, 3:])


def test_lengths_do_not_compile_anew():
    model = tiny_model("interleaved", "block_sparse", num_hidden_layers=2)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (8, 9, 11, 14, 16, 20):
        ids = random_ids(2, length)
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    assert counter.frame_count <= 2  # the first length, and all others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_block_sparse_trains_under_autocast(dtype):
    """Gradients are as near to those in float32 as eager's are."""
    torch.manual_seed(0)
    model, ids = tiny_model("interleaved", "eager"), random_ids(2, LENGTH)
    exact = flat(gradients(model, ids))
    errors = []
    for implementation in ("eager", "block_sparse"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", dtype=dtype):
            errors.append((flat(gradients(model, ids)) - exact).norm() / exact.norm())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
def test_exports_for_any_length(implementation):
    model, ids = tiny_model("interleaved", implementation, num_hidden_layers=2), random_ids(2, LENGTH)
    shapes = {
        "input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", min=2, max=20)},
        "use_cache": None,
    }
    program = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes).module()
    ids = random_ids(3, 7)
    torch.testing.assert_close(program(ids, use_cache=False).logits, model(ids).logits)


# Initial weights


def test_initial_weights_follow_the_paper():
    set_seed(4)
    config = tiny_config(
        vocab_size=500, hidden_size=128, intermediate_size=256, qk_head_dim=16, v_head_dim=32, position_shape=[300, 200]
    )
    model = SparseTransformerForCausalLM(config)
    for name, weight in model.named_parameters():
        if name == "lm_head.weight" or name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        else:
            inputs = 128 if "embed" in name else weight.shape[1]
            variance = 0.125 / inputs
            if "embed_positions" in name:
                variance /= 2  # axes
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                variance /= 2 * 3  # branches
            assert weight.var().item() == pytest.approx(variance, rel=0.05), name
            assert abs(weight.mean().item()) < 5 * math.sqrt(variance / weight.numel()), name
    assert not model(torch.tensor([[1, 2]])).logits.any()


def test_initial_weights_are_reproducible(tmp_path):
    def weights(make):
        set_seed(5)
        return make().state_dict()

    config = tiny_config()
    once, again = (
        weights(lambda: SparseTransformerForCausalLM(config)),
        weights(lambda: SparseTransformerForCausalLM(config)),
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
    SparseTransformerModel(config).save_pretrained(tmp_path)
    model = SparseTransformerForCausalLM.from_pretrained(tmp_path)
    assert not model.lm_head.weight.any()


@pytest.mark.parametrize("tied", [False, True])
def test_missing_weights_are_initialised_by_the_same_rule(tied):
    """Loading nothing builds the model without memory first, then initialises what was not loaded."""
    config = tiny_config(hidden_size=256, intermediate_size=256, tie_word_embeddings=tied)
    model = SparseTransformerForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert model.lm_head.weight.any().item() is tied
    assert model.model.embed_tokens.weight.var().item() == pytest.approx(0.125 / 256, rel=0.1)
    assert model.model.layers[1].mlp.down_proj.weight.var().item() == pytest.approx(0.125 / 256 / 6, rel=0.1)


def test_number_of_parameters():
    d, ff, qk, v, vocabulary, layers = 16, 24, 4 * 2, 4 * 4, 11, 3
    attention = 2 * (d + 1) * qk + (d + 1) * v + (v + 1) * d
    block = attention + (d + 1) * ff + (ff + 1) * d + 4 * d
    total = 2 * vocabulary * d + (4 + 5) * d + layers * block + 2 * d
    assert tiny_model().num_parameters() == total


# Saving and loading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_models_load_by_the_auto_classes(tmp_path, tied, dtype):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, LENGTH)
    model.tie_weights()
    model.to(dtype).save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(reloaded) is SparseTransformerForCausalLM
    assert not any(report.values())
    assert reloaded.dtype == dtype
    reloaded.set_attn_implementation("eager")
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied

    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert type(base) is SparseTransformerModel
    assert base.dtype == torch.float32
    hidden = copy.deepcopy(model.model).float()(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_can_grow(tmp_path, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, LENGTH)
    expected = model(ids).logits
    model.resize_token_embeddings(14, mean_resizing=False)
    assert model.config.vocab_size == 14
    torch.testing.assert_close(model(ids).logits[..., :11], expected)
    model.save_pretrained(tmp_path)
    reloaded = SparseTransformerForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert model(ids, labels=ids + 3).loss.isfinite()


@every_pattern
def test_config_goes_through_json(tmp_path, pattern):
    config = tiny_config(pattern)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert type(reloaded) is SparseTransformerConfig
    assert reloaded.to_diff_dict() == config.to_diff_dict()
    assert reloaded.attention_patterns == PATTERNS[pattern]


def test_config_derives_what_is_not_given():
    config = SparseTransformerConfig()
    assert (config.qk_head_dim, config.v_head_dim, config.intermediate_size) == (64, 64, 1024)
    assert (config.position_shape, config.max_position_embeddings) == ([1024], 1024)
    assert SparseTransformerConfig(max_position_embeddings=96).position_shape == [96]
    assert SparseTransformerConfig(position_shape=(8, 8, 3)).max_position_embeddings == 192


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_patterns": {"type": "strided", "stride": 0}}, r"Strided\.stride must be .* at least 1, got 0"),
        ({"attention_patterns": {"type": "fixed", "block": 4, "summary": 5}}, r"summary <= block, .* = 5 > 4"),
        (
            {"attention_patterns": {"type": "stride", "stride": 4}},
            r"Unknown pattern type 'stride'; did you mean 'strided'",
        ),
        ({"attention_patterns": {"type": "local", "windw": 4}}, r"'local' has no key 'windw'; did you mean 'window'"),
        ({"attention_patterns": {"type": "local"}}, r"'local' needs 'window'"),
        ({"attention_patterns": []}, r"attention_patterns is an empty list"),
        ({"attention_patterns": "strided"}, r"attention_patterns.*'strided'"),
        (
            {"attention_patterns": {"type": "per_head", "patterns": [{"type": "full"}] * 3}},
            r"3 patterns.*num_attention_heads=4",
        ),
        ({"hidden_size": 18, "v_head_dim": None}, r"hidden_size=18 .* num_attention_heads=4; .* or give v_head_dim"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers must be at least 1, got -1"),
        ({"hidden_size": 16.0}, r"'hidden_size' expected int, got float"),
        ({"vocab_size": True}, r"'vocab_size' expected int, got bool"),
        ({"layer_types": ["strided"] * 3}, r"layer_types=.* not a field .* attention_patterns"),
        ({"layer_types": ["full_attention"] * 3}, r"layer_types=.* not a field .* attention_patterns"),
        ({"position_shape": [4, 0]}, r"position_shape must list .* at least 1, got \[4, 0\]"),
        (
            {"position_shape": [4, 5], "max_position_embeddings": 21},
            r"holds 20 positions, but max_position_embeddings=21",
        ),
        ({"resid_dropout": 1.0}, r"resid_dropout must be at least 0 and below 1, got 1\.0"),
        ({"resid_dropout": "no"}, r"'resid_dropout' with value 'no'"),
        ({"layer_norm_eps": -1e-5}, r"layer_norm_eps must be at least 0, got -1e-05"),
        ({"initializer_scale": -1}, r"initializer_scale must be at least 0, got -1"),
        ({"hidden_act": "quick_gellu"}, r"hidden_act='quick_gellu' is unknown; did you mean 'quick_gelu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(Exception, match=rf"(?s){message}"):
        tiny_config(**fields)


def test_a_field_cannot_be_set_to_the_wrong_type_later():
    config = tiny_config()
    with pytest.raises(Exception, match="'hidden_size' expected int, got str"):
        config.hidden_size = "16"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"exactly one of input_ids and inputs_embeds"),
        ({"input_ids": random_ids(2, 4), "inputs_embeds": torch.zeros(2, 4, 16)}, r"exactly one of"),
        (
            {"input_ids": random_ids(2, 4) + 11},
            r"input_ids must lie in \[0, 10\] \(vocab_size=11\), got values from 1\d to",
        ),
        ({"input_ids": random_ids(2, 4) - 11}, r"input_ids must lie in \[0, 10\] \(vocab_size=11\), got values from -"),
        ({"input_ids": random_ids(2, 0)}, r"input_ids is empty: got shape \[2, 0\]"),
        ({"input_ids": random_ids(0, 4)}, r"input_ids is empty: got shape \[0, 4\]"),
        ({"input_ids": random_ids(4)}, r"input_ids must have shape \[batch, tokens\], got \[4\]"),
        ({"input_ids": torch.rand(2, 4)}, r"input_ids must be of dtype torch\.int64 or .* got torch\.float32"),
        ({"input_ids": random_ids(2, 4).byte()}, r"input_ids must be of dtype .* got torch\.uint8"),
        ({"inputs_embeds": torch.rand(2, 16)}, r"inputs_embeds must have shape .* got \[2, 16\]"),
        ({"inputs_embeds": torch.rand(2, 4, 1)}, r"hidden_size=16\], got \[2, 4, 1\]"),
        ({"inputs_embeds": torch.ones(2, 4, 16).long()}, r"inputs_embeds must be floating point, got torch\.int64"),
        ({"input_ids": random_ids(2, 21)}, r"has 20 positions .* from position 0 to 20"),
        (
            {"input_ids": random_ids(1, 4), "position_ids": torch.arange(17, 21)[None]},
            r"20 positions .* position 17 to 20",
        ),
        (
            {"input_ids": random_ids(1, 4), "position_ids": torch.arange(-1, 3)[None]},
            r"20 positions .* position -1 to 2",
        ),
        ({"input_ids": random_ids(1, 4), "position_ids": torch.rand(1, 4)}, r"position_ids must be of dtype"),
        (
            {"input_ids": random_ids(2, 4), "position_ids": torch.arange(3)[None]},
            r"position_ids must have shape \[2 or 1, 4\]",
        ),
        (
            {"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 3)},
            r"attention_mask .* \[2, 4\] .* got \[2, 3\]",
        ),
        (
            {"input_ids": random_ids(2, 4), "attention_mask": torch.ones(1, 4)},
            r"attention_mask .* \[2, 4\] .* got \[1, 4\]",
        ),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 5)}, r"attention_mask covers 5 tokens"),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 4, 4)}, r"attention_mask .* got \[2, 4, 4\]"),
        (
            {"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 3, 4, 4)},
            r"4-D attention_mask .* got \[2, 3, 4, 4\]",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(inputs, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        tiny_model(implementation=None)(**inputs)


def test_a_long_padded_row_of_few_tokens_is_accepted():
    model, ids = tiny_model().double(), random_ids(1, 25)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    assert_equal(model(ids, attention_mask=mask).logits[0, 8:], logits_by_loops(model, ids[0, 8:]))
    mask[0, :8] = 1
    with pytest.raises(ValueError, match=r"20 positions .* from position 0 to 24"):
        model(ids, attention_mask=mask)


def test_counted_positions_are_looked_at_only_where_they_may_not_fit():
    unlooked = torch.full((1, 4), 99)
    check_positions(unlooked, 20, counted_to=20)
    with pytest.raises(ValueError, match="20 positions"):
        check_positions(unlooked, 20, counted_to=21)


def test_an_implementation_that_cannot_run_patterns_is_refused():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot run attention patterns; use .*'eager'"):
        model(random_ids(1, 4))
