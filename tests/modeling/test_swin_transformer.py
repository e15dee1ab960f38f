"""The Swin Transformer: against its paper as loops, against Transformers' Swin, and what both leave to the user."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification, SwinForMaskedImageModeling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_tfamily.modeling.attention import eager_attention_forward
from hf_tfamily.modeling.attention_patterns import Window2D
from hf_tfamily.modeling.configuration_swin_transformer import SwinTransformerConfig
from hf_tfamily.modeling.modeling_swin_transformer import (
    SwinTransformerBackbone,
    SwinTransformerForImageClassification,
    SwinTransformerForMaskedImageModeling,
    SwinTransformerModel,
    window_layout,
)
from tests.reference import swin_transformer as reference
from tests.tiny_models import SMALL_SWIN

BACKENDS = ("eager", "sdpa", "block_sparse")
SMALL = {**SMALL_SWIN, "image_size": 32, "num_labels": 5}


def build(model_class, config_class=SwinTransformerConfig, backend="eager", **changes):
    """A model in evaluation mode whose every weight matters: none is 0 or 1."""
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**{**SMALL, **changes}), attn_implementation=backend).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def pictures(height=32, width=32, batch_size=2, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch_size, 3, height, width, dtype=dtype)


def gradients(model, *inputs, **keywords):
    model.zero_grad()
    outputs = model(*inputs, **keywords)
    loss = outputs.loss if outputs.get("loss") is not None else sum(m.square().mean() for m in outputs.feature_maps)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict, expected: dict, **tolerances):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# ---------------------------------------------------------------------------------------------------------------------
# The paper


@pytest.mark.parametrize(
    ("height", "width"),
    [(12, 12), (14, 10), (6, 16), (4, 4)],
    ids=["even", "padded", "a side of one window", "smaller than a window"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_paper_as_loops(backend, height, width):
    model = build(SwinTransformerForImageClassification, backend=backend).double()
    pixels = pictures(height, width, dtype=torch.float64)
    with torch.no_grad():
        found = model(pixels).logits
        expected = torch.stack([reference.logits(model.state_dict(), model.config, picture) for picture in pixels])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_shifting_can_be_left_out():
    """The ablation of table 4: two blocks without a shift never tell a window of its neighbours."""
    pixels = pictures(12, 12)
    changed = pixels.clone()
    changed[..., :6] += 1  # columns of the left windows

    def right_half(model):
        maps = model(pixels, output_hidden_states=True), model(changed, output_hidden_states=True)
        return [m.reshaped_hidden_states[1][..., 3:] for m in maps]

    for shifted in (True, False):
        model = build(SwinTransformerModel, depths=[2], num_heads=[1], shifted_windows=shifted)
        first, second = right_half(model)
        assert torch.equal(first, second) != shifted


@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (4, 9), (2, 3)])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("fit", [True, False])
def test_layouts_show_what_the_pattern_does(grid, shift, fit):
    """Tokens see each other in the layout just where the pattern says so; both directions are inverse."""
    pattern = Window2D(3, shift)
    layout = window_layout(pattern, grid, "cpu", fit)
    tokens = grid[0] * grid[1]
    states = torch.arange(1.0, tokens + 1).view(1, tokens, 1)
    windows = layout.partition(states)
    assert torch.equal(layout.reverse(windows), states)

    seen = torch.zeros(tokens + 1, tokens + 1, dtype=torch.bool)  # row and column 0 are padding
    mask = layout.mask if layout.mask is not None else torch.ones(len(windows), *[windows.shape[1]] * 2).bool()
    for window, shown in zip(windows[..., 0].long(), mask):
        seen[window[:, None], window] |= shown
    if fit and min(grid) <= 3:
        pattern = Window2D(3)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert torch.equal(seen[1:, 1:], pattern.bind(grid).visible(0, query, key))


def test_layouts_pass_gradients_of_gradients():
    layout = window_layout(Window2D(3, 1), (4, 5), "cpu", fit=False)
    states = torch.randn(1, 20, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layout.reverse(layout.partition(x).sin() ** 2), states)


@pytest.mark.parametrize(
    ("fields", "parameters", "multiply_adds"),
    [
        ({}, 28_288_354, 4.5),
        ({"depths": [2, 2, 18, 2]}, 49_606_258, 8.7),
        ({"embed_dim": 128, "depths": [2, 2, 18, 2]}, 87_768_224, 15.4),
        ({"embed_dim": 192, "depths": [2, 2, 18, 2]}, 196_532_476, None),
    ],
    ids=["tiny", "small", "base", "large"],
)
def test_sizes_are_the_papers(fields, parameters, multiply_adds):
    """Table 1: 28, 50, 88 and 197 million parameters, 4.5, 8.7 and 15.4 G multiply-adds at 224 x 224."""
    with torch.device("meta"):
        model = SwinTransformerForImageClassification(SwinTransformerConfig(num_labels=1000, **fields))
        assert model.num_parameters() == parameters
        if multiply_adds is None:
            return
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.06)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counters_see_every_product(backend):
    """On a CPU as well, forward and backward: as many FLOPs as stock Swin."""
    totals = []
    for model in (
        build(SwinTransformerForImageClassification, backend=backend),
        build(SwinForImageClassification, SwinConfig),
    ):
        with FlopCounterMode(display=False) as counter:
            model(pictures(32, 32)).logits.sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("backend", ["eager", "block_sparse"])
@pytest.mark.parametrize("functional", [True, False], ids=["torch.func", "autograd"])
def test_second_derivatives(backend, functional):
    """Gradients of gradients, either way, are those of differences of gradients."""
    model = build(SwinTransformerForImageClassification, backend=backend).double()
    pixels = pictures(10, 12).double()

    def loss(pixels):
        return model(pixels).logits.square().sum()

    def gradient(pixels):
        pixels = pixels.detach().requires_grad_()
        return torch.autograd.grad(loss(pixels), pixels)[0]

    torch.manual_seed(2)
    along = torch.randn_like(pixels)
    if functional:
        found = torch.func.vjp(torch.func.grad(loss), pixels)[1](along)[0].detach()
    else:
        leaf = pixels.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (found,) = torch.autograd.grad(first, leaf, along)
    step = 1e-5 * along  # second derivatives are symmetric
    expected = (gradient(pixels + step) - gradient(pixels - step)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["eager", "block_sparse"])
def test_gradients_of_each_picture_at_once(backend):
    """torch.func goes through the model: as many gradients as pictures, each as if alone."""
    model = build(SwinTransformerForImageClassification, backend=backend).double()
    weights, pixels = dict(model.named_parameters()), pictures(25, 45).double()

    def loss(weights, picture):
        return torch.func.functional_call(model, weights, (picture[None],)).logits.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, pixels)
    for number, picture in enumerate(pixels):
        model.zero_grad()
        model(picture[None]).logits.square().sum().backward()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name][number], weight.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Transformers' Swin


@pytest.mark.parametrize("size", [(32, 32), (30, 38), (25, 45)], ids=["square", "padded", "odd"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stock_backend", ["eager", "sdpa"])
def test_equals_stock_swin_in_logits_and_gradients(stock_backend, backend, size):
    stock = build(SwinForImageClassification, SwinConfig, stock_backend)
    model = build(SwinTransformerForImageClassification, backend=backend)
    model.load_state_dict(stock.state_dict())
    pixels, labels = pictures(*size), torch.tensor([0, 3])
    torch.testing.assert_close(model(pixels).logits, stock(pixels).logits, rtol=1e-5, atol=1e-5)
    expected = gradients(stock, pixels, labels=labels)
    assert_same(gradients(model, pixels, labels=labels), expected, rtol=1e-5, atol=1e-5)


def test_states_and_weights_are_stock_swins():
    stock = build(SwinForImageClassification, SwinConfig)
    model = build(SwinTransformerForImageClassification)
    model.load_state_dict(stock.state_dict())
    outputs = (m(pictures(), output_hidden_states=True, output_attentions=True) for m in (model, stock))
    for found, expected in zip(*(o.hidden_states + o.reshaped_hidden_states + o.attentions for o in outputs)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(32, 32), (26, 22), (8, 12)])
def test_backbone_equals_stock(backend, size):
    """Also where the grid of a stage is smaller than a window, which stock shifts and pads in its backbone only."""
    stages = {"out_features": ["stem", "stage2"]}
    stock = build(SwinBackbone, SwinConfig, **stages)
    model = build(SwinTransformerBackbone, backend=backend, **stages)
    model.load_state_dict(stock.state_dict())
    pixels = pictures(*size)
    for found, expected in zip(model(pixels).feature_maps, stock(pixels).feature_maps):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.channels == [8, 16]
    assert_same(gradients(model, pixels), gradients(stock, pixels), rtol=1e-4, atol=1e-5)


def test_masked_image_modelling_equals_stock():
    stock = build(SwinForMaskedImageModeling, SwinConfig)
    model = build(SwinTransformerForMaskedImageModeling)
    model.load_state_dict(stock.state_dict())
    mask = torch.rand(2, 256) > 0.5
    found, expected = model(pictures(), mask), stock(pictures(), mask)
    torch.testing.assert_close(found.reconstruction, expected.reconstruction)
    torch.testing.assert_close(found.loss, expected.loss)


def test_masked_image_modelling_takes_any_size():
    """Stock needs square pictures of the config's size."""
    model = build(SwinTransformerForMaskedImageModeling)
    outputs = model(pictures(21, 30), torch.arange(2 * 11 * 15).view(2, -1) % 3 == 0)
    assert outputs.reconstruction.shape == (2, 3, 21, 30)
    assert outputs.loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "block_sparse"])
