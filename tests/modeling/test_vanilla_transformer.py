"""Vanilla Transformer: the paper restated, torch.nn.Transformer, backends, padding, caches, generation, the loss."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    get_inverse_sqrt_schedule,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_tfamily.auto import register_all
from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.configuration_vanilla_transformer import POSITION_ENCODINGS, VanillaTransformerConfig
from hf_tfamily.modeling.modeling_vanilla_transformer import (
    VanillaTransformer,
    VanillaTransformerForCausalLM,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerModel,
)
from hf_tfamily.modeling.positions import POSITION_SCHEMES
from tests.reference.vanilla_transformer import noam_rate, smoothed_loss, vanilla_transformer

register_all()

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "max_relative_position": 3,
    "relative_attention_num_buckets": 4,
    "relative_attention_max_distance": 5,
    "dropout": 0.0,
}
PATTERNS = {
    "none": {},
    "both": {"attention_patterns": [{"type": "local", "window": 3}, {"type": "strided", "stride": 3}]},
    "encoder": {
        "attention_patterns": {"type": "local", "window": 3},
        "decoder_attention_patterns": {"type": "full"},
    },
    "heads": {
        "attention_patterns": {
            "type": "per_head",
            "patterns": [{"type": "local", "window": 3}, {"type": "fixed", "block": 4, "summary": 1}],
        }
    },
}
encodings = pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
patterns = pytest.mark.parametrize("pattern", PATTERNS)
norms = pytest.mark.parametrize("norm_first", [False, True])


def translator(encoding="sinusoidal", implementation="sdpa", model_class=None, **fields):
    """The same weights for the same fields, biases and norms too, large enough that every key matters."""
    torch.manual_seed(0)
    config = VanillaTransformerConfig(**{**TINY, "position_encoding": encoding, **fields})
    model_class = model_class or VanillaTransformerForConditionalGeneration
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for name, parameter in model.named_parameters():
        if "lm_head" not in name:
            parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model


def ids(*shape):
    return torch.randint(3, TINY["vocab_size"], shape)


def backends_of(encoding):
    scheme = POSITION_SCHEMES[encoding]
    engine = ("block_sparse",) if scheme.as_data or not scheme.biases_scores else ()
    return ("eager", "sdpa", "flex_attention", *engine)


def padded_batch():
    """Sources and targets of odd lengths, padded on either side."""
    batch = {"input_ids": ids(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 6:] = 0
    batch["decoder_input_ids"] = ids(3, 7)
    batch["decoder_attention_mask"] = torch.ones(3, 7, dtype=torch.long)
    batch["decoder_attention_mask"][0, :2] = 0
    batch["decoder_attention_mask"][2, 5:] = 0
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


@encodings
@norms
@torch.no_grad()
def test_equals_the_papers_restated(encoding, norm_first):
    model = translator(encoding, "eager", VanillaTransformerModel, norm_first=norm_first).double()
    source, target = ids(2, 6), ids(2, 5)
    found = model(source, decoder_input_ids=target).last_hidden_state
    for row in range(2):
        expected = vanilla_transformer(model, source[row], target[row])
        torch.testing.assert_close(found[row], expected, atol=1e-10, rtol=1e-10)


def torch_transformer(model, norm_first):
    """torch.nn.Transformer with the model's weights, without the norms by which it ends post-norm stacks too."""
    config = model.config
    stock = torch.nn.Transformer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.decoder_layers,
        config.intermediate_size,
        dropout=0.0,
        batch_first=True,
        norm_first=norm_first,
    )

    def copy_attention(theirs, ours):
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.data = torch.cat([p.weight for p in projections]).detach()
        theirs.in_proj_bias.data = torch.cat([p.bias for p in projections]).detach()
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())

    for theirs, ours in ((stock.encoder, model.encoder), (stock.decoder, model.decoder)):
        for there, here in zip(theirs.layers, ours.layers):
            copy_attention(there.self_attn, here.self_attn)
            there.norm1.load_state_dict(here.self_attn_residual.norm.state_dict())
            last = there.norm2
            if hasattr(there, "multihead_attn"):
                copy_attention(there.multihead_attn, here.cross_attn)
                there.norm2.load_state_dict(here.cross_attn_residual.norm.state_dict())
                last = there.norm3
            last.load_state_dict(here.mlp_residual.norm.state_dict())
            there.linear1.load_state_dict(here.mlp.up_proj.state_dict())
            there.linear2.load_state_dict(here.mlp.down_proj.state_dict())
        if norm_first:
            theirs.norm.load_state_dict(ours.norm.state_dict())
        else:
            theirs.norm = None
    return stock.eval()


