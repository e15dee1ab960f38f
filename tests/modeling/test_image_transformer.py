"""The Image Transformer equals the paper's equations, samples as it should, and behaves as Transformers expects."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_tfamily  # noqa: F401
from hf_tfamily.modeling.attention import eager_attention_forward, layer_masks
from hf_tfamily.modeling.attention_patterns import Block1D, Block2D
from hf_tfamily.modeling.cache_patterns import PatternCacheLayer
from hf_tfamily.modeling.configuration_image_transformer import ImageTransformerConfig
from hf_tfamily.modeling.image_processing_tokens import ImageTokenProcessor
from hf_tfamily.modeling.mixture_of_logistics import channel_mixture
from hf_tfamily.modeling.modeling_image_transformer import (
    BicubicEnlargement,
    ImageTransformerForCausalLM,
    ImageTransformerForSuperResolution,
    ImageTransformerModel,
)
from tests import tiny_models
from tests.reference import image_transformer as loops

GOLDENS = Path(__file__).parents[1] / "goldens" / "image_transformer"
BLOCKS = {"type": "block_2d", "height": 2, "width": 3, "flange_height": 1, "flange_width": 2}
PATTERNS = {
    "1d": {"type": "block_1d", "block": 7, "flange": 5},
    "2d": BLOCKS,
    "both": [BLOCKS, {"type": "block_1d", "block": 6, "flange": 6}],
}
OUTPUTS = ("categorical", "logistic_mixture")
VALUES, CLASSES = 5, 3

every_output = pytest.mark.parametrize("output", OUTPUTS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_enlargement = pytest.mark.parametrize(
    ("output", "fields"),
    [("categorical", {}), ("logistic_mixture", {}), ("logistic_mixture", {"predict_residual": True})],
    ids=["categorical", "logistic_mixture", "residual"],
)
with_classes = pytest.mark.parametrize("classes", [0, CLASSES])
every_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse", "flex_attention"])
every_differentiable = pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])


def tiny_config(output="categorical", pattern="2d", classes=0, **overrides):
    """3x4 pixels, which blocks of 2x3 do not divide; heads wider than hidden_size / heads."""
    fields = {
        "vocab_size": VALUES + max(1, classes),
        "num_classes": classes,
        "image_size": [3, 4],
        "source_image_size": [2, 1],
        "output": output,
        "num_mixtures": 3,
        "attention_patterns": PATTERNS[pattern],
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 6,
        "intermediate_size": 12,
        "initializer_range": 0.4,
    }
    return ImageTransformerConfig(**fields | overrides)


def tiny_model(output="categorical", pattern="2d", classes=0, implementation="eager", large=False, **overrides):
    """A model in evaluation mode whose every weight matters."""
    torch.manual_seed(0)
    model_class = ImageTransformerForSuperResolution if large else ImageTransformerForCausalLM
    config = tiny_config(output, pattern, classes, **overrides)
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def image_ids(model, batch=2, length=None):
    """Start tokens and random values."""
    config = model.config
    length = length or config.max_position_embeddings
    starts = torch.randint(VALUES, VALUES + max(1, config.num_classes), (batch, 1))
    return torch.cat([starts, torch.randint(VALUES, (batch, length - 1))], dim=1)


def small_images(model, batch=2):
    height, width = model.config.source_image_size
    return torch.randint(VALUES, (batch, height * width * model.config.num_channels))


def run(model, *args, **kwargs):
    """flex_attention without gradients and without its seconds of compilation."""
    if model.config._attn_implementation != "flex_attention":
        return model(*args, **kwargs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


def by_loops(model, ids, source=None):
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    sources = [None] * len(ids) if source is None else source.tolist()
    return torch.stack([loops.logits(weights, model.config, row.tolist(), s) for row, s in zip(ids, sources)])


def values_of(logits, output):
    """The part that the loops restate: all logits, or the mixture's log-probabilities of values."""
    return logits if output == "categorical" else logits[..., :VALUES]


