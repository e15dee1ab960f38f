"""The Compressive Transformer equals the loops of its reference, and each loss trains what it should."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling import configuration_compressive_transformer as configuration
from hf_tfamily.modeling import modeling_compressive_transformer as modeling
from hf_tfamily.modeling.configuration_compressive_transformer import CompressiveTransformerConfig
from hf_tfamily.modeling.memory_segments import SegmentMemory
from hf_tfamily.modeling.modeling_compressive_transformer import (
    CompressiveMemory,
    CompressiveTransformerForCausalLM,
    CompressiveTransformerForSequenceClassification,
    CompressiveTransformerModel,
)
from hf_tfamily.modeling.modeling_transformer_xl import TransformerXLModel
from tests.reference.compressive_transformer import compressive_transformer

VOCAB = 11
CUTS = [4, 3, 5, 1, 1, 6]
compressions = pytest.mark.parametrize("compression", configuration.COMPRESSIONS)


def build(model_class=CompressiveTransformerForCausalLM, compression="conv", **fields):
    """A small model in evaluation mode; norms and biases are random as well."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    memory = {"mem_len": 4, "compressed_mem_len": 3, "compression_rate": 2, "compression": compression}
    config = CompressiveTransformerConfig(**{**sizes, **memory, "initializer_range": 0.4, **fields})
    config._attn_implementation = "eager" if compression == "most_used" else "sdpa"
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tokens(*shape):
    return torch.randint(0, VOCAB, shape)


def read(model, segments, memory=None, **kwargs):
    """First outputs of consecutive segments, the memory after them, and all outputs."""
    outputs = []
    for segment in segments:
        outputs.append(model(segment, past_key_values=memory, use_cache=True, **kwargs))
        memory = outputs[-1].past_key_values
    return torch.cat([output[0] for output in outputs], dim=1), memory, outputs


# -- the paper ---------------------------------------------------------------------------------------------------------


def test_configuration_and_model_know_the_same_names():
    assert tuple(modeling.COMPRESSIONS) == configuration.COMPRESSIONS
    assert tuple(modeling.LOSSES) == (*configuration.LOSSES, None)


@pytest.mark.parametrize(
    "fields",
    [
        *({"compression": name} for name in configuration.COMPRESSIONS),
        {"compression": "conv", "norm_first": True, "untie_r": True},
        {"compression": "conv", "compression_loss": "auto_encoding"},
        {"compression": "dilated_conv", "compression_rate": 3, "compression_dilation": 3, "clamp_len": 5},
    ],
)
def test_equals_the_loops_with_gradients(fields):
    model = build(CompressiveTransformerModel, **fields).double().train()
    segments = tokens(2, sum(CUTS)).split(CUTS, dim=1)
    weights = None
    if fields["compression"] == "most_used":
        _, _, outputs = read(model, segments, output_attentions=True)
        weights = [[attention.mean(dim=1) for attention in output.attentions] for output in outputs]
    expected, expected_losses = compressive_transformer(model, segments, weights)
    tolerance = 1e-10

    output, memory, outputs = read(model, segments)
    losses = torch.stack([output.compression_loss for output in outputs])
    assert (memory.held - memory.recent, memory.get_seq_length()) == (3, sum(CUTS))
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(losses, expected_losses, atol=tolerance, rtol=0)

    direction, parameters = torch.randn_like(expected), list(model.parameters())
    total = (output * direction).sum() + losses.sum()
    expected_total = (expected * direction).sum() + expected_losses.sum()
    mine = torch.autograd.grad(total, parameters, allow_unused=True)
    for gradient, other in zip(mine, torch.autograd.grad(expected_total, parameters, allow_unused=True)):
        torch.testing.assert_close(gradient, other, atol=10 * tolerance, rtol=tolerance)

    with torch.no_grad():
        output, memory, outputs = read(model.eval(), segments)
    assert memory.projected
    assert outputs[0].compression_loss is None
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("loss", configuration.LOSSES)
@pytest.mark.parametrize("compression", configuration.LEARNED)
def test_compression_losses_train_the_compression_alone_and_the_main_loss_everything_else(compression, loss):
    model = build(compression=compression, compression_loss=loss, compression_loss_weight=1.0).train()
    memory = None
    for segment in tokens(2, 12).split(4, dim=1):
        output = model(segment, labels=segment, past_key_values=memory)
        memory = output.past_key_values
    names = [name for name, _ in model.named_parameters()]
    compressing = {name for name in names if ".compression" in name}
    assert len(compressing) == 2 * (2 if loss == "attention_reconstruction" else 4)

    def trained(scalar):
        gradients = torch.autograd.grad(scalar, list(model.parameters()), allow_unused=True, retain_graph=True)
        return {name for name, g in zip(names, gradients) if g is not None and g.abs().sum() > 0}

    assert trained(output.compression_loss) == compressing
    assert trained(output.loss - output.compression_loss) >= set(names) - compressing
    main = output.loss - output.compression_loss
    gradients = torch.autograd.grad(main, [p for n, p in model.named_parameters() if n in compressing])
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_without_a_full_memory_it_is_a_transformer_xl():
    model = build(CompressiveTransformerModel, mem_len=40)
    plain = TransformerXLModel(model.config).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "compression" not in k})
    segments = tokens(2, 20).split(5, dim=1)
    torch.testing.assert_close(read(model, segments)[0], read(plain, segments)[0])