@norms
@torch.no_grad()
def test_equals_torch_nn_transformer(norm_first):
    model = translator("none", model_class=VanillaTransformerModel, norm_first=norm_first, scale_embedding=False)
    source, target = torch.randn(2, 9, 32), torch.randn(2, 7, 32)
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    found = model(inputs_embeds=source, decoder_inputs_embeds=target, attention_mask=(~padding).long())
    causal = torch.nn.Transformer.generate_square_subsequent_mask(7)
    stock = torch_transformer(model, norm_first)
    expected = stock(source, target, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    torch.testing.assert_close(found.last_hidden_state, expected, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Backends and padding


@encodings
def test_backends_agree(encoding):
    batch = padded_batch()
    real = batch["decoder_attention_mask"].bool()
    expected = translator(encoding, "eager").double()(**batch).logits[real]
    allowed = 2 * (translator(encoding, "eager")(**batch).logits[real].double() - expected).abs().max() + 1e-5
    for implementation in backends_of(encoding):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found = translator(encoding, implementation)(**batch).logits
        assert found.isfinite().all()
        assert (found[real].double() - expected).abs().max() <= allowed, implementation


@patterns
@pytest.mark.parametrize("encoding", ["sinusoidal", "rotary", "relative", "transformer_xl", "alibi", "t5"])
@torch.no_grad()
def test_backends_agree_under_patterns(pattern, encoding):
    batch = padded_batch()
    real = batch["decoder_attention_mask"].bool()
    expected = translator(encoding, "eager", **PATTERNS[pattern]).double()(**batch).logits[real]
    if pattern != "none":
        assert not torch.allclose(expected, translator(encoding, "eager").double()(**batch).logits[real], atol=1e-2)
    for implementation in backends_of(encoding):
        with torch.compiler.set_stance("force_eager"):
            found = translator(encoding, implementation, **PATTERNS[pattern])(**batch).logits[real]
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4, msg=implementation)


@encodings
def test_gradients_agree_also_under_checkpointing(encoding):
    batch = padded_batch()
    batch["labels"] = ids(3, 7).masked_fill(batch["decoder_attention_mask"] == 0, -100)

    def gradients(implementation, checkpointing=False, dtype=torch.float32):
        model = translator(encoding, implementation).train().to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    expected, eager = gradients("eager", dtype=torch.float64), gradients("eager")
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if "k_proj.bias" not in name)
    others = [implementation for implementation in backends_of(encoding) if implementation != "flex_attention"]
    runs = [(name, False) for name in others[1:]] + [("sdpa", True)]
    for implementation, checkpointing in runs:
        for name, gradient in gradients(implementation, checkpointing).items():
            allowed = 2 * (eager[name] - expected[name]).abs().max() + 1e-6
            assert (gradient - expected[name]).abs().max() <= allowed, (implementation, name)


@encodings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(encoding, dtype):
    batch = padded_batch()
    real = batch["decoder_attention_mask"].bool()
    expected = translator(encoding, "eager").double()(**batch).logits[real]
    error = (translator(encoding, "eager").to(dtype)(**batch).logits[real].double() - expected).abs().max()
    for implementation in backends_of(encoding):
        with torch.compiler.set_stance("force_eager"):
            found = translator(encoding, implementation).to(dtype)(**batch).logits
        assert found.dtype == dtype
        assert (found[real].double() - expected).abs().max() <= 2 * error + torch.finfo(dtype).eps, implementation