def gradients(model, **inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


# The paper's equations


@every_implementation
@every_pattern
@every_output
def test_logits_equal_the_loops(output, pattern, implementation):
    model = tiny_model(output, pattern, implementation=implementation).double()
    ids = image_ids(model)
    found = values_of(run(model, ids).logits, output)
    torch.testing.assert_close(found, by_loops(model, ids), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fields", [{"coordinates": "learned"}, {"num_channels": 1}, {"num_channels": 2}], ids=str)
@with_classes
@every_output
def test_logits_equal_the_loops_for_other_images(output, classes, fields):
    model = tiny_model(output, classes=classes, **fields).double()
    ids = image_ids(model)
    found = values_of(model(ids).logits, output)
    torch.testing.assert_close(found, by_loops(model, ids), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", ["1d", "2d"])
@every_enlargement
def test_enlarging_equals_the_loops(output, fields, pattern):
    model = tiny_model(output, pattern, large=True, **fields).double()
    ids, source = image_ids(model), small_images(model)
    found = values_of(model(input_ids=source, decoder_input_ids=ids).logits, output)
    torch.testing.assert_close(found, by_loops(model, ids, source), rtol=1e-8, atol=1e-8)


def test_gradients_of_residuals_equal_those_of_the_loops():
    model = tiny_model("logistic_mixture", large=True, predict_residual=True).double()
    ids, source, targets = image_ids(model, 1), small_images(model, 1), torch.randint(VALUES, (1, 36))
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    logits = loops.logits(weights, model.config, ids[0].tolist(), source[0].tolist())
    nn.functional.cross_entropy(logits, targets[0]).backward()
    model.train()
    for name, gradient in gradients(model, input_ids=source, decoder_input_ids=ids, labels=targets).items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-6, atol=1e-7, msg=name)


def test_enlarged_images_are_those_of_pillow():
    """Which rounds to whole values, once for each axis."""
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(64, 192, (3, 5, 3), dtype=np.uint8)  # so that nothing is clipped
    config = ImageTransformerConfig(output="logistic_mixture", image_size=[9, 20], source_image_size=[3, 5])
    found = BicubicEnlargement(config)(torch.tensor(picture, dtype=torch.long).reshape(1, 15, 3), torch.empty(()))
    expected = np.asarray(image.fromarray(picture).resize((20, 9), image.Resampling.BICUBIC), np.float64)
    assert np.abs((found[0].numpy() + 1) * 127.5 - expected.reshape(-1, 3)).max() <= 1.5


@every_differentiable
@every_output
def test_gradients_equal_those_of_the_loops(output, implementation):
    model = tiny_model(output, "both", CLASSES, implementation, large=False).double()
    ids, targets = image_ids(model, batch=1), torch.randint(VALUES, (1, 36))
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    logits = loops.logits(weights, model.config, ids[0].tolist())
    nn.functional.cross_entropy(logits, targets[0]).backward()
    model.train()  # where the mixture's loss takes a way of its own
    for name, gradient in gradients(model, input_ids=ids, shift_labels=targets).items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-6, atol=1e-7, msg=name)


def outputs_and_gradients(model, ids, targets):
    """Logits of values, and the gradient of every parameter, in float64."""
    found = gradients(model.eval(), input_ids=ids, shift_labels=targets)
    found["logits"] = model(ids).logits[..., :VALUES].detach()
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "block_sparse"])
@every_pattern
@every_output
def test_errors_against_float64_are_those_of_eager(output, pattern, implementation, dtype):
    exact = tiny_model(output, pattern).double()
    ids, targets = image_ids(exact), torch.randint(VALUES, (2, 36))
    expected = outputs_and_gradients(exact, ids, targets)
    eager, ours = (
        outputs_and_gradients(tiny_model(output, pattern, implementation=name).to(dtype), ids, targets)
        for name in ("eager", implementation)
    )
    for name, wanted in expected.items():
        # Gradients are sums of terms that cancel in part, whose rounding stays: 16 roundings of what is left. Those of
        # queries and keys are differences of what reaches the values.
        size = max(wanted.norm(), expected[re.sub("[qk]_proj", "v_proj", name)].norm())
        budget = 2 * (eager[name] - wanted).norm() + 16 * torch.finfo(dtype).eps * size
        error = (ours[name] - wanted).norm()  # NaN fails too
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"


