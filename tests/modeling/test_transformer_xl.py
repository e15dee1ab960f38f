"""Transformer-XL equals the loops of its reference, however a text is cut, padded, cached or trained."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling.configuration_transformer_xl import TransformerXLConfig
from hf_tfamily.modeling.memory_segments import SegmentMemory
from hf_tfamily.modeling.modeling_transformer_xl import (
    TransformerXLForCausalLM,
    TransformerXLForSequenceClassification,
    TransformerXLModel,
)
from tests.reference.transformer_xl import transformer_xl

VOCAB = 11
ADAPTIVE = {"cutoffs": [4, 8], "div_val": 2}


def config(attention="sdpa", **fields):
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mem_len": 5}
    made = TransformerXLConfig(**{**sizes, "initializer_range": 0.4, "projection_initializer_range": 0.4, **fields})
    made._attn_implementation = attention
    return made


def build(model_class=TransformerXLForCausalLM, **fields):
    """A model in evaluation mode; norms and biases are random as well."""
    model = model_class(config(**fields))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)


def read(model, segments, memory=None, **kwargs):
    """Hidden states or logits of consecutive segments, and the memory after them."""
    outputs = []
    for segment in segments:
        output = model(segment, past_key_values=memory, use_cache=True, **kwargs)
        memory = output.past_key_values
        outputs.append(output[0])
    return torch.cat(outputs, dim=1), memory


# -- the paper ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa", "block_sparse"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"same_length": True},
        {"norm_first": True, "clamp_len": 3},
        {"untie_r": True, "head_dim": 3},
        {"zero_initial_memory": True, "norm_first": True, "same_length": True},
    ],
)
def test_equals_the_loops_with_gradients(fields, attention):
    model = build(TransformerXLModel, attention=attention, **fields).double()
    segments = tokens(2, 9).split([4, 3, 2], dim=1)
    expected = transformer_xl(model, segments)
    direction = torch.randn_like(expected)
    parameters = list(model.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters, direction)
    tolerance = 1e-10

    output, memory = read(model.train(), segments)
    assert not memory.projected
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)
    for mine, theirs in zip(torch.autograd.grad(output, parameters, direction), expected_gradients):
        torch.testing.assert_close(mine, theirs, atol=10 * tolerance, rtol=tolerance)
    with torch.no_grad():
        output, memory = read(model.eval(), segments)
    assert memory.projected
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@pytest.mark.slow
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # on the CPU, dynamic sizes do not compile with a bias
def test_flex_attention_equals_sdpa():
    model = build(TransformerXLModel, num_attention_heads=1, head_dim=16, hidden_size=16)
    segments = tokens(2, 9).split([4, 5], dim=1)
    with torch.no_grad():
        expected, _ = read(model, segments)
        model.set_attn_implementation("flex_attention")
        output, _ = read(model, segments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_same_length_makes_segments_one_pass(training):
    model = build(same_length=True).train(training)
    ids = tokens(2, 17)
    with torch.set_grad_enabled(training):
        whole = model(ids).logits
        for cut in ([17], [5, 7, 5], [1] * 17):
            pieces, _ = read(model, ids.split(cut, dim=1))
            torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)


def test_without_same_length_the_first_segment_remembers_all():
    model = build(mem_len=20)
    ids = tokens(2, 17)
    pieces, memory = read(model, ids.split(4, dim=1))
    torch.testing.assert_close(pieces, model(ids).logits, atol=1e-5, rtol=0)
    assert (memory.get_seq_length(), memory.held) == (17, 17)


def test_no_gradient_reaches_the_earlier_segment_but_projections_learn_from_it():
    model = build(TransformerXLModel).train()
    first, second = torch.randn(2, 1, 4, 8, requires_grad=True).unbind()
    memory = model(inputs_embeds=first, use_cache=True).past_key_values
    model(inputs_embeds=second, past_key_values=memory).last_hidden_state.sum().backward()
    kept = model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model(inputs_embeds=second).last_hidden_state.sum().backward()
    assert not torch.allclose(kept, model.layers[0].self_attn.k_proj.weight.grad)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(
            model(inputs_embeds=second, past_key_values=copy.deepcopy(memory)).last_hidden_state.sum(), first
        )


# The authors' models: fields, exact number of parameters, and what the paper says it is.
WORDS = {"vocab_size": 267735, "cutoffs": [20000, 40000, 200000]}
PAPER = {
    "enwik8, 12 layers": (
        {"vocab_size": 204, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048},
        41_055_436,
        "41M",
    ),
    "enwik8, 24 layers": (
        {"vocab_size": 204, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 3072},
        277_231_820,
        "277M",
    ),
    "WikiText-103, base": (
        {**WORDS, "hidden_size": 410, "num_hidden_layers": 16, "num_attention_heads": 10, "intermediate_size": 2100},
        151_107_538,
        "151M",
    ),
    # The paper says 257M.
    "WikiText-103, large": (
        {
            **WORDS,
            "div_val": 4,
            "hidden_size": 1024,
            "num_hidden_layers": 18,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "untie_r": True,
        },
        285_205_322,
        "285M",
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_their_size(name):
    fields, count, millions = PAPER[name]
    with torch.device("meta"):
        model = TransformerXLForCausalLM(TransformerXLConfig(**{"num_attention_heads": 8, **fields}))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count / 1e6:.0f}M" == millions


# -- segments inside one call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_long_inputs_are_read_in_segments(fields):
    model = build(segment_length=4, **fields).train()
    ids = tokens(2, 10)
    output = model(ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    split = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert [states.shape for states in output.hidden_states] == [(2, 10, 8)] * 3
    assert output.past_key_values.get_seq_length() == 10

    model.zero_grad()
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    memory, losses = None, []
    for segment, wanted in zip(ids.split(4, dim=1), targets.split(4, dim=1)):
        part = model(segment, shift_labels=wanted, past_key_values=memory, num_items_in_batch=18)
        memory = part.past_key_values
        losses.append(part.loss)
    sum(losses).backward()
    torch.testing.assert_close(output.loss, sum(losses))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(split[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"norm_first": True}, ADAPTIVE])
def test_gradient_checkpointing_changes_nothing(fields):
    model = build(segment_length=4, **fields).train()
    ids = tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    output = model(ids, labels=ids, past_key_values=SegmentMemory(model.config))
    output.loss.backward()
    assert output.past_key_values.get_seq_length() == 10
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
def test_loss_honours_num_items_in_batch(fields):
    model = build(**fields)
    ids = tokens(2, 6)
    labels = ids.masked_fill(torch.rand(2, 6) < 0.3, -100)
    count = (labels[:, 1:] != -100).sum()
    plain, counted = model(ids, labels=labels).loss, model(ids, labels=labels, num_items_in_batch=3 * count).loss
    torch.testing.assert_close(plain, 3 * counted)
    log_probabilities = model(ids).logits.log_softmax(-1)[:, :-1]
    expected = nn.functional.nll_loss(log_probabilities.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(plain, expected)


def test_the_stock_trainer_accumulates_segments_exactly(tmp_path):
    """Two batches of one row accumulated are one batch of two rows."""
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]

    def trained(**arguments):
        torch.manual_seed(0)
        model = build(segment_length=4)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            **arguments,
        )
        Trainer(model, arguments, train_dataset=data, eval_dataset=data).train()
        return model

    whole = trained(per_device_train_batch_size=2)
    parts = trained(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    for one, other in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, ADAPTIVE])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_memory_equals_without(fields, beams):
    model = build(same_length=True, **fields)
    options = {"max_new_tokens": 9, "num_beams": beams, "do_sample": False, "output_scores": True}
    options["return_dict_in_generate"] = True
    cached = model.generate(tokens(2, 4), **options)
    torch.manual_seed(0)
    plain = model.generate(cached.sequences[:, :4], use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.past_key_values.projected
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "block_sparse"])
@pytest.mark.parametrize("same_length", [True, False])
def test_left_padding_changes_nothing(same_length, attention):
    model = build(same_length=same_length, attention=attention, pad_token_id=0)
    ids = tokens(2, 6).clamp(min=1)
    alone = model.generate(ids[:1, 2:], max_new_tokens=8, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    padded = model.generate(ids.masked_fill(mask == 0, 0), attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(padded[0, 6:], alone[0, 4:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("same_length", [True, False])
def test_padding_inside_the_memory_is_never_seen(same_length, training):
    """Row 0 ends early in its first segment and begins late in its second."""
    model = build(TransformerXLModel, same_length=same_length, mem_len=12).train(training)
    ids = tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 4:6] = 0
    mask[0, 6:8] = 0
    with torch.set_grad_enabled(training):
        first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
        third = model(ids[:, :2], past_key_values=second.past_key_values)
        alone, _ = read(model, [ids[:1, :4], ids[:1, 8:], ids[:1, :2]])
    seen = torch.cat([first[0][0, :4], second[0][0, 2:], third[0][0]])
    torch.testing.assert_close(seen, alone[0], atol=1e-5, rtol=0)


def test_queries_that_see_nothing_get_nothing_in_every_backend():
    """Only padding does, and its output is what the layers make of a zero attention."""
    model = build(TransformerXLModel, attention="eager").train()
    ids, mask = tokens(2, 6), torch.ones(2, 6)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    for attention in ("sdpa", "block_sparse"):
        model.set_attn_implementation(attention)
        output = model(ids, attention_mask=mask).last_hidden_state
        tokens_only = mask > 0 if attention == "block_sparse" else slice(None)  # there, padding attends to nothing
        torch.testing.assert_close(output[tokens_only], expected[tokens_only], atol=1e-5, rtol=0)
        output.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_continues_a_text_from_its_memory():
    model = build(same_length=True)
    ids = tokens(1, 10)
    with torch.no_grad():
        memory = model(ids[:, :7], use_cache=True).past_key_values
    continued = model.generate(ids, past_key_values=memory, max_new_tokens=5, do_sample=False)
    assert torch.equal(continued, model.generate(ids, max_new_tokens=5, do_sample=False))


# -- heads, files ------------------------------------------------------------------------------------------------------


def test_classifies_a_long_text_by_its_last_token():
    model = build(TransformerXLForSequenceClassification, segment_length=4, pad_token_id=0, num_labels=3)
    ids = tokens(2, 10).clamp(min=1)
    ids[0, 7:] = 0
    output = model(ids, attention_mask=(ids != 0).long(), labels=torch.tensor([0, 2]))
    short = model(ids[:1, :7]).logits
    torch.testing.assert_close(output.logits[:1], short, atol=1e-5, rtol=0)
    output.loss.backward()


@pytest.mark.parametrize("fields", [{}, ADAPTIVE, {**ADAPTIVE, "tie_word_embeddings": False}, {"embedding_size": 4}])
def test_saved_models_come_back_with_their_ties(fields, tmp_path):
    model = build(**fields)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokens(1, 5)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_bfloat16_and_autocast_keep_the_memory():
    model = build()
    ids = tokens(1, 8).split(4, dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, memory = read(model.train(), ids)
        output.float().sum().backward()
        assert memory.get_seq_length() == 8
        with torch.no_grad():
            read(model.eval(), ids)
    with torch.no_grad():
        assert read(model.bfloat16(), ids)[0].dtype == torch.bfloat16


# -- bad input ---------------------------------------------------------------------------------------------------------


def memory_of(model, rows=2, training=False):
    model.train(training)
    with torch.set_grad_enabled(training):
        return model(tokens(rows, 4), use_cache=True).past_key_values


def test_refuses_a_memory_that_does_not_fit():
    model, other = build(), build()
    with pytest.raises(ValueError, match="remembers a batch of 2 rows on cpu, but the new segment has 3 rows"):
        model(tokens(3, 4), past_key_values=memory_of(model))
    with pytest.raises(ValueError, match="memory of another model"):
        model(tokens(2, 4), past_key_values=memory_of(other))
    with pytest.raises(ValueError, match="memory of another model"):
        model(tokens(2, 4), past_key_values=copy.deepcopy(memory_of(build(num_hidden_layers=3))))
    narrow = copy.deepcopy(memory_of(build(num_attention_heads=1)))
    with pytest.raises(ValueError, match=r"its sizes is \(1, 8\), the segment's is \(2, 4\)"), torch.no_grad():
        model(tokens(2, 4), past_key_values=narrow)
    memory = memory_of(model)
    with pytest.raises(ValueError, match=r"its dtype is torch.float32, the segment's is torch.float64"):
        model.double()(tokens(2, 4), past_key_values=memory)
    with pytest.raises(ValueError, match="must be a segment memory, as earlier calls returned it, got a DynamicCache"):
        model(tokens(2, 4), past_key_values=DynamicCache())


def test_refuses_to_train_through_projected_keys():
    model = build()
    memory = memory_of(model)
    with pytest.raises(ValueError, match="through which nothing can be learnt"):
        model.train()(tokens(2, 4), past_key_values=memory)


@pytest.mark.parametrize("training", [True, False])
def test_refuses_a_memory_that_a_failed_call_left_half_updated(training):
    model = build()
    memory = memory_of(model, training=training)

    def fail(*args):
        raise MemoryError

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError), torch.set_grad_enabled(training):
        model(tokens(2, 4), past_key_values=memory)
    hook.remove()
    with pytest.raises(ValueError, match="half updated, by a call that failed"):
        model(tokens(2, 4), past_key_values=memory)
    memory.reset()
    model(tokens(2, 4), past_key_values=memory)


def test_embeddings_may_be_given():
    model = build()
    ids = tokens(2, 5)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_evaluates_with_a_training_memory():
    model = build()
    ids = tokens(2, 8).split(4, dim=1)
    expected, _ = read(model, ids)
    memory = model.train()(ids[0], use_cache=True).past_key_values
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids[1], past_key_values=memory).logits, expected[:, 4:])


def test_refuses_masks_and_positions_that_do_not_fit():
    model = build()
    memory = memory_of(model)
    with pytest.raises(ValueError, match=r"\[batch, past \+ new tokens\] = \[2, 4 \+ 3\], got \[2, 3\]"):
        model(tokens(2, 3), past_key_values=memory, attention_mask=torch.ones(2, 3))
    mask = torch.ones(2, 7)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="disagree about which of the earlier tokens are padding"):
        model(tokens(2, 3), past_key_values=memory, attention_mask=mask)
    with pytest.raises(ValueError, match="takes no position_ids"):
        model(tokens(2, 3), position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 10\]"):
        model(torch.tensor([[VOCAB]]))


def test_refuses_backends_that_would_leave_the_distances_out():
    model = build()
    model.config._attn_implementation = "paged"
    with pytest.raises(ValueError, match="'paged' takes no relative position bias; use one of eager, sdpa"):
        model(tokens(1, 3))
    with pytest.raises(ValueError, match=r"[Ff]lash"):
        TransformerXLForCausalLM._from_config(config(), attn_implementation="flash_attention_2")


def test_refuses_attentions_of_several_segments_and_resizing_clusters():
    with pytest.raises(ValueError, match="segments see different numbers of keys"):
        build(segment_length=2, attention="eager")(tokens(1, 4), output_attentions=True)
    with pytest.raises(ValueError, match="cannot be resized"):
        build(**ADAPTIVE).resize_token_embeddings(20)
    model = build()
    model.resize_token_embeddings(20)
    assert model(tokens(1, 3)).logits.shape == (1, 3, 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_len": 0}, "mem_len must be at least 1, got 0"),
        ({"segment_length": 0}, "segment_length must be at least 1, or None"),
        ({"clamp_len": -1}, "clamp_len must be at least 1, or None"),
        ({"hidden_size": 9, "head_dim": 4}, "hidden_size must be even"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads=3"),
        ({"cutoffs": [4, 4]}, "cutoffs must rise between 0 and vocab_size=11"),
        ({"cutoffs": [4, 11]}, "cutoffs must rise"),
        ({"cutoffs": [4, 8], "div_val": 4}, "leaves no width for the last cluster"),
        ({"cutoffs": [4], "tie_projections": [True]}, "each of 2 clusters"),
        ({"tie_projections": [True], "tie_word_embeddings": False}, "tied only with embeddings"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_refuses_configs(fields, message):
    with pytest.raises(Exception, match=message):
        config(**fields)