def test_block_sparse_equals_eager_with_both_memories_filled():
    """Outputs and the gradients of a segment, after a run that has filled memory and compressed memory."""
    results = []
    ids, grad = tokens(2, 20), torch.randn(2, 4, VOCAB)
    model = build()
    for attention in ("eager", "block_sparse"):
        model.set_attn_implementation(attention)
        *filling, segment = ids.split(4, dim=1)
        memory = read(model, filling)[1]
        assert all(layer.compressed.shape[1] == 3 for layer in memory.layers)
        output = model(segment, past_key_values=memory).logits
        gradients = torch.autograd.grad(output, list(model.parameters()), grad, allow_unused=True)
        results.append([output, *(gradient for gradient in gradients if gradient is not None)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient_from_the_first_step():
    """Distributed training stops at parameters without one."""
    for loss in configuration.LOSSES:
        model = build(compression_loss=loss).train()
        ids = tokens(2, 4)
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", configuration.LOSSES)
def test_losses_honour_num_items_in_batch(loss):
    """Two steps that accumulate are one large batch."""
    model = build(segment_length=4, compression_loss=loss, compression_loss_weight=0.7).train()
    ids = tokens(4, 16)
    whole = model(ids, labels=ids)
    parts = [model(half, labels=half, num_items_in_batch=torch.tensor(4 * 15)) for half in ids.split(2)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert whole.compression_loss > 0
    main = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(whole.loss, main + 0.7 * whole.compression_loss)


@compressions
def test_gradient_checkpointing_changes_nothing(compression):
    model = build(compression=compression, segment_length=4).train()
    ids = tokens(2, 18)
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    memory = CompressiveMemory(model.config)
    model(ids, labels=ids, past_key_values=memory).loss.backward()
    assert memory.get_seq_length() == 18
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


# -- generation, padding, files ----------------------------------------------------------------------------------------


@compressions
def test_memory_of_either_kind_does_not_matter_token_by_token(compression):
    model = build(compression=compression)
    segments = tokens(2, 16).split(1, dim=1)
    expected, kept, _ = read(model, segments)
    with torch.no_grad():
        output, memory, _ = read(model, segments)
    assert (kept.projected, memory.projected) == (False, True)
    assert (memory.held, memory.recent) == (kept.held, kept.recent)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@compressions
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_what_reading_step_by_step_says(compression, beams):
    model = build(compression=compression)
    prompt = tokens(2, 7)
    generated = model.generate(prompt, max_new_tokens=12, num_beams=beams, do_sample=False)
    assert generated.shape == (2, 19)
    if beams == 1:
        cuts = [7, *[1] * 11]
        with torch.no_grad():
            logits, _, _ = read(model, generated[:, :-1].split(cuts, dim=1))
        assert torch.equal(logits[:, 6:].argmax(-1), generated[:, 7:])


def test_beams_carry_their_memories_along():
    model = build()
    with torch.no_grad():
        _, memory, _ = read(model, tokens(3, 12).split(4, dim=1))
        order, ids = torch.tensor([2, 0, 0]), tokens(1, 2).expand(3, 2)
        other = copy.deepcopy(memory)
        other.reorder_cache(order)
        expected = model(ids, past_key_values=memory).logits[order]
        torch.testing.assert_close(model(ids, past_key_values=other).logits, expected)


@compressions
def test_padding_is_never_seen_even_compressed(compression):
    """A row that begins with one whole group of padding sees what it would see without."""
    model = build(CompressiveTransformerModel, compression=compression, compressed_mem_len=8)
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[0, :2] = 3
    for training in (True, False):
        with torch.set_grad_enabled(training):
            memory, outputs = None, []
            for start, end in ((0, 6), (6, 10), (10, 14)):
                output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=memory, use_cache=True)
                memory = output.past_key_values
                outputs.append(output[0])
            padded = torch.cat(outputs, dim=1)[0, 2:]
            alone, _, _ = read(model, [ids[:1, 2:6], ids[:1, 6:10], ids[:1, 10:]])
        torch.testing.assert_close(padded, alone[0], atol=1e-5, rtol=0)


def test_a_place_that_would_mix_in_padding_is_not_seen():
    model = build(CompressiveTransformerModel, compressed_mem_len=8)
    mask = torch.ones(1, 8)
    mask[0, 0] = 0
    memory = model(tokens(1, 8), attention_mask=mask, use_cache=True).past_key_values
    assert memory.valid.tolist() == [[False, True, True, True, True, True]]
    ids = tokens(1, 3)
    before = model(ids, past_key_values=copy.deepcopy(memory))[0]
    memory.layers[0].compressed[:, 0] += 9
    torch.testing.assert_close(model(ids, past_key_values=memory)[0], before)


def test_a_dilated_convolution_reaches_into_the_padding_of_earlier_groups():
    compression = modeling.DilatedConv(CompressiveTransformerConfig(compression_rate=2, compression_dilation=4))
    tokens_at = torch.tensor([[False, True, True, True, True, True, True, True]])
    assert compression.valid(tokens_at).tolist() == [[True, True, True, True]]  # places see 1; 3; 1, 5; 3, 7
    tokens_at[0, 1] = False
    assert compression.valid(tokens_at).tolist() == [[False, True, False, True]]
    states = torch.randn(1, 8, 256, requires_grad=True)
    evicted = modeling.Evicted(states, None, None, 0, torch.arange(8))
    for place in range(4):
        (gradient,) = torch.autograd.grad(compression(evicted, None)[:, place].sum(), states)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.nonzero().flatten().tolist() == [i for i in (2 * place - 3, 2 * place + 1) if i >= 0]


def test_heads_and_files(tmp_path):
    model = build(segment_length=4)
    model.save_pretrained(tmp_path / "lm")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = tokens(2, 14)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    classifier = build(CompressiveTransformerForSequenceClassification, segment_length=4, pad_token_id=0)
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    output = loaded.train()(ids.clamp(min=1), labels=torch.tensor([0, 1]))
    assert output.logits.shape == (2, 2)
    output.loss.backward()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_refuses_what_does_not_fit():
    model = build()
    with pytest.raises(ValueError, match=r"must be a compressive memory, .* got a SegmentMemory"):
        model(tokens(1, 3), past_key_values=SegmentMemory(model.config))
    with torch.no_grad():
        memory = model(tokens(2, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="remembers a batch of 2 rows"):
        model(tokens(1, 3), past_key_values=memory)
    with pytest.raises(ValueError, match="nothing can be learnt"):
        model.train()(tokens(2, 3), past_key_values=memory)
    with pytest.raises(ValueError, match=r"\[2, 9 \+ 3\], got \[2, 3\]"):
        model.eval()(tokens(2, 3), past_key_values=memory, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"its dtype is torch.float32, the segment's is torch.float64"):
        model.double()(tokens(2, 3), past_key_values=memory)
    most_used = build(compression="most_used")
    most_used.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="compression='most_used' needs attention weights"):
        most_used(tokens(1, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": "zip"}, "compression must be one of max_pool, .* got 'zip'"),
        ({"compression": "conv", "compression_loss": None}, "convolutions .* learn by a compression loss alone"),
        ({"compression": "mean_pool", "compression_loss": "auto_encoding"}, "nothing else has anything to learn"),
        ({"compression_loss": "mse"}, "compression_loss must be one of attention_reconstruction, auto_encoding, None"),
        ({"compression_rate": 0}, "compression_rate must be at least 1"),
        ({"compressed_mem_len": 0}, "compressed_mem_len must be at least 1"),
        ({"compression_loss_weight": 0.0}, "compression_loss_weight must be above 0"),
        ({"same_length": True}, "same_length=True has no meaning"),
        ({"zero_initial_memory": True}, "zero_initial_memory=True has no meaning"),
        ({"mem_len": 0}, "mem_len must be at least 1"),
    ],
)
def test_refuses_configs(fields, message):
    with pytest.raises(Exception, match=message):
        CompressiveTransformerConfig(**fields)