class Rounded(nn.Module):
    """A layer in float64 whose outputs, and whose gradients of them, are rounded to a dtype."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.weight, self.dtype = layer.weight, dtype

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.weight).to(self.dtype).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixture_loses_no_more_than_rounding_its_parameters_does(dtype):
    """What comes behind the linear layer is computed in float32, forward and backward."""
    model = tiny_model("logistic_mixture")
    ids, targets = image_ids(model), torch.randint(VALUES, (2, 36))
    ids = nn.functional.pad(ids, (2, 0))  # as many values as a pixel has before the first
    hidden_states = torch.randn(2, 36, 8).to(dtype)

    def run(layer, hidden_states):
        hidden_states = hidden_states.detach().requires_grad_()
        logits, nats = model.output(layer(hidden_states), ids, 0, slice(None), targets)
        grads = torch.autograd.grad(nats.mean(), (hidden_states, layer.weight))
        return [x.detach().double() for x in (logits[..., :VALUES], nats, *grads)]

    half = copy.deepcopy(model.lm_head).to(dtype)
    wide = copy.deepcopy(half).double()
    exact, rounded = run(wide, hidden_states.double()), run(Rounded(wide, dtype), hidden_states.double())
    for ours, allowed, wanted in zip(run(half, hidden_states), rounded, exact):
        rounding = torch.finfo(dtype).eps * wanted.abs().max()
        assert (ours - wanted).abs().max() <= 2 * (allowed - wanted).abs().max() + rounding


@every_output
def test_no_value_depends_on_a_later_one(output):
    model = tiny_model(output)
    ids = image_ids(model, batch=1)
    before = model(ids).logits
    for place in range(1, 36):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % VALUES
        after = model(changed).logits
        assert torch.equal(after[0, :place], before[0, :place])
        assert not torch.equal(after[0, place], before[0, place])


# The authors' code


def golden(name):
    return load_file(GOLDENS / f"{name}.safetensors")


def in_our_order(tensor, pattern):
    """[B, H, rows, columns, D] -> [B, H, T, D] in the order of generation."""
    rows, columns = tensor.shape[2:4]
    places = pattern.bind((rows, columns, 1)).place(torch.arange(rows * columns))
    return tensor[:, :, places[0], places[1]]


@every_differentiable
@pytest.mark.parametrize(
    ("name", "pattern", "causal"),
    [
        ("masked_1d", Block1D(5, 5), True),
        ("masked_2d", Block2D(2, 3, 1, 2), True),
        ("local_2d", Block2D(2, 3, 2, 2), False),
    ],
)
def test_attention_is_that_of_the_authors(name, pattern, causal, implementation):
    """Outputs and gradients of a layer under a pattern, and of tensor2tensor's function."""
    tensors = golden(name)
    if isinstance(pattern, Block2D):
        tensors = {key: in_our_order(tensor, pattern) for key, tensor in tensors.items()}
        pattern = pattern.bind((*golden(name)["query"].shape[2:4], 1))
    query, key, value = (tensors[name].requires_grad_() for name in ("query", "key", "value"))
    layer = tiny_model(implementation=implementation).model.layers[0].self_attn
    layer.is_causal = causal
    masks = layer_masks([pattern], layer.config, query.new_zeros(1, query.shape[2], 8), causal=causal)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    output = attention(layer, query, key, value, masks[0], scaling=1.0)[0].transpose(1, 2)
    found = [output, *torch.autograd.grad(output, (query, key, value), tensors["grad_output"])]
    for name, ours in zip(("output", "grad_query", "grad_key", "grad_value"), found):
        error, size = (ours - tensors[name]).abs().max(), tensors[name].abs().max()
        assert error <= 1e-6 * max(1, size), f"{name}: {error:.2e}"