@pytest.mark.parametrize("training", [False, True])
def test_backends_are_as_near_to_float64_as_eager(backend, dtype, training):
    pixels, labels = pictures(22, 34, dtype=dtype), torch.tensor([0, 3])
    errors = {}
    model = build(SwinTransformerForImageClassification).to(dtype)
    exact = build(SwinTransformerForImageClassification).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = exact(pixels.double()).logits
    expected = gradients(exact, pixels.double(), labels=labels)
    for name in ("eager", backend):
        model.set_attn_implementation(name)
        if training:
            found = gradients(model, pixels, labels=labels)
            errors[name] = max((found[key].double() - expected[key]).abs().max() for key in expected)
        else:
            with torch.no_grad():
                errors[name] = (model(pixels).logits.double() - logits).abs().max()
    scale = max(g.abs().max() for g in expected.values()) if training else logits.abs().max()
    assert errors[backend] <= 2 * errors["eager"] + 8 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
def test_backends_without_a_bias_are_refused(backend):
    with pytest.raises(ValueError, match="use 'block_sparse', 'sdpa' or 'eager'"):
        build(SwinTransformerModel, backend=backend)
    with pytest.raises(ValueError, match="use 'block_sparse', 'sdpa' or 'eager'"):
        build(SwinTransformerModel).set_attn_implementation(backend)