@encodings
def test_mixed_precision(encoding):
    """Autocast mixes dtypes where a bias or a rotation is in float32; losses stay near and gradients flow."""
    batch = padded_batch()
    batch["labels"] = ids(3, 7).masked_fill(batch["decoder_attention_mask"] == 0, -100)
    for implementation in backends_of(encoding):
        if implementation == "flex_attention":  # has no backward on the CPU
            continue
        model = translator(encoding, implementation).train()
        expected = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(**batch).loss
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=0.02)
        assert all(parameter.grad is not None for parameter in model.parameters())


@encodings
@patterns
@torch.no_grad()
def test_padding_changes_no_real_token(encoding, pattern):
    model, source, target = translator(encoding, **PATTERNS[pattern]), ids(1, 6), ids(1, 5)
    alone = model(source, decoder_input_ids=target).logits
    for left, right in ((3, 0), (0, 4), (2, 1)):
        padded = {
            "input_ids": torch.nn.functional.pad(source, (left, right), value=1),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(source), (left, right)),
            "decoder_input_ids": torch.nn.functional.pad(target, (left, right), value=1),
            "decoder_attention_mask": torch.nn.functional.pad(torch.ones_like(target), (left, right)),
        }
        found = model(**padded).logits[:, left : left + 5]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["sinusoidal", "relative", "transformer_xl", "alibi", "t5"])