def test_mixture_of_logistics_is_that_of_the_authors():
    """Their parameters of means, scales and coefficients lie component by component, ours channel by channel."""
    tensors, components, channels = golden("discretized_logistics"), 10, 3
    weights, *others = tensors["parameters"].split([components, *[channels * components] * 3], dim=-1)
    ours = torch.cat([weights, *(x.unflatten(-1, (components, channels)).mT.flatten(-2) for x in others)], dim=-1)
    nats = 0
    for channel in range(channels):
        places = torch.full(ours.shape[:-1], channel)
        mixture = channel_mixture(ours, places, tensors["values"], 256)
        nats = nats - mixture.log_prob(tensors["values"][..., channel])
    torch.testing.assert_close(nats, tensors["nats"], rtol=1e-9, atol=0)


# Decoding


@every_pattern
@with_classes
@every_output
@torch.no_grad()
def test_any_steps_equal_one_pass(output, classes, pattern):
    for implementation in ("sdpa", "block_sparse"):
        model = tiny_model(output, pattern, classes, implementation)
        ids = image_ids(model)
        expected = model(ids).logits
        for sizes, cache in (
            ([1] * 36, model.new_pattern_cache()),
            ([4, 1, 1, 7, 2, 1, 20], model.new_pattern_cache()),
            ([5, 1, 30], None),
        ):
            found, start = [], 0
            for size in sizes:
                outputs = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
                found.append(outputs.logits)
                start, cache = start + size, outputs.past_key_values
                assert cache.get_seq_length() == start
            torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=2e-5)


SAMPLING = {"do_sample": True, "top_k": 0, "max_length": 37, "suppress_tokens": list(range(VALUES, VALUES + CLASSES))}


def ancestral_samples(model, start, **source):
    """Value by value from the distribution that the whole model gives each, all computed anew for each."""
    name = "decoder_input_ids" if source else "input_ids"
    ids = start
    while ids.shape[1] < 37:
        logits = model(**{name: ids}, **source, use_cache=False).logits[:, -1].float()
        logits[:, VALUES:] = -torch.inf
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


@pytest.mark.parametrize("pattern", ["1d", "2d"])
@with_classes
@every_output
@torch.no_grad()
def test_generate_equals_ancestral_sampling(output, classes, pattern):
    model = tiny_model(output, pattern, classes, "block_sparse").double()
    start = image_ids(model, batch=3)[:, :1]
    options = SAMPLING | {"suppress_tokens": list(range(VALUES, model.config.vocab_size))}
    torch.manual_seed(7)
    expected = ancestral_samples(model, start)
    torch.manual_seed(7)
    assert torch.equal(model.generate(start, attention_mask=torch.ones_like(start), **options), expected)


@every_enlargement
@torch.no_grad()
def test_generate_enlarges_as_ancestral_sampling_does(output, fields):
    model = tiny_model(output, implementation="block_sparse", large=True, **fields).double()
    source, start = small_images(model), torch.full((2, 1), VALUES)
    torch.manual_seed(7)
    expected = ancestral_samples(model, start, input_ids=source)
    torch.manual_seed(7)
    assert torch.equal(model.generate(source, **SAMPLING | {"suppress_tokens": [VALUES]}), expected)


@with_classes
@every_output
@torch.no_grad()
def test_beams_and_copies_carry_what_the_cache_holds(output, classes):
    model = tiny_model(output, classes=classes)
    start = image_ids(model)[:, :4]
    mask = torch.ones_like(start)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached, plain = (
            model.generate(start, attention_mask=mask, do_sample=False, max_length=37, use_cache=use, **options)
            for use in (True, False)
        )
        assert torch.equal(cached, plain)