def test_weights_are_eagers_alone():
    with pytest.raises(ValueError, match="output_attentions; use 'eager'"):
        build(SwinTransformerModel, backend="block_sparse")(pictures(), output_attentions=True)


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_every_layer_is_called_once_through_its_hooks(backend, qkv_bias):
    """As tools that prune, adapt or measure layers want it; nothing is computed beside them."""
    model = build(SwinTransformerForImageClassification, backend=backend, qkv_bias=qkv_bias).double()
    pixels, labels = pictures(dtype=torch.float64), torch.tensor([0, 1])
    expected = gradients(model, pixels, labels=labels)
    calls = []
    for name, layer in linear_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: calls.append(name))
        layer.register_forward_hook(lambda layer, inputs, output, name=name: calls.append(name))
        layer.register_full_backward_hook(lambda layer, inputs, outputs, name=name: calls.append(name))
    hooked = gradients(model, pixels, labels=labels)
    assert sorted(calls) == sorted(3 * list(linear_layers(model)))
    assert len(linear_layers(model)) == 6 * sum(model.config.depths) + 2  # and merging, and the classifier
    assert_same(hooked, expected, rtol=1e-9, atol=1e-12)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, pixels, labels=labels), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_layer_returns_is_what_is_used(backend):
    """Each layer's own output, changed by a hook, changes the logits."""
    model = build(SwinTransformerForImageClassification, backend=backend)
    with torch.no_grad():
        before = model(pictures()).logits
        for name, layer in linear_layers(model).items():
            shift = torch.linspace(-1, 1, layer.out_features)
            handle = layer.register_forward_hook(lambda layer, inputs, output, shift=shift: output * (1 + shift))
            assert not torch.allclose(model(pictures()).logits, before), name
            handle.remove()