@torch.no_grad()
def test_queries_that_see_nothing_give_nothing(encoding):
    """The first positions of a block see no summary yet; whatever the backend, their heads give 0."""
    summaries = {"type": "fixed_summary", "block": 4, "summary": 1}
    for implementation in backends_of(encoding):
        model = translator(encoding, implementation, decoder_attention_patterns=summaries)
        seen = []
        layer = model.model.decoder.layers[0].self_attn.o_proj
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.compiler.set_stance("force_eager"):
            model(ids(2, 5), decoder_input_ids=ids(2, 7))
        assert not seen[0][:, :3].any(), implementation
        assert seen[0][:, 3:].any(dim=-1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Caches and generation


@encodings
@patterns
@torch.no_grad()
def test_token_by_token_equals_at_once(encoding, pattern):
    model, source, target = translator(encoding, **PATTERNS[pattern]), ids(2, 6), ids(2, 10)
    at_once = model(source, decoder_input_ids=target).logits
    encoded = model.get_encoder()(source)
    for patterned in (False, True):
        cache, steps = model.get_decoder().new_cache(DynamicCache(), patterned), []
        for start, end in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10)):
            output = model(
                encoder_outputs=encoded, decoder_input_ids=target[:, start:end], past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), at_once, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_source_is_projected_once():
    model, source = translator(), ids(1, 6)
    calls = []
    model.get_decoder().layers[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    output = model.generate(source, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
    assert len(calls) == 1
    assert isinstance(output.past_key_values, EncoderDecoderCache)
    cross = output.past_key_values.cross_attention_cache
    assert cross.layers[0].keys.shape == (1, 4, 6, 8)


@encodings
@pytest.mark.parametrize("pattern", ["none", "both"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_generation_does_not_depend_on_the_cache_or_on_padding(encoding, pattern, options):
    model, source = translator(encoding, **PATTERNS[pattern]), ids(1, 5)
    batch = torch.cat((torch.nn.functional.pad(source, (4, 0)), ids(1, 9)))
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = model.generate(source, attention_mask=torch.ones_like(source), **greedy, **options)
    together = model.generate(batch, attention_mask=(batch != 0).long(), **greedy, **options)
    assert torch.equal(together[:1], alone)
    if "num_beams" not in options:
        expected = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(6):
            logits = model(source, decoder_input_ids=expected).logits[:, -1]
            logits[:, 1] = -torch.inf  # the end, which min_new_tokens forbids
            expected = torch.cat((expected, logits.argmax(dim=-1, keepdim=True)), dim=1)
        assert torch.equal(alone, expected)


@torch.no_grad()
def test_beams_with_and_without_a_cache_are_the_same():
    for pattern in ("none", "both"):
        model, source = translator("learned", **PATTERNS[pattern]), ids(2, 7)
        options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 7, "min_new_tokens": 7}
        cached = model.generate(source, **options)
        assert torch.equal(model.generate(source, use_cache=False, **options), cached)
        torch.manual_seed(1)
        sampled = model.generate(source, do_sample=True, top_k=5, max_new_tokens=7)
        torch.manual_seed(1)
        assert torch.equal(model.generate(source, do_sample=True, top_k=5, max_new_tokens=7, use_cache=False), sampled)


@torch.no_grad()
def test_patterns_choose_the_cache_that_forgets():
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "return_dict_in_generate": True}
    local = {"attention_patterns": {"type": "local", "window": 3}}
    cache = translator("rotary", **local).generate(ids(1, 5), **options).past_key_values
    assert isinstance(cache.self_attention_cache, PatternCache)
    assert cache.self_attention_cache.layers[0].buffers[0].shape[3] == 3
    cache = translator("relative", **local).generate(ids(1, 5), **options).past_key_values
    assert type(cache.self_attention_cache) is DynamicCache


@torch.no_grad()
def test_encoder_outputs_may_be_a_tuple():
    model, source, target = translator(), ids(2, 6), ids(2, 5)
    expected = model(source, decoder_input_ids=target).logits
    states = model.get_encoder()(source).last_hidden_state
    for given in ((states,), BaseModelOutput(states)):
        torch.testing.assert_close(model(encoder_outputs=given, decoder_input_ids=target).logits, expected)


@pytest.mark.parametrize(
    "encoding",
    [
        "transformer_xl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("learned", "relative", "rotary", "t5")),
    ],
)
def test_compiles_without_graph_breaks(encoding):
    model, source, labels = translator(encoding), ids(2, 6), ids(2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(source, labels=labels).loss, model(source, labels=labels).loss)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder alone


@encodings
@torch.no_grad()
def test_the_decoder_alone_takes_a_translators_weights(encoding, tmp_path):
    model, target = translator(encoding), ids(2, 7)
    model.save_pretrained(tmp_path)
    crossing = VanillaTransformerForCausalLM.from_pretrained(tmp_path, add_cross_attention=True)
    source = ids(2, 5)
    states = model.get_encoder()(source).last_hidden_state
    expected = model(source, decoder_input_ids=target).logits
    torch.testing.assert_close(crossing(target, encoder_hidden_states=states).logits, expected)
    cached = crossing.generate(target, encoder_hidden_states=states, max_new_tokens=4, min_new_tokens=4)
    uncached = crossing.generate(
        target, encoder_hidden_states=states, max_new_tokens=4, min_new_tokens=4, use_cache=False
    )
    assert torch.equal(cached, uncached)
    alone = VanillaTransformerForCausalLM.from_pretrained(tmp_path)
    assert not alone.config.is_encoder_decoder
    assert not hasattr(alone.get_decoder().layers[0], "cross_attn")
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        alone(target, encoder_hidden_states=states)


@encodings
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(encoding):
    model, first, second = translator(encoding, model_class=VanillaTransformerForCausalLM), ids(1, 5), ids(1, 6)
    positions = torch.cat((torch.arange(5), torch.arange(6)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions).logits
    alone = torch.cat((model(first).logits, model(second).logits), dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_the_decoder_alone_shifts_its_labels():
    model, inputs = translator(model_class=VanillaTransformerForCausalLM), ids(2, 7)
    output = model(inputs, labels=inputs)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_the_loss_is_smoothed_in_training_only():
    model, source, labels = translator(label_smoothing=0.1).double(), ids(2, 6), ids(2, 5)
    labels[0, 3:] = -100
    for training, smoothing in ((True, 0.1), (False, 0.0)):
        output = model.train(training)(source, labels=labels)
        torch.testing.assert_close(output.loss, smoothed_loss(output.logits, labels, smoothing), check_dtype=False)


def test_the_loss_is_aligned_and_counts_items():
    """Position t of the logits predicts labels[t], whose decoder input is the label before it."""
    model, source, labels = translator(label_smoothing=0.1).train(), ids(3, 6), ids(3, 5)
    labels[0, 2:] = -100
    start = torch.nn.functional.pad(labels[:, :-1], (1, 0)).masked_fill(
        torch.nn.functional.pad(labels[:, :-1], (1, 0)) == -100, 0
    )
    whole = model(source, labels=labels)
    torch.testing.assert_close(model(source, decoder_input_ids=start).logits, whole.logits)
    count = (labels != -100).sum()
    parts = [model(source[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole.loss)
    assert model.loss_type == "ForMaskedLM"  # what the Trainer counts items by


@pytest.mark.parametrize(("width", "warmup"), [(512, 4000), (64, 10)])
def test_the_papers_schedule_is_the_inverse_square_root(width, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=noam_rate(warmup, width, warmup))
    rate = get_inverse_sqrt_schedule(optimizer, warmup).lr_lambdas[0]
    for step in (1, warmup // 2, warmup, 3 * warmup, 100 * warmup):
        found = optimizer.param_groups[0]["initial_lr"] * rate(step)
        assert found == pytest.approx(noam_rate(step, width, warmup), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings, saving, configuration


@pytest.mark.parametrize(
    ("fields", "tables"),
    [
        ({}, 1),
        ({"share_embeddings": False}, 2),
        ({"tie_word_embeddings": False}, 3),
        ({"share_embeddings": False, "target_vocab_size": 50}, 2),
    ],
)
@torch.no_grad()
def test_embeddings_are_shared_as_the_config_says(fields, tables, tmp_path):
    model = translator(**fields, output_bias=True)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for one in (model, again):
        weights = (one.get_encoder().embed_tokens, one.get_decoder().embed_tokens, one.lm_head)
        assert len({module.weight.data_ptr() for module in weights}) == tables
    source, target = ids(1, 6), ids(1, 5)
    torch.testing.assert_close(
        again(source, decoder_input_ids=target).logits, model(source, decoder_input_ids=target).logits
    )
    if fields.get("target_vocab_size"):
        assert again(source, decoder_input_ids=target).logits.shape[-1] == 50
        with pytest.raises(ValueError, match="vocabularies of their own"):
            model.resize_token_embeddings(60)
        return
    model.resize_token_embeddings(60)
    assert model.get_decoder().embed_tokens.num_embeddings == 60
    assert model(torch.full((1, 3), 55), labels=torch.full((1, 3), 55)).logits.shape[-1] == 60


def test_auto_classes():
    config = VanillaTransformerConfig(**TINY)
    assert type(AutoModel.from_config(config)) is VanillaTransformerModel is VanillaTransformer
    assert type(AutoModelForSeq2SeqLM.from_config(config)) is VanillaTransformerForConditionalGeneration
    assert type(AutoModelForCausalLM.from_config(config)) is VanillaTransformerForCausalLM
    assert config.is_encoder_decoder  # the decoder alone changes a copy


def test_what_runs_when_nothing_is_asked():
    assert translator(implementation=None).config._attn_implementation == "sdpa"
    for pattern in ("both", "encoder"):
        assert translator(implementation=None, **PATTERNS[pattern]).config._attn_implementation == "block_sparse"
    relative = translator("relative", None, **PATTERNS["both"])
    assert relative.config._attn_implementation == "sdpa"


def test_cross_attentions_are_handed_out():
    model = translator(implementation="eager")
    output = model(ids(2, 6), decoder_input_ids=ids(2, 5), output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in output.encoder_attentions] == [(2, 4, 6, 6)] * 2
    assert [weights.shape for weights in output.decoder_attentions] == [(2, 4, 5, 5)] * 2
    assert [weights.shape for weights in output.cross_attentions] == [(2, 4, 5, 6)] * 2
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_attention_heads": 3}, "hidden_size=512 is not a multiple of num_attention_heads=3"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1, got -0.1"),
        ({"position_encoding": "rotory"}, "position_encoding='rotory' is unknown; did you mean 'rotary'"),
        (
            {"position_encoding": "unheard_of"},
            f"Allowed: {', '.join(sorted(POSITION_ENCODINGS))}",
        ),
        ({"sinusoid_layout": "half"}, "sinusoid_layout='half' is unknown; did you mean 'halves'"),
        ({"hidden_act": "rellu"}, "did you mean 'relu'"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "hidden_size must be even with position_encoding='sinusoidal'"),
        (
            {"hidden_size": 6, "num_attention_heads": 2, "position_encoding": "rotary"},
            "hidden_size / num_attention_heads must be even with position_encoding='rotary', got 3",
        ),
        ({"target_vocab_size": 99}, "vocab_size=37000 and target_vocab_size=99 cannot share one table"),
        ({"attention_patterns": {"type": "lokal", "window": 3}}, "did you mean 'local'"),
        ({"decoder_attention_patterns": {"type": "lokal", "window": 3}}, "did you mean 'local'"),
        ({"layer_types": ["full_attention"] * 6}, "say which tokens each layer sees with attention_patterns"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(Exception, match=message):
        VanillaTransformerConfig(**fields)


def test_the_config_knows_every_scheme():
    assert set(POSITION_ENCODINGS) == set(POSITION_SCHEMES)


def test_bad_inputs():
    model = translator("learned", max_position_embeddings=8)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(decoder_input_ids=ids(1, 3))
    with pytest.raises(ValueError, match="Give decoder_input_ids or decoder_inputs_embeds"):
        model(ids(1, 3))
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 39\]"):
        model(torch.tensor([[40]]), decoder_input_ids=ids(1, 3))
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 39\]"):
        model(ids(1, 3), decoder_input_ids=torch.tensor([[40]]))
    with pytest.raises(ValueError, match=r"8 positions \(max_position_embeddings\).*from position 0 to 8"):
        model(ids(1, 3), labels=ids(1, 9))
    with pytest.raises(ValueError, match=r"8 positions \(max_position_embeddings\)"):
        model.generate(ids(1, 3), max_new_tokens=12, min_new_tokens=12)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="attention_mask has no token in row 1: a source of only padding"):
        model(ids(2, 3), attention_mask=mask, decoder_input_ids=ids(2, 3))
    with pytest.raises(ValueError, match="attention_mask covers 4 tokens, but only 3 have been given"):
        model(ids(2, 3), attention_mask=torch.ones(2, 4), decoder_input_ids=ids(2, 3))
    with pytest.raises(ValueError, match=r"attended to must have shape \[2, 3\], got \[2, 2\]"):
        model(
            encoder_outputs=(torch.zeros(2, 3, 32),),
            attention_mask=torch.ones(2, 2),
            decoder_input_ids=ids(2, 3),
        )
    with pytest.raises(ValueError, match=r"decoder_start_token_id must be set in the config"):
        translator(decoder_start_token_id=None)(ids(1, 3), labels=ids(1, 3))
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        translator(decoder_start_token_id=None).generate(ids(1, 3))
    with pytest.raises(ValueError, match="position_bias"):
        translator("relative", "block_sparse")(ids(1, 3), decoder_input_ids=ids(1, 3))
    relative = translator("relative", **PATTERNS["both"])
    cache = EncoderDecoderCache(PatternCache(relative.get_decoder().patterns, 4), DynamicCache())
    with pytest.raises(ValueError, match=r"pattern-aware cache does not keep; pass past_key_values=DynamicCache\(\)"):
        relative(ids(1, 3), decoder_input_ids=ids(1, 3), past_key_values=cache)