@every_enlargement
@torch.no_grad()
def test_beams_carry_the_small_image(output, fields):
    model = tiny_model(output, large=True, **fields)
    source = small_images(model)
    cached, plain = (
        model.generate(source, do_sample=False, max_length=37, num_beams=3, suppress_tokens=[VALUES], use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        # The block, the row above it and two columns to the left of both; nothing lies to the right of the last.
        (BLOCKS, (2 + 1) * (3 + 2)),
        ({"type": "block_1d", "block": 6, "flange": 6}, 6 + 6),
    ],
    ids=["2d", "1d"],
)
@every_output
@torch.no_grad()
def test_a_step_reads_the_block_and_not_the_image(output, pattern, keys, monkeypatch):
    """Keys read by the last step of images of several sizes, and bytes kept; those may follow the width alone."""
    read, update = [], PatternCacheLayer.update

    def counted(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        read.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(PatternCacheLayer, "update", counted)
    kept = {}
    for height, width in ((8, 12), (16, 12), (32, 12), (8, 24)):
        model = tiny_model(
            output,
            image_size=[height, width],
            num_channels=1,
            attention_patterns=pattern,
            implementation="block_sparse",
        )
        cache, ids = model.new_pattern_cache(), image_ids(model)
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        read.clear()
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        assert read == [keys] * 2
        kept[height, width] = cache.nbytes
    assert kept[8, 12] == kept[16, 12] == kept[32, 12] <= kept[8, 24] <= 2 * kept[8, 12]


@torch.no_grad()
def test_left_padding_changes_nothing():
    model = tiny_model(pattern="both", classes=CLASSES)
    ids = image_ids(model, batch=1)[:, :20]
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 5:], model(ids).logits, atol=1e-5, rtol=1e-5
    )


def gradients_in_steps(model, ids, sizes, cache):
    """Of all weights by name, of some weighted sum of the losses of values, computed in such steps."""
    model.zero_grad()
    total, start = 0.0, 0
    for size in sizes:
        values = slice(start, start + size)
        logits = model(ids[:, values], past_key_values=cache).logits
        total = total + (logits * torch.arange(values.start, values.stop)[:, None].sin()).sum()
        start += size
    total.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@every_output
@with_classes
@pytest.mark.parametrize("sizes", [[18, 18], [10, 1, 1, 1, 2, 21]])
def test_gradients_flow_through_the_past(output, classes, sizes):
    """Through keys and values, the class of the start token, and the hidden state that the values of a pixel share."""
    model = tiny_model(output, classes=classes, implementation="block_sparse").double()
    ids = image_ids(model)
    expected = gradients_in_steps(model, ids, [36], None)
    found = gradients_in_steps(model, ids, sizes, model.new_pattern_cache())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


# Losses and training


@every_output
def test_labels(output):
    model = tiny_model(output)
    ids, targets = image_ids(model), torch.randint(VALUES, (2, 36))
    targets[0, :7] = -100
    logits = model(ids).logits
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), targets)
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected)
    torch.testing.assert_close(model(ids, shift_labels=targets, num_items_in_batch=130).loss, expected * 65 / 130)
    torch.testing.assert_close(model.train()(ids, shift_labels=targets).loss, expected)
    shifted = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    torch.testing.assert_close(model(ids, labels=ids).loss, shifted)
    torch.testing.assert_close(model.eval()(ids, logits_to_keep=5).logits, logits[:, -5:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 8])).logits, logits[:, [3, 8]])


@every_enlargement
def test_labels_of_enlarged_images_are_aligned(output, fields):
    model = tiny_model(output, large=True, **fields)
    source, targets = small_images(model), torch.randint(VALUES, (2, 36))
    ids = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=VALUES)
    logits = model(input_ids=source, decoder_input_ids=ids).logits
    found = model(input_ids=source, labels=targets)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(logits.transpose(1, 2), targets))
    torch.testing.assert_close(found.logits, logits)


@pytest.mark.parametrize("large", [False, True])
@every_output
def test_recomputation_changes_no_gradient(output, large):
    model = tiny_model(output, "both", implementation="block_sparse", large=large, resid_dropout=0.3).train()
    inputs = {"labels": torch.randint(VALUES, (2, 36)), "input_ids": small_images(model) if large else image_ids(model)}
    torch.manual_seed(3)
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    for name, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name])