class Int8Linear(torch.nn.Module):
    """Stands for what quantises weights: another class in the place of a layer, whose weight is no float."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((layer.weight.detach() / self.scale).round().char(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_can_be_quantised(backend):
    model = build(SwinTransformerForImageClassification, backend=backend)
    rounded = build(SwinTransformerForImageClassification, backend="eager")
    for name, layer in list(linear_layers(model).items()):
        model.set_submodule(name, Int8Linear(layer))
        rounded.get_submodule(name).weight.data = model.get_submodule(name).weight * model.get_submodule(name).scale
    with torch.no_grad():
        torch.testing.assert_close(model(pictures()).logits, rounded(pictures()).logits, rtol=1e-5, atol=1e-5)
    model(pictures()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", ["_proj", "fc1", "_bias_table", "layernorm"])
def test_frozen_weights_get_no_gradient(backend, trained):
    """And those that are trained get the same as if all were."""
    model = build(SwinTransformerForImageClassification, backend=backend)
    labels = torch.tensor([0, 3])
    expected = gradients(model, pictures(22, 30), labels=labels)
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    found = gradients(model, pictures(22, 30), labels=labels)
    expected = {name: gradient for name, gradient in expected.items() if trained in name}
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts(backend):
    """Logits in bfloat16 as near as a model of bfloat16 is, gradients in float32."""
    model = build(SwinTransformerForImageClassification, backend=backend)
    with torch.no_grad():
        exact = model(pictures()).logits
        model.to(torch.bfloat16)
        low = model(pictures(dtype=torch.bfloat16)).logits
    model = build(SwinTransformerForImageClassification, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(pictures()).logits
        with torch.no_grad():
            torch.testing.assert_close(model(pictures()).logits, logits, rtol=0.1, atol=0.1)
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).abs().max() <= 2 * (low - exact).abs().max() + 0.01 * exact.abs().max()
    logits.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_projections_may_differ():
    """One without a bias, say."""
    model = build(SwinTransformerForImageClassification, backend="block_sparse").double()
    for module in model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.bias = None
    found = gradients(model, pictures(dtype=torch.float64), labels=torch.tensor([0, 1]))
    model.set_attn_implementation("eager")
    assert_same(
        found, gradients(model, pictures(dtype=torch.float64), labels=torch.tensor([0, 1])), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_registered_function_attends(backend, monkeypatch):
    """Whatever stands under the name serves the model: nothing is called past the registry."""
    model = build(SwinTransformerForImageClassification)
    calls, original = [], ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)

    def attend(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, kwargs["position_bias"].shape))
        return original(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", lambda self, name, default: attend)
    model.set_attn_implementation(backend)
    with torch.no_grad():
        model(pictures(24, 24))
    assert [shape for _, shape in calls] == [(1, heads, 9, 9) for heads in (1, 1, 2, 2)]
    masks = [mask for mask, _ in calls]
    if backend == "block_sparse":
        assert [mask.pattern for mask in masks] == 2 * [Window2D(3), Window2D(3, 1)]
        assert [(mask.batch_size, mask.num_heads, mask.key_length) for mask in masks[1:3]] == [(32, 1, 9), (8, 2, 9)]
        masks = [mask.extra for mask in masks]
        assert [mask is None for mask in masks] == [True, False, True, False]
        assert masks[1].shape == (16, 1, 9, 9)
    else:
        assert [mask is None for mask in masks] == [True, False, True, False]
        assert masks[1].shape == (32, 1, 9, 9)


def test_block_sparse_is_the_default():
    assert SwinTransformerModel(SwinTransformerConfig(**SMALL)).config._attn_implementation == "block_sparse"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_and_stochastic_depth_act_in_training_alone(backend):
    rates = {"drop_path_rate": 0.5, "attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2}
    model = build(SwinTransformerForImageClassification, backend=backend, **rates)
    pixels = pictures()
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_stochastic_depth_leaves_out_whole_branches():
    model = build(SwinTransformerModel, depths=[3], num_heads=[1], drop_path_rate=0.5)
    drop_paths = [block.drop_path for block in model.encoder.layers[0].blocks]
    assert [path.rate for path in drop_paths] == [0.0, 0.25, 0.5]
    branch = torch.ones(400, 2, 3)
    dropped = drop_paths[2].train()(branch)
    assert set(dropped.flatten(1).unique(dim=0).flatten().tolist()) == {0.0, 2.0}
    assert dropped.mean() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend):
    model = build(SwinTransformerForImageClassification, backend=backend)
    program = torch.export.export(model, (pictures(20, 24),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "hf_tfamily" in name]  # others can run it
    exported = program.module()
    torch.testing.assert_close(exported(pictures(20, 24)).logits, model(pictures(20, 24)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    model = build(SwinTransformerForImageClassification, backend=backend)
    compiled = torch.compile(model, fullgraph=True)
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures(20, 24)).logits, model(pictures(20, 24)).logits)
    expected = gradients(model, pictures(20, 24), labels=labels)
    assert_same(gradients(compiled._orig_mod, pictures(20, 24), labels=labels), expected)
    found = gradients(compiled, pictures(20, 24), labels=labels)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Other sizes of pictures and windows


def test_absolute_embeddings_are_resized_on_request_only():
    model = build(SwinTransformerModel, use_absolute_embeddings=True)
    assert model(pictures()).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"grid of \(16, 16\).*got \(8, 12\); use interpolate_pos_encoding=True"):
        model(pictures(16, 24))
    assert model(pictures(16, 24), interpolate_pos_encoding=True).last_hidden_state.shape == (2, 4 * 6, 16)


def test_resized_windows_keep_what_they_have_learned():
    """A table that grows with the columns still does, from the same number to its opposite."""
    model = build(SwinTransformerModel)
    bias = model.encoder.layers[0].blocks[0].attention.relative_position_bias
    ramp = torch.linspace(-1, 1, 5).expand(5, 5)  # grows with the columns
    bias.relative_position_bias_table.data = ramp.reshape(-1, 1).clone()
    model.resize_windows(5)
    table = bias.relative_position_bias_table.detach().view(9, 9)
    torch.testing.assert_close(table, table[:1].expand(9, 9))  # rows stay alike
    torch.testing.assert_close(table, -table.flip(1))
    assert (table.diff(dim=1) > 0).all()
    assert model.config.window_size == 5
    assert [block.pattern for block in model.encoder.layers[0].blocks] == [Window2D(5), Window2D(5, 2)]


def test_resized_windows_save_and_load(tmp_path):
    model = build(SwinTransformerModel)
    model.resize_windows(4)
    model.save_pretrained(tmp_path)
    loaded = SwinTransformerModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(loaded(pictures()).last_hidden_state, model(pictures()).last_hidden_state)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "Give pixel_values"),
        (torch.zeros(3, 32, 32), r"\[batch, channels, height, width\], got \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), r"num_channels=3 channels, got 1"),
        (torch.zeros(0, 3, 32, 32), r"empty batch"),
        (torch.zeros(1, 3, 32, 1), r"at least one patch of patch_size=\(2, 2\) in size, got 32 x 1"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"floating point, got torch.uint8; an image processor"),
    ],
)
def test_bad_pictures_are_refused_by_name(pixels, message):
    with pytest.raises(ValueError, match=message):
        build(SwinTransformerModel)(pixels)


def test_bad_labels_and_masks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\] \(num_labels=5\), got \[5\]"):
        build(SwinTransformerForImageClassification)(pictures(), labels=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"bool_masked_pos .* \[2, 256\], got \[2, 255\]"):
        build(SwinTransformerForMaskedImageModeling)(pictures(), torch.zeros(2, 255).bool())
    with pytest.raises(ValueError, match="needs a mask token"):
        build(SwinTransformerModel)(pictures(), torch.zeros(2, 256).bool())
    with pytest.raises(ValueError, match=r"4 x 4 pixels, so encoder_stride must be 4, .* got 8"):
        build(SwinTransformerForMaskedImageModeling, encoder_stride=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"num_heads": [3, 6]}, r"num_heads=\[3, 6\] must divide the widths of the stages, \[8, 16\]"),
        ({"num_heads": [1]}, r"num_heads=\[1\] must have one entry for each stage of depths=\[2, 2\]"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"hidden_act": "gleu"}, "'gleu' is unknown; did you mean 'gelu'"),
        ({"patch_size": [2, 2, 2]}, "patch_size must be one or two numbers"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SwinTransformerConfig(**{**SMALL, **fields})


def test_sizes_that_disagree_are_refused_by_name():
    with pytest.raises(ValueError, match=r"hidden_size=20 is the width of the last of 2 stages"):
        SwinTransformerConfig(**SMALL, hidden_size=20)
    with pytest.raises(ValueError, match=r"num_hidden_layers=3 counts the stages"):
        SwinTransformerConfig(**SMALL, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"depths must list"):
        SwinTransformerConfig(depths=[2, 0])


def test_shrinks_like_any_other_model():
    config = SwinTransformerConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    assert (config.embed_dim, config.depths, config.num_heads) == (16, [2, 2, 2], [1, 2, 4])
    assert SwinTransformerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert math.prod(config.stage_widths) == 16 * 32 * 64
