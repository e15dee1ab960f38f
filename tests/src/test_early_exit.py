"""Depth that each token chooses: the slow definition, caches, rows of a batch, what is refused, training."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_tfamily import Local
from hf_tfamily.early_exit import MEASURES, early_exit, logits_of, loss_of_all_exits
from tests.tiny_models import tiny_model

LAYERS = 4
LOCAL = {"attention_patterns": Local(4).to_dict()}
STOCK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DECODERS = {
    "rope_decoder": lambda: tiny_model("rope_decoder", AutoModelForCausalLM, num_hidden_layers=LAYERS),
    "rope_decoder, local": lambda: tiny_model("rope_decoder", AutoModelForCausalLM, num_hidden_layers=LAYERS, **LOCAL),
    "sparse_transformer": lambda: tiny_model("sparse_transformer", AutoModelForCausalLM, num_hidden_layers=LAYERS),
    "vanilla_transformer": lambda: tiny_model(
        "vanilla_transformer", AutoModelForCausalLM, decoder_layers=LAYERS, dropout=0.0
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**STOCK)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**STOCK, sliding_window=5)),
}
each_decoder = pytest.mark.parametrize("name", DECODERS)
each_measure = pytest.mark.parametrize("measure", MEASURES)
GREEDY = {"max_new_tokens": 9, "eos_token_id": -1, "do_sample": False, "pad_token_id": 0}


def lively(name):
    """A model whose tokens leave after different layers."""
    torch.manual_seed(0)
    model = DECODERS[name]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def ids(*shape):
    return torch.randint(1, 90, shape)


class WithoutACache:
    """One row, by what the definition says: every layer reads what it was given for earlier tokens, which for one that
    had left is the state it left with."""

    def __init__(self, model, confidence, measure):
        self.model, self.confidence, self.measure = model, confidence, MEASURES[measure]
        self.layers = list(model.get_decoder().layers)
        self.given = [None] * len(self.layers)  # the states [1, T, hidden] that each layer was given so far
        self.left = None  # after how many layers the newest token left

    def generate(self, row, new):
        """Greedy tokens, and the layers that each took."""
        taken = []
        for step in range(new):
            self.left = None if step else len(self.layers)  # the prompt leaves nowhere before the end
            hooks = [layer.register_forward_pre_hook(partial(self.before, i)) for i, layer in enumerate(self.layers)]
            hooks += [layer.register_forward_hook(partial(self.after, i)) for i, layer in enumerate(self.layers)]
            logits = self.model(row, use_cache=False).logits
            for hook in hooks:
                hook.remove()
            if step:
                taken.append(self.left or len(self.layers))
            row = torch.cat([row, logits[:, -1:].argmax(dim=-1)], dim=1)
        return row, taken

    def before(self, index, layer, args):
        if self.given[index] is not None:
            args = (torch.cat([self.given[index], args[0][:, -1:]], dim=1), *args[1:])
        self.given[index] = args[0]
        return args

    def after(self, index, layer, args, output):
        newest = args[0][:, -1:]
        if self.left is not None and self.left <= index:
            return torch.cat([output[:, :-1], newest], dim=1)
        if self.left is None and index + 1 < len(self.layers):
            sure = self.measure(self.model, newest, output[:, -1:]) >= self.confidence
            self.left = index + 1 if sure else None
        return output


@each_decoder
@each_measure
@torch.no_grad()
def test_leaves_as_the_definition_says(name, measure):
    model, prompt = lively(name).double(), ids(1, 5)
    depths = set()
    for confidence in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 0.97, 1.1):
        expected, taken = WithoutACache(model, confidence, measure).generate(prompt, GREEDY["max_new_tokens"])
        with early_exit(model, confidence, measure) as exits:
            found = model.generate(prompt, **GREEDY)
        assert found.tolist() == expected.tolist()
        assert torch.cat(exits.layers).tolist() == taken
        assert exits.computed == taken  # of one row
        depths |= set(taken)
    assert {1, LAYERS} < depths, f"tokens left after {depths} layers only; weights are too alike for this test"


@each_decoder
@torch.no_grad()
def test_a_threshold_that_nobody_reaches_changes_nothing(name):
    model, prompt = lively(name), ids(2, 5)
    expected = model.generate(prompt, **GREEDY)
    with early_exit(model, 1.5) as exits:
        found = model.generate(prompt, **GREEDY)
    assert torch.equal(found, expected)
    assert exits.mean_layers == LAYERS
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    assert not any("forward" in layer.__dict__ for layer in model.get_decoder().layers)


@each_decoder
@torch.no_grad()
def test_rows_of_a_batch_do_not_matter_to_each_other(name):
    model, prompts = lively(name).double(), ids(4, 5)
    prompts[1] = prompts[0]
    with early_exit(model, 0.3) as together:
        found = model.generate(prompts, **GREEDY)
    for row in range(len(prompts)):
        with early_exit(model, 0.3) as alone:
            assert torch.equal(model.generate(prompts[row : row + 1], **GREEDY)[0], found[row])
        assert torch.cat(alone.layers).tolist() == [int(step[row]) for step in together.layers]


@torch.no_grad()
def test_beams_sampling_and_padding():
    model, prompt = lively("rope_decoder"), ids(2, 5)
    with early_exit(model, 0.2) as exits:
        model.generate(prompt, **GREEDY, num_beams=3)
        assert all(len(step) == 6 for step in exits.layers)
        alone = model.generate(prompt[:1], **GREEDY)
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), prompt[:1]], dim=1)
        mask = (padded != 0).long()
        assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 2:], alone)
    with early_exit(model, 0.2), pytest.raises(ValueError, match="already wrapped"):
        early_exit(model, 0.2).__enter__()


@torch.no_grad()
def test_a_decoder_beside_an_encoder():
    torch.manual_seed(0)
    model = tiny_model("vanilla_transformer", AutoModelForSeq2SeqLM, decoder_layers=LAYERS)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    source = ids(2, 7)
    expected = model.generate(source, **GREEDY)
    with early_exit(model, 1.5):
        assert torch.equal(model.generate(source, **GREEDY), expected)
    with early_exit(model, 0.0) as exits:
        model.generate(source, **GREEDY)
    assert exits.mean_layers == 1
    assert len(exits.layers) == GREEDY["max_new_tokens"] - 1  # the first goes through every layer


def test_the_cache_has_every_layer():
    model, prompt = lively("rope_decoder"), ids(1, 5)
    cache = DynamicCache()
    with early_exit(model, 0.0), torch.no_grad():
        model(prompt, past_key_values=cache)
        model(prompt[:, :1], past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [6] * LAYERS


@pytest.mark.parametrize("name", ["rope_decoder", "vanilla_transformer"])
def test_the_loss_of_all_exits(name):
    """The mean of what models of the first so many layers have."""
    model = lively(name).train()
    row = ids(2, 7)
    found = loss_of_all_exits(model, input_ids=row, labels=row)
    states = model(row, output_hidden_states=True).hidden_states[1:]
    losses = []
    for depth, state in enumerate(states, start=1):
        logits = model.lm_head(state) if depth == LAYERS else logits_of(model, state)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()))
    torch.testing.assert_close(found, torch.stack(losses).mean())
    found.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.get_decoder().layers.parameters())
    with pytest.raises(ValueError, match="needs labels"):
        loss_of_all_exits(model, input_ids=row)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: DECODERS["rope_decoder"](), {"confidence": -0.1}, "confidence must be at least 0, got -0.1"),
        (lambda: DECODERS["rope_decoder"](), {"confidence": float("nan")}, "confidence must be at least 0, got nan"),
        (lambda: DECODERS["rope_decoder"](), {"confidence": 1, "measure": "hope"}, "one of softmax, state, got 'hope'"),
        (lambda: DECODERS["rope_decoder"](), {"confidence": 1, "first": 0}, "first must be 1 to 4 layers, got 0"),
        (lambda: tiny_model("transformer_xl", AutoModelForCausalLM), {"confidence": 1}, "TransformerXLForCausalLM"),
        (lambda: tiny_model("xl_sparse", AutoModelForCausalLM), {"confidence": 1}, "XLSparseForCausalLM"),
        (lambda: tiny_model("image_transformer", AutoModelForCausalLM), {"confidence": 1}, "ImageTransformer"),
        (lambda: tiny_model("universal_transformer", AutoModelForCausalLM), {"confidence": 1}, "adaptive=True halts"),
        (lambda: tiny_model("rope_decoder", AutoModelForCausalLM, num_hidden_layers=1), {"confidence": 1}, "1 layer"),
    ],
)
def test_what_cannot_be_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message), early_exit(make(), **arguments):
        pass