@every_output
def test_stock_trainer_takes_steps(output, tmp_path):
    model = tiny_model(output, classes=CLASSES, implementation="block_sparse", resid_dropout=0.1)
    rows = [{"input_ids": row, "labels": row} for row in image_ids(model, batch=4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=True, report_to="none", eval_strategy="steps", eval_steps=2
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_stock_sequence_to_sequence_trainer_takes_steps_and_generates(tmp_path):
    model = tiny_model(large=True, implementation="block_sparse")
    targets = torch.randint(VALUES, (4, 36))
    rows = [{"input_ids": source, "labels": row} for source, row in zip(small_images(model, 4), targets)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        predict_with_generate=True,
        generation_max_length=37,
        save_strategy="no",
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.predict(rows).predictions.shape == (4, 37)


def test_another_number_of_classes(tmp_path):
    """The trunk is kept; the tables with a row for each id start anew, or are resized and keep the values' rows."""
    model = tiny_model(classes=CLASSES)
    model.save_pretrained(tmp_path)
    fields = {"num_classes": 5, "vocab_size": VALUES + 5}
    with pytest.raises(Exception, match=r"vocab_size=8 is too small: .* num_classes=5 need 10 ids"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_classes=5)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)
    for name, weight in tuned.model.layers.state_dict().items():
        assert torch.equal(weight, model.model.layers.state_dict()[name])
    ids = image_ids(tuned)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    Trainer(tuned, arguments, train_dataset=rows).train()

    resized = AutoModelForCausalLM.from_pretrained(tmp_path)
    resized.resize_token_embeddings(VALUES + 5, mean_resizing=False)
    torch.testing.assert_close(
        resized.get_input_embeddings().weight[:8], model.get_input_embeddings().weight, rtol=0, atol=0
    )


# Saving, loading, compiling


@every_output
def test_saved_models_load_by_the_auto_classes(output, tmp_path):
    residual = output == "logistic_mixture"
    for large, auto_class in ((False, AutoModelForCausalLM), (True, AutoModelForSeq2SeqLM)):
        fields = {"coordinates": "learned", "predict_residual": large and residual}
        model, folder = tiny_model(output, large=large, **fields), tmp_path / str(large)
        model.save_pretrained(folder)
        loaded, report = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is type(model)
        assert not any(report.values())
        assert loaded.config._attn_implementation == "block_sparse"
        ids = image_ids(model)
        inputs = {"input_ids": small_images(model), "decoder_input_ids": ids} if large else {"input_ids": ids}
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "False"), ImageTransformerModel)


def test_embeddings_may_be_tied_for_grey_images(tmp_path):
    for large in (False, True):
        model = tiny_model(large=large, num_channels=1, tie_word_embeddings=True)
        model.tie_weights()
        model.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
        assert sum("embed_tokens" in name or name == "lm_head.weight" for name in names) == 1


@every_output
def test_compiles_into_one_graph(output):
    model = tiny_model(output, "both", implementation="sdpa")
    ids = image_ids(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@every_output
def test_exports(output):
    model = tiny_model(output, classes=CLASSES, implementation="sdpa")
    ids = image_ids(model)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    torch.testing.assert_close(program(ids, use_cache=False).logits, model(ids).logits)


def test_number_of_parameters():
    """Section 5.1's models have no biases in attention; rows of the table hold a vector for each channel."""
    d, ff, width, layers, ids, channels = 8, 12, 12, 2, VALUES + 1, 3
    block = 4 * d * width + (d + 1) * ff + (ff + 1) * d + 4 * d
    assert tiny_model().num_parameters() == ids * channels * d + layers * block + (d + 1) * ids
    start, pixel, mixture = d, (channels + 1) * d, d * 3 * 10
    assert tiny_model("logistic_mixture").num_parameters() == start + pixel + layers * block + mixture


def test_pixels_are_embedded_by_bends_all_over_the_range():
    """Along the grey pixels from black, -1, to white, 1."""
    embedding = ImageTransformerForCausalLM(tiny_config("logistic_mixture", hidden_size=400)).model.embedding
    layer = embedding.embed_values
    bends = -layer.bias / layer.weight.sum(dim=1)
    for low, high in ((-1, -0.5), (-0.5, 0), (0, 0.5), (0.5, 1)):
        assert ((low < bends) & (bends < high)).sum() > 20
    assert layer.weight.abs().max() <= 3**-0.5


def test_keys_of_small_images_begin_as_queries(tmp_path):
    model = ImageTransformerForSuperResolution(tiny_config())
    for layer in model.model.layers:
        assert torch.equal(layer.cross_attn.k_proj.weight, layer.cross_attn.q_proj.weight)
        assert not torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)
        nn.init.normal_(layer.cross_attn.k_proj.weight)
    model.save_pretrained(tmp_path)
    loaded = ImageTransformerForSuperResolution.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_weights_are_those_of_the_processors_order():
    """What the processor puts at position t is what the model takes it for."""
    processor = ImageTokenProcessor(3, 4, 3, levels=VALUES, order="blocks", block=[2, 3])
    values = torch.arange(36).reshape(3, 4, 3) % VALUES
    ids = processor(values)["input_ids"][0, 1:]
    places = tiny_model().model.coordinates.order.place(torch.arange(36))
    assert torch.equal(torch.as_tensor(ids), values[places[0], places[1], torch.arange(36) % 3])


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 0}, "num_channels must be at least 1, got 0"),
        ({"image_size": [3]}, r"image_size must be a height and a width of at least 1, got \[3\]"),
        ({"image_size": 1}, r"image_size=\[1, 1\] is smaller than a block of \[2, 3\] pixels"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"vocab_size": 4, "num_values": 5}, "vocab_size=4 is too small: num_values=5 and num_classes=0 need 6 ids"),
        ({"output": "logistic_mixtures"}, "did you mean 'logistic_mixture'"),
        ({"coordinates": "sines"}, "coordinates='sines' is unknown"),
        ({"hidden_size": 10}, "hidden_size must be a multiple of 4"),
        ({"hidden_size": 12, "num_attention_heads": 5, "head_dim": None}, "not a multiple of num_attention_heads=5"),
        ({"output": "logistic_mixture", "vocab_size": 2}, "needs num_values of at least 2, got 1"),
        ({"predict_residual": True}, "predict_residual=True needs output='logistic_mixture', got output='categorical'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings needs output='categorical' and num_channels=1"),
        ({"attention_patterns": [BLOCKS, BLOCKS | {"width": 2}]}, "blocks of 2x3 and 2x2 pixels"),
        ({"attention_patterns": {"type": "block_2d", "height": 2}}, "'block_2d' needs 'width'"),
        ({"attention_patterns": BLOCKS | {"height": 0}}, "Block2D.height must be an integer of at least 1, got 0"),
        ({"attention_patterns": BLOCKS | {"grid": [3, 4, 3]}}, "holds a grid"),
        ({"attention_patterns": {"type": "window_2d", "size": 2}}, "use 'block_2d'"),
        ({"layer_types": ["full_attention"] * 2}, "attention_patterns"),
        ({"resid_dropout": 1.0}, "resid_dropout must be at least 0 and below 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(Exception, match=rf"(?s){message}"):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("output", "inputs", "message"),
    [
        ("categorical", {}, "exactly one of input_ids and inputs_embeds"),
        ("categorical", {"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"input_ids is empty: got shape \[0, 4\]"),
        ("categorical", {"input_ids": torch.full((1, 4), 6)}, r"input_ids must lie in \[0, 5\] \(vocab_size=6\)"),
        ("logistic_mixture", {"input_ids": torch.full((1, 4), -1)}, r"input_ids must lie in \[0, 5\]"),
        ("categorical", {"input_ids": torch.zeros(1, 4)}, "input_ids must be of dtype"),
        ("categorical", {"input_ids": torch.zeros(1, 37, dtype=torch.long)}, "has 36 positions"),
        ("logistic_mixture", {"input_ids": torch.zeros(1, 37, dtype=torch.long)}, "has 36 positions"),
        ("categorical", {"inputs_embeds": torch.zeros(1, 4, 9)}, r"got \[1, 4, 9\]"),
        ("logistic_mixture", {"inputs_embeds": torch.zeros(1, 4, 8)}, "give input_ids, not inputs_embeds"),
        (
            "logistic_mixture",
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
            "takes no padding",
        ),
        (
            "logistic_mixture",
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": torch.arange(1, 5)[None]},
            "takes no position_ids of its own",
        ),
        (
            "logistic_mixture",
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "shift_labels": torch.full((1, 4), 5)},
            r"labels must lie in \[0, 4\]",
        ),
        (
            "categorical",
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.full((1, 4), 6)},
            r"labels must lie in \[0, 5\]",
        ),
        (
            "categorical",
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "encoder_hidden_states": torch.zeros(1, 2, 8)},
            "to a decoder with cross-attention, and to no other",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(output, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(output)(**inputs)


def test_sources_that_do_not_fit_are_refused():
    model = tiny_model(large=True)
    targets = torch.zeros(1, 36, dtype=torch.long)
    for inputs, message in (
        ({"labels": targets}, "Give input_ids, the values of the image to enlarge"),
        ({"input_ids": small_images(model, 1)}, "Give decoder_input_ids, or labels"),
        ({"input_ids": torch.zeros(1, 9, dtype=torch.long), "labels": targets}, "has 6 positions"),
        ({"input_ids": torch.full((1, 6), 9), "labels": targets}, r"must lie in \[0, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)


def test_sources_of_whole_pixels_are_whole():
    model = tiny_model("logistic_mixture", large=True)
    targets, source = torch.zeros(1, 36, dtype=torch.long), small_images(model, 1)
    padded = torch.ones_like(source).index_fill(1, torch.tensor([5]), 0)
    for inputs, message in (
        ({"input_ids": source[:, :4]}, r"whole pixels of 3 values, got shape \[1, 4\]"),
        ({"input_ids": torch.cat([source, source], dim=1)}, "has 2 positions"),
        ({"input_ids": source, "attention_mask": padded}, "takes no padding"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, labels=targets)


def test_residuals_need_the_enlarged_image():
    model = tiny_model("logistic_mixture", large=True, predict_residual=True)
    targets, source = torch.zeros(1, 36, dtype=torch.long), small_images(model, 1)
    with pytest.raises(ValueError, match=r"whole images of \[2, 1\] pixels; input_ids hold 1"):
        model(input_ids=source[:, :3], labels=targets)
    with pytest.raises(ValueError, match="or with encoder_outputs as its encoder returned them"):
        model(encoder_outputs=BaseModelOutput(model.encoder(source)[0]), labels=targets)
    with pytest.raises(ValueError, match="use ImageTransformerForSuperResolution"):
        ImageTransformerForCausalLM(model.config)
    plain = ImageTransformerModel(tiny_config("logistic_mixture"))
    with pytest.raises(ValueError, match="enlarged is for models with predict_residual=True"):
        plain(targets, enlarged=torch.zeros(1, 12, 3))


def test_a_past_without_its_class_is_refused():
    model = tiny_model(classes=CLASSES)
    cache, ids = DynamicCache(), image_ids(model)
    model(ids[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values that an earlier call returned"):
        model(ids[:, 3:4], past_key_values=cache)


def test_dropout_of_weights_needs_a_backend_that_has_it():
    model = tiny_model(implementation="block_sparse", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="use 'eager' or 'sdpa'"):
        model(image_ids(model))
    tiny_model(implementation="eager", attention_dropout=0.1).train()(image_ids(model))


def test_an_implementation_that_cannot_run_patterns_is_refused():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot run attention patterns; use .*'eager'"):
        model(image_ids(model))


@pytest.mark.parametrize("head", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("classes", [0, 4])
def test_values_and_start_tokens_keep_their_ids(head, classes, tmp_path):
    """A vocabulary below them could be saved, and not be loaded again."""
    model = tiny_models.tiny_model("image_transformer", head, num_classes=classes)
    needed = model.config.vocab_size
    with pytest.raises(ValueError, match=f"new_num_tokens={needed - 1} is too small: num_values=.* need {needed} ids"):
        model.resize_token_embeddings(needed - 1)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == needed
    model.resize_token_embeddings(needed + 3)
    model.save_pretrained(tmp_path)
    assert head.from_pretrained(tmp_path).config.vocab_size == needed + 3


def test_an_image_to_enlarge_is_given_by_its_values():
    model = tiny_models.tiny_model("image_transformer", AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model.generate(inputs_embeds=torch.randn(1, 4, model.config.hidden_size), max_new_tokens=2)
