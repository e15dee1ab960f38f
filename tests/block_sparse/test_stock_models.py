"""Transformers' own models under our patterns, held to the same models with dense attention under an explicit table.

The oracle is a backend of this file: it ignores the masks that Transformers builds and shows each query of a
self-attention layer what a table written by loops says (pattern AND the model's own rule AND padding AND packing).
"""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    ImageGPTConfig,
    ImageGPTModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MoonshineConfig,
    MoonshineModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

import hf_tfamily
from hf_tfamily.block_sparse import interface, stock_masks
from hf_tfamily.modeling.attention_patterns import (
    Fixed,
    FixedBlock,
    FixedSummary,
    Full,
    Intersection,
    Local,
    PerHead,
    Strided,
    Union,
)
from hf_tfamily.modeling.configuration_sparse_transformer import SparseTransformerConfig
from hf_tfamily.modeling.modeling_sparse_transformer import SparseTransformerForCausalLM
from tests.reference.masked_attention import visible_table

HEADS, LENGTH, WINDOW = 4, 21, 6
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
TEXT = {"vocab_size": 50, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, **SIZES}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
IMAGE = {"image_size": 20, "patch_size": 4, **SIZES}

MERGED = Union([Local(3), Strided(4)])
PATTERNS = {
    "local": [Local(4)],
    "merged": [MERGED],
    "fixed": [Fixed(block=5, summary=1, sub_blocks=2)],
    "per head": [PerHead([Local(2), FixedSummary(5, 2)])],
    "intersection": [Intersection([Local(9), Strided(2)])],
    "by layer": [FixedBlock(5), PerHead([Strided(4), Full()])],
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**TEXT))


def gemma2():
    """Its first layer slides, its second does not."""
    config = Gemma2Config(**TEXT, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None)
    return Gemma2ForCausalLM(config)


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=HEADS, initializer_range=0.3, eos_token_id=1, bos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=50, initializer_range=0.3, **SIZES, **no_dropout))


def vit():
    return ViTModel(ViTConfig(**IMAGE, initializer_range=0.3))


def clip_vision():
    return CLIPVisionModel(CLIPVisionConfig(**IMAGE, initializer_factor=10.0))


def bart():
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, init_std=0.3, dropout=0.0, **BART, **heads))


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


class Tables:
    """What each self-attention layer shows, [B, H, N, N]: by stack ("encoder" or "decoder") and layer."""

    def __init__(self):
        self.by_layer = {}

    def of(self, module, query_length, key_length, batch_size):
        if not self.by_layer or attention_is_cross(module):
            return None
        stack = "decoder" if getattr(module, "is_decoder", False) else "encoder"
        layers = self.by_layer.get(stack) or self.by_layer["all"]
        table = layers[(getattr(module, "layer_idx", None) or 0) % len(layers)]
        return table[:, :, :query_length, :key_length].repeat_interleave(batch_size // len(table), dim=0)


TABLES = Tables()


def attention_is_cross(module):
    return getattr(module, "is_decoder", False) and not module.is_causal


def table_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    table = TABLES.of(module, query.shape[2], key.shape[2], len(query))
    if table is None:  # cross-attention: padding is all there is
        table = torch.ones(1) if attention_mask is None else attention_mask[:, None, None]
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(table == 0, float("-inf")).softmax(-1).nan_to_num()
    return (weights @ value).transpose(1, 2), weights


def only_padding(attention_mask=None, **kwargs):
    return attention_mask


@pytest.fixture(autouse=True, scope="module")
def _oracle_backend():
    AttentionInterface.register("table", table_attention)
    AttentionMaskInterface.register("table", only_padding)
    yield
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop("table")


def tables(patterns, valid=None, batch=2, length=LENGTH, causal=True, windows=(None,), documents=None):
    """One table for each layer, from positions that count tokens from the start of their document."""
    valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid.bool()
    documents = torch.zeros_like(valid, dtype=torch.long) if documents is None else documents
    positions = [
        [sum(bool(valid[b, j]) and documents[b, j] == documents[b, i] for j in range(i)) for i in range(valid.shape[1])]
        for b in range(len(valid))
    ]
    layers = []
    for layer in range(2):
        window = windows[layer % len(windows)]

        def seen(b, i, j, window=window):
            return (
                bool(valid[b, j])
                and bool(valid[b, i])
                and documents[b, i] == documents[b, j]
                and (j <= i or not causal)
                and (window is None or i - j < window)
            )

        layers.append(visible_table(patterns[layer % len(patterns)], HEADS, positions, positions, seen))
    return layers


def pair(build, patterns):
    """The model under our patterns, and its twin under the oracle."""
    ours, twin = build().eval(), build().eval()
    for parameter in ours.parameters():  # biases, too, so that nothing is right by being zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    twin.load_state_dict(ours.state_dict())
    hf_tfamily.set_attention_patterns(ours, patterns)
    twin.set_attn_implementation("table")
    return ours, twin


def assert_equal(ours, twin, valid=None, call=None, **inputs):
    """Outputs and the gradient of every parameter; what padding puts out is nobody's concern."""
    results = []
    for model in (ours, twin):
        model.zero_grad()
        output = call(model) if call else model(**inputs)[0]
        output = output if valid is None else output[valid.bool()]
        torch.manual_seed(1)
        (output * torch.randn_like(output)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.detach(), gradients))
    (output, gradients), (expected, expected_gradients) = results
    close(output, expected)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():  # a key's bias has gradient 0 but for rounding
        close(gradient, expected_gradients[name], name, floor=1e-2 * largest)


def close(actual, expected, name="", floor=0.0):
    scale = max(float(expected.abs().max()), floor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * scale, msg=lambda m: f"{name}: {m}")


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def tokens(batch=2, length=LENGTH):
    return torch.randint(3, 50, (batch, length))


def padding(side, batch=2, length=LENGTH, width=6):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(0, width) if side == "left" else slice(length - width, length)] = 0
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Outputs and gradients

DECODERS = {"llama": (llama, (None,)), "gemma2": (gemma2, (WINDOW, None)), "gpt2": (gpt2, (None,))}


@pytest.fixture(params=DECODERS)
def decoder(request):
    return DECODERS[request.param]


@pytest.mark.parametrize("name", PATTERNS)
def test_llama_equals_the_table(name):
    ours, twin = pair(llama, PATTERNS[name])
    TABLES.by_layer = {"all": tables(PATTERNS[name])}
    assert_equal(ours, twin, input_ids=tokens())


def test_the_table_can_fail():
    """The patterns matter: under another one, outputs are far away."""
    ours, twin = pair(llama, PATTERNS["local"])
    TABLES.by_layer = {"all": tables(PATTERNS["merged"])}
    ids = tokens()
    with torch.no_grad():
        assert (ours(ids).logits - twin(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_decoders_with_padding(decoder, side):
    build, windows = decoder
    ours, twin = pair(build, PATTERNS["by layer"])
    valid = None if side == "none" else padding(side)
    TABLES.by_layer = {"all": tables(PATTERNS["by layer"], valid, windows=windows)}
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


def test_gemma2_slides_under_every_pattern():
    """A pattern that reaches beyond the sliding window is cut by it, in the layers that slide."""
    ours, twin = pair(gemma2, PATTERNS["merged"])
    TABLES.by_layer = {"all": tables(PATTERNS["merged"], windows=(WINDOW, None))}
    ids = tokens()
    assert_equal(ours, twin, input_ids=ids)
    TABLES.by_layer = {"all": tables(PATTERNS["merged"])}
    with torch.no_grad():
        assert (ours(ids).logits - twin(ids).logits).abs().max() > 0.1


def test_packed_documents_do_not_see_each_other(decoder):
    build, windows = decoder
    lengths = ([9, 5, 7], [4, 16, 1])
    documents = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    positions = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    ours, twin = pair(build, PATTERNS["by layer"])
    TABLES.by_layer = {"all": tables(PATTERNS["by layer"], documents=documents, windows=windows)}
    ids = tokens()
    assert_equal(ours, twin, input_ids=ids, position_ids=positions, use_cache=False)
    with torch.no_grad():
        alone = ours(ids[:1, 9:14]).logits
        close(ours(ids, position_ids=positions, use_cache=False).logits[:1, 9:14], alone)


def test_packed_documents_of_one_row_serve_the_whole_batch():
    ours = pair(llama, PATTERNS["merged"])[0]
    positions = torch.tensor([[*range(12), *range(9)]])
    ids = tokens()
    with torch.no_grad():
        packed = ours(ids, position_ids=positions, use_cache=False).logits
        close(packed[:, 12:], ours(ids[:, 12:]).logits)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert_sees_both_ways(side):
    ours, twin = pair(bert, PATTERNS["by layer"])
    valid = None if side == "none" else padding(side)
    TABLES.by_layer = {"all": tables(PATTERNS["by layer"], valid, causal=False)}
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


@pytest.mark.parametrize("name", ["local", "merged", "per head"])
@pytest.mark.parametrize("build", [vit, clip_vision])
def test_models_of_images_are_not_causal(build, name):
    """25 patches and the class token. CLIP's hands over no mask at all, so only the module can say so."""
    ours, twin = pair(build, PATTERNS[name])
    TABLES.by_layer = {"all": tables(PATTERNS[name], length=26, causal=False)}
    assert_equal(ours, twin, pixel_values=torch.randn(2, 3, 20, 20))


@pytest.mark.parametrize("target_length", [13, 28])
def test_bart_has_patterns_in_both_stacks_and_none_between(target_length):
    ours, twin = pair(bart, PATTERNS["by layer"])
    valid, target_valid = padding("right"), padding("right", length=target_length)
    TABLES.by_layer = {
        "encoder": tables(PATTERNS["by layer"], valid, causal=False),
        "decoder": tables(PATTERNS["by layer"], target_valid),
    }
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=target_length)}
    masks = {"attention_mask": valid, "decoder_attention_mask": target_valid}
    assert_equal(ours, twin, target_valid, **inputs, **masks)


def test_bart_without_padding():
    ours, twin = pair(bart, PATTERNS["merged"])
    TABLES.by_layer = {
        "encoder": tables(PATTERNS["merged"], causal=False),
        "decoder": tables(PATTERNS["merged"], length=9),
    }
    assert_equal(ours, twin, input_ids=tokens(), decoder_input_ids=tokens(length=9))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(decoder, use_reentrant):
    build, windows = decoder
    ours, twin = pair(build, PATTERNS["by layer"])
    valid = padding("left")
    TABLES.by_layer = {"all": tables(PATTERNS["by layer"], valid, windows=windows)}
    ours.train()
    twin.train()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


def test_bfloat16_is_as_near_as_the_table():
    ours, twin = pair(llama, PATTERNS["merged"])
    TABLES.by_layer = {"all": tables(PATTERNS["merged"])}
    ids = tokens()
    with torch.no_grad():
        exact = twin(ids).logits
        errors = [(model.bfloat16()(ids).logits - exact).norm() / exact.norm() for model in (ours, twin)]
    assert errors[0] < 2 * errors[1]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def generate(model, ids, mask, new=12, **kwargs):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        output_logits=True, output_scores=True, return_dict_in_generate=True, **kwargs,
    )  # fmt: skip


def assert_logits_follow_the_table(twin, patterns, windows, output, prompt_mask):
    """Every step's logits are those of one pass over the whole sequence."""
    steps = len(output.logits)
    mask = torch.nn.functional.pad(prompt_mask, (0, steps), value=1)
    TABLES.by_layer = {"all": tables(patterns, mask, windows=windows)}
    with torch.no_grad():
        logits = twin(output.sequences, position_ids=positions_of(mask)).logits
    close(torch.stack(output.logits, dim=1), logits[:, -steps - 1 : -1])


CACHES = {
    "none": {"use_cache": False},
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
def test_generation(decoder, cache, side):
    build, windows = decoder
    ours, twin = pair(build, PATTERNS["by layer"])
    ids = tokens(length=10)
    mask = torch.ones_like(ids) if side == "none" else padding("left", length=10, width=3)
    output = generate(ours, ids * mask, mask, **CACHES[cache])
    assert_logits_follow_the_table(twin, PATTERNS["by layer"], windows, output, mask)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_given_in_chunks(decoder, kind, side):
    """Prompts of several passes against what the cache holds, past the end of the sliding window."""
    build, windows = decoder
    ours, twin = pair(build, PATTERNS["merged"])
    ids = tokens()
    mask = torch.ones_like(ids) if side == "none" else padding("left", width=3)
    cache = DynamicCache(config=ours.config) if kind == "dynamic" else StaticCache(ours.config, max_cache_len=30)
    positions, parts = positions_of(mask), []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 13), (13, 14), (14, LENGTH)):
            chunk = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
            parts.append(ours(**chunk, attention_mask=mask[:, :end], past_key_values=cache).logits)
        TABLES.by_layer = {"all": tables(PATTERNS["merged"], mask, windows=windows)}
        expected = twin(ids, position_ids=positions).logits
    close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_beams(decoder, cache):
    build, windows = decoder
    ours, twin = pair(build, PATTERNS["by layer"])
    ids, mask = tokens(length=7), padding("left", length=7, width=2)
    TABLES.by_layer = {
        "all": tables(PATTERNS["by layer"], torch.nn.functional.pad(mask, (0, 8), value=1), windows=windows)
    }
    expected = generate(twin, ids, mask, new=8, num_beams=3, use_cache=False)
    output = generate(ours, ids, mask, new=8, num_beams=3, **CACHES[cache])
    assert output.sequences.tolist() == expected.sequences.tolist()
    close(output.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_bart_generates(cache, num_beams):
    ours, twin = pair(bart, PATTERNS["merged"])
    ids, mask = tokens(length=10), padding("right", length=10, width=4)
    TABLES.by_layer = {
        "encoder": tables(PATTERNS["merged"], mask, causal=False),
        "decoder": tables(PATTERNS["merged"], length=12),
    }
    expected = generate(twin, ids, mask, new=10, num_beams=num_beams, use_cache=False)
    output = generate(ours, ids, mask, new=10, num_beams=num_beams, **CACHES[cache])
    assert output.sequences.tolist() == expected.sequences.tolist()
    if num_beams == 1:
        close(torch.stack(output.logits), torch.stack(expected.logits))


# ---------------------------------------------------------------------------------------------------------------------
# Setting patterns


@pytest.mark.parametrize("name", ["local", "by layer"])
def test_patterns_survive_saving(name, tmp_path):
    ours = pair(llama, PATTERNS[name])[0]
    ours.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="block_sparse")
    ids = tokens()
    assert loaded.config.attention_patterns == ours.config.attention_patterns
    assert torch.equal(loaded(ids).logits, ours(ids).logits)


def test_a_config_alone_is_enough(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.attention_patterns = {"type": "local", "window": 4}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="block_sparse")
    hf_tfamily.set_attention_patterns(model, Local(4))
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("patterns", [Local(4), [Local(4)], {"type": "local", "window": 4}, iter([Local(4)])])
def test_one_pattern_is_stored_as_one_plain_dict(patterns):
    model = llama()
    hf_tfamily.set_attention_patterns(model, patterns)
    assert model.config.attention_patterns == {"type": "local", "window": 4}
    assert model.config._attn_implementation == "block_sparse"


def test_patterns_can_be_changed():
    ours, twin = pair(llama, PATTERNS["local"])
    hf_tfamily.set_attention_patterns(ours, PATTERNS["by layer"])
    TABLES.by_layer = {"all": tables(PATTERNS["by layer"])}
    assert_equal(ours, twin, input_ids=tokens())


def swin():
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return SwinModel(SwinConfig(image_size=32, patch_size=4, **sizes))


def clip():
    return CLIPModel(CLIPConfig(text_config={**SIZES, "vocab_size": 50}, vision_config=IMAGE, projection_dim=8))


def t5():
    return T5Model(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=HEADS))


def imagegpt():
    return ImageGPTModel(ImageGPTConfig(n_embd=32, n_layer=1, n_head=HEADS, vocab_size=17, n_positions=16))


def capped_gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**TEXT, head_dim=8))


def sparse_transformer():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return SparseTransformerForCausalLM(SparseTransformerConfig(**sizes))


def moonshine():
    return MoonshineModel(MoonshineConfig(**TEXT))


REFUSED = {
    "own patterns": (sparse_transformer, Local(4), "SparseTransformerForCausalLM knows patterns itself"),
    "own code": (imagegpt, Local(4), "ImageGPTAttention attends by its own code and would ignore the pattern"),
    "position bias": (swin, Local(4), "SwinAttention adds terms of its own to the scores"),
    "relative bias": (t5, Local(4), "T5Attention adds terms of its own to the scores"),
    "softcap": (capped_gemma2, Local(4), "attn_logit_softcapping to None"),
    "several configs": (clip, Local(4), "CLIPAttention.* config of its own"),
    "which attention": (moonshine, Local(4), "whether MoonshineAttention is self- or cross-attention"),
    "no layer number": (vit, [Local(4), Full()], "ViTAttention does not know its layer"),
    "unknown type": (llama, {"type": "locl", "window": 4}, "did you mean 'local'"),
    "bad value": (llama, {"type": "local", "window": 0}, "Local.window must be an integer of at least 1"),
    "no pattern": (llama, [], "empty list"),
    "heads": (llama, PerHead([Local(1), Local(2), Local(3)]), "does not divide num_attention_heads=4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_the_model_left_alone(case):
    build, patterns, reason = REFUSED[case]
    model = build()
    before, implementation = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(ValueError, match=reason):
        hf_tfamily.set_attention_patterns(model, patterns)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == implementation


def test_one_half_of_a_composite_model_can_have_patterns():
    model = clip().eval()
    hf_tfamily.set_attention_patterns(model.vision_model, Local(3))
    assert model.config.vision_config.attention_patterns == {"type": "local", "window": 3}
    assert model.config.text_config._attn_implementation == "sdpa"
    model(input_ids=tokens(), pixel_values=torch.randn(2, 3, 20, 20))


# ---------------------------------------------------------------------------------------------------------------------
# What a forward pass refuses


def test_parallel_heads_follow_their_own_patterns_or_are_refused():
    """Of 4 heads a process may hold 2, numbered from 0: right for period 2, wrong for 4."""
    attention = llama().model.layers[0].self_attn
    query, key = torch.randn(1, 2, LENGTH, 8), torch.randn(1, 1, LENGTH, 8)
    for pattern in (Fixed(6, 1, sub_blocks=2), PATTERNS["per head"][0]):
        attention.config.attention_patterns = pattern.to_dict()
        interface.block_sparse_attention_forward(attention, query, key, key, None)
    attention.config.attention_patterns = Fixed(6, 1, sub_blocks=4).to_dict()
    with pytest.raises(ValueError, match=r"period 4, which does not divide the 2 of 4 heads .* tensor parallelism"):
        interface.block_sparse_attention_forward(attention, query, key, key, None)


def under_pattern(build=llama, **changes):
    model = build()
    hf_tfamily.set_attention_patterns(model, Local(4))
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model.eval()


def with_dropout(build):
    """A model as `from_pretrained` gives it, whose config drops attention weights."""
    config = build().config
    for name, value in vars(type(config)()).items():
        if name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
            setattr(config, name, value or 0.1)
    return build.__globals__[type(build()).__name__](config)


@pytest.mark.parametrize("build", [llama, gpt2, bert, vit, clip_vision, bart])
def test_attention_dropout_is_refused_with_a_call_that_turns_it_off(build, tmp_path):
    model = with_dropout(build)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"give set_attention_patterns\(model, patterns, attention_dropout=0\.0\)"):
        hf_tfamily.set_attention_patterns(model, Local(4))
    assert model.config.to_dict() == before
    hf_tfamily.set_attention_patterns(model, Local(4), attention_dropout=0.0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="block_sparse")
    inputs = (
        {"pixel_values": torch.randn(2, 3, 20, 20)} if hasattr(model.config, "patch_size") else {"input_ids": tokens()}
    )
    for trained in (model.train(), again.train()):
        trained(**inputs)


def test_attention_dropout_that_appears_later_is_refused_in_training_only():
    model = under_pattern()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model(tokens())
    with pytest.raises(
        ValueError, match=r"dropout of attention weights; set_attention_patterns\(.*attention_dropout=0"
    ):
        model.train()(tokens())
    with pytest.raises(ValueError, match=r"attention_dropout may be 0\.0 or None"):
        hf_tfamily.set_attention_patterns(model, Local(4), attention_dropout=0.1)


def test_no_message_sends_a_model_under_a_pattern_to_a_backend_that_ignores_it():
    for arguments in ({"output_attentions": True}, {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}):
        with pytest.raises(ValueError, match=r"set_attention_patterns\(model, None\)") as error:
            under_pattern()(tokens(), **arguments)
        assert "sdpa" not in str(error.value)
        assert "eager" not in str(error.value)


def test_patterns_can_be_taken_away():
    model, plain = under_pattern(), llama().eval()
    plain.load_state_dict(model.state_dict())
    hf_tfamily.set_attention_patterns(model, None)
    assert "attention_patterns" not in model.config.to_dict()
    ids = tokens()
    close(model(ids).logits, plain(ids).logits)
    model.set_attn_implementation("sdpa")
    close(model(ids).logits, plain(ids).logits)


def test_output_attentions_is_refused():
    with pytest.raises(ValueError, match="does not support output_attentions"):
        under_pattern()(tokens(), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions_are_refused(dtype):
    with pytest.raises(ValueError, match=r"masks that are tensors.*4-D"):
        under_pattern()(tokens(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=dtype))


def test_masks_that_a_model_adds_to_are_refused():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    config.attention_patterns = Local(2).to_dict()
    model = SwinModel._from_config(config, attn_implementation="block_sparse")
    with pytest.raises(ValueError, match="masks that are tensors"):
        model(torch.randn(1, 3, 32, 32))


def test_masks_that_a_model_reads_are_refused():
    model = DogeForCausalLM(DogeConfig(**TEXT))
    hf_tfamily.set_attention_patterns(model, Local(4))
    with pytest.raises(AttributeError, match=r"makes no mask tensor, but this model reads .* of its mask"):
        model(tokens())


def test_patterns_that_do_not_fit_the_heads_are_refused():
    model = under_pattern(attention_patterns=PerHead([Local(1), Local(2), Local(3)]).to_dict())
    with pytest.raises(ValueError, match="does not divide num_attention_heads=4"):
        model(tokens())


def test_softcapping_is_refused():
    config = Gemma2Config(**TEXT, head_dim=8)
    config.attention_patterns = Local(4).to_dict()
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="block_sparse")
    with pytest.raises(ValueError, match="softcap; set attn_logit_softcapping to None"):
        model(tokens())


def test_chunks_are_cut_by_a_pattern():
    config = Llama4TextConfig(**TEXT, head_dim=8, num_local_experts=2, attention_chunk_size=8, no_rope_layers=[1, 1])
    ours, twin = pair(lambda: Llama4ForCausalLM(config), [Local(5)])
    valid = padding("left")
    chunked = tables([Local(5)], valid)
    for table in chunked:
        for row, first in enumerate((6, 0)):
            for i in range(LENGTH):
                for j in range(LENGTH):
                    table[row if len(table) > 1 else 0, :, i, j] &= (i - first) // 8 == (j - first) // 8
    TABLES.by_layer = {"all": chunked}
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


# ---------------------------------------------------------------------------------------------------------------------
# A model's own mask is evaluated, not read

LONG = 90  # more pairs than are compared one by one
CAUSAL, BOTH_WAYS = {}, {"allow_is_bidirectional_skip": True}
KINDS = {
    "causal": (causal_mask_function, CAUSAL, lambda q, k: k <= q),
    "sliding": (sliding_window_causal_mask_function(6), {"local_size": 6}, lambda q, k: q - 6 < k <= q),
    "bidirectional": (bidirectional_mask_function, BOTH_WAYS, lambda q, k: True),
    "bidirectional window": (
        sliding_window_bidirectional_mask_function(6),
        {"local_size": 6, **BOTH_WAYS},
        lambda q, k: abs(q - k) <= 6,
    ),
}


def renamed(function):
    def bidirectional_mask_function(*indices):
        return function(*indices)

    bidirectional_mask_function.__qualname__ = "chunked_overlay.<locals>.inner_mask"
    return bidirectional_mask_function


DISGUISES = {
    "none": lambda function: function,
    "a lambda": lambda function: lambda *indices: function(*indices),
    "partial": functools.partial(functools.partial),
    "renamed": renamed,
    "nothing added": lambda function: or_masks(function, function),
    "nothing taken": lambda function: and_masks(function, function),
}


def own_mask(function, length, batch=2, past=0, first_key=0, **facts):
    lengths = {"q_length": length - past, "kv_length": length - first_key, "q_offset": past, "kv_offset": first_key}
    return stock_masks.block_sparse_mask(batch_size=batch, **lengths, mask_function=function, **facts)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [0, 5, LENGTH - 1])
def test_masks_are_known_by_what_they_show(kind, disguise, past):
    function, facts, rule = KINDS[kind]
    seen = own_mask(DISGUISES[disguise](function), LENGTH, past=past, first_key=past // 2, **facts)
    table = [[rule(q, k) for k in range(past // 2, LENGTH)] for q in range(past, LENGTH)]
    assert seen.dense(torch.device("cpu"))[0, 0].tolist() == table
    assert seen.query_documents is None
    own_mask(DISGUISES[disguise](function), LONG, past=past, **facts)


def changed(function, query, key, row=None, head=None):
    """The same mask but for one pair."""

    def changed_mask(b, h, q, k):
        there = (q == query) & (k == key) & (True if row is None else b == row) & (True if head is None else h == head)
        return function(b, h, q, k) ^ there

    return changed_mask


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_pair_is_found_in_short_rows(kind):
    function, facts, _ = KINDS[kind]
    for query in range(8):
        for key in range(8):
            if key + 1 != query:  # that alone would be a new document
                with pytest.raises(ValueError, match=rf"own mask .*changed_mask.*query {query}, key {key} of row 0"):
                    own_mask(changed(function, query, key), 8, **facts)
    with pytest.raises(ValueError, match="query 6, key 4 of row 1"):
        own_mask(changed(function, 6, 4, row=1), 8, **facts)
    with pytest.raises(ValueError, match="query 6, key 4 of row 0"):
        own_mask(changed(function, 6, 4, head=3), 8, config=LlamaConfig(**TEXT), **facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [-7, -6, -5, -1, 0, 1, 5, 6, 7])
def test_in_long_rows_one_pair_is_found_at_the_edges(kind, step):
    function, facts, _ = KINDS[kind]
    if facts.get("local_size") or abs(step) <= 1:
        with pytest.raises(ValueError, match="own mask"):
            own_mask(changed(function, 50, 50 - step), LONG, **facts)


@pytest.mark.parametrize(("query", "key"), [(0, 40), (LONG - 1, 40), (40, 0), (40, LONG - 1)])
def test_in_long_rows_one_pair_is_found_in_the_first_and_last_rows_and_columns(query, key):
    with pytest.raises(ValueError, match="own mask"):
        own_mask(changed(causal_mask_function, query, key), LONG)


def test_a_caller_s_own_function_is_compared_whole():
    with pytest.raises(ValueError, match="query 40, key 17"):
        own_mask(changed(causal_mask_function, 40, 17), LONG, use_vmap=True)


@pytest.mark.parametrize("length", [LENGTH, LONG])
@pytest.mark.parametrize("size", [5, 7])
def test_windows_of_another_size_are_refused(size, length):
    for function in (sliding_window_causal_mask_function(6), causal_mask_function):
        with pytest.raises(ValueError, match="own mask"):
            own_mask(function, length, local_size=size)
    with pytest.raises(ValueError, match="own mask"):
        own_mask(sliding_window_bidirectional_mask_function(6), length, local_size=size, **BOTH_WAYS)


@pytest.mark.parametrize(
    "mask_function",
    [lambda b, h, q, k: q, lambda b, h, q, k: k > q, lambda b, h: True, lambda b, h, q, k: [0][int(q.sum()) + 1]],
)
def test_other_mask_functions_are_refused(mask_function):
    with pytest.raises(ValueError, match=r"own mask .*lambda"):
        own_mask(mask_function, 4)


def test_mask_functions_for_scalars_are_evaluated():
    """One that would not broadcast over the batch."""

    def scalars(b, h, q, k):
        assert q.ndim == 0 or q.shape == k.shape, "not elementwise"
        return torch.stack([k, q]).argmin(0) == 0  # k <= q

    own_mask(scalars, LENGTH)
    with pytest.raises(ValueError, match="own mask"):
        own_mask(lambda *indices: ~scalars(*indices), LENGTH)


@pytest.mark.parametrize("length", [LENGTH, LONG])
@pytest.mark.parametrize("window", [None, 6, 3])
def test_documents_are_found_where_neighbours_do_not_see_each_other(window, length):
    documents = torch.zeros(2, length, dtype=torch.long)
    documents[0, 4:] += 1
    documents[0, 5:] += 1
    documents[1, length // 2 :] += 1
    positions = torch.stack([torch.cat([torch.arange(n) for n in row.bincount()]) for row in documents])
    function, facts = causal_mask_function, {}
    if window is not None:
        function, facts = sliding_window_causal_mask_function(window), {"local_size": window}
    packed = and_masks(function, packed_sequence_mask_function(documents))
    seen = own_mask(packed, length, **facts)
    assert torch.equal(seen.query_documents, documents)
    assert torch.equal(seen.query_positions, positions)
    with pytest.raises(ValueError, match="own mask"):  # a document that goes on later
        own_mask(and_masks(function, packed_sequence_mask_function(documents % 2)), length, **facts)
    with pytest.raises(ValueError, match="own mask"):  # there are no documents beside padding
        own_mask(packed, length, attention_mask=torch.ones(2, length, dtype=torch.bool), **facts)


def block_of_a_picture(ids):
    """Tokens of 9 see each other both ways."""
    blocks = torch.where(ids == 9, 0, -1)
    return {"block_sequence_ids": blocks}, {"or_mask_function": blockwise_overlay(blocks)}


@pytest.mark.parametrize("length", [LENGTH, 1200])
@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("build", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize("padded", [False, True])
def test_what_depends_on_the_call_is_evaluated_at_each_call(build, way, length, padded):
    config = MistralConfig(**TEXT, sliding_window=WINDOW, attn_implementation="block_sparse")
    ids = torch.randint(10, 50, (2, length))
    mask = padding("left", length=length) if padded else None

    def make(ids):
        inputs = {"inputs_embeds": torch.empty(*ids.shape, 1), "attention_mask": mask, "past_key_values": None}
        return build(config, **inputs, **block_of_a_picture(ids)[way])

    make(ids)
    ids[1, 10:14] = 9
    with pytest.raises(ValueError, match="own mask"):
        make(ids)
    ids[1, 10:14] = 10
    make(ids)


def test_a_bidirectional_block_is_refused_while_decoding():
    blocks = torch.full((2, LENGTH), -1)
    own_mask(or_masks(causal_mask_function, blockwise_overlay(blocks)), LENGTH, past=LENGTH - 1)
    blocks[1, [3, LENGTH - 1]] = 0
    sliding = sliding_window_causal_mask_function(4)
    with pytest.raises(ValueError, match="own mask"):
        own_mask(or_masks(sliding, blockwise_overlay(blocks)), LENGTH, past=LENGTH - 1, local_size=4)


def modernbert():
    sizes = {"local_attention": 8, "global_attn_every_n_layers": 2, "embedding_dropout": 0.0, "pad_token_id": 0}
    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=50, **SIZES, **sizes, initializer_range=0.3))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_modernbert_has_windows_to_both_sides(side):
    """Its window of 8 shows 4 tokens on either side, in every layer but the first, third, and so on."""
    patterns = PATTERNS["by layer"]
    ours, twin = pair(modernbert, patterns)
    valid = None if side == "none" else padding(side)
    full, _ = tables(patterns, valid, causal=False)
    _, local = tables([patterns[0], Intersection([patterns[1], Local(5)])], valid, causal=False)
    TABLES.by_layer = {"all": [full, local]}
    assert_equal(ours, twin, valid, input_ids=tokens(), attention_mask=valid)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


def mistral():
    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=WINDOW))


GIVEN = {"nothing": lambda: {}, "padding": lambda: {"attention_mask": padding("left")}}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("build", [llama, mistral])
@torch.no_grad()
def test_one_graph(build, given):
    ours, ids, given = pair(build, PATTERNS["by layer"])[0], tokens(), GIVEN[given]()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    close(compiled(ids, **given).logits, ours(ids, **given).logits)
    before = compiled(ids, **given).logits
    hf_tfamily.set_attention_patterns(ours, Local(2))
    after = compiled(ids, **given).logits
    close(after, ours(ids, **given).logits)
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize("build", [llama, mistral])
@torch.no_grad()
def test_packed_rows_are_compiled(build):
    """Not in one graph: how many documents there are is known only then."""
    ours, ids = pair(build, PATTERNS["by layer"])[0], tokens()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    for positions in (torch.tensor([[*range(12), *range(9)]]), torch.arange(LENGTH)[None]):
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        close(compiled(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", [llama, mistral])
@torch.no_grad()
def test_export(build, strict):
    """Also of patterns that were never combined with the model's window before, when tensors had values."""
    ours, ids = pair(build, [Local(4 + strict), Union([Local(2), Strided(5 + strict)])])[0], tokens()
    exported = torch.export.export(
        ours, (ids,), {"attention_mask": torch.ones_like(ids), "use_cache": False}, strict=strict
    ).module()
    for mask in (torch.ones_like(ids), padding("left")):
        inputs = {"attention_mask": mask, "use_cache": False}
        close(exported(ids, **inputs).logits[mask.bool()], ours(ids, **inputs).logits[mask.bool()])


@pytest.mark.parametrize("build", [llama, mistral])
def test_tensors_without_values(build):
    with FakeTensorMode():
        model = build()
        hf_tfamily.set_attention_patterns(model, Local(4))
        assert model(tokens()).logits.shape == (2, LENGTH, 50)


@pytest.mark.parametrize("mask", [None, torch.ones(2, LENGTH, dtype=torch.long)])
@pytest.mark.parametrize("way", [0, 1])
def test_graphs_do_not_take_a_bidirectional_block(way, mask):
    config = LlamaConfig(**TEXT, attn_implementation="block_sparse")
    ids = torch.full((2, LENGTH), 10)

    @functools.partial(torch.compile, backend="eager", fullgraph=True)
    def masked(ids):
        inputs = {"inputs_embeds": torch.empty(*ids.shape, 1), "attention_mask": mask, "past_key_values": None}
        return create_causal_mask(config, **inputs, **block_of_a_picture(ids)[way]).key_documents

    torch._dynamo.reset()
    ids[1, 10:14] = 9
    with pytest.raises(Exception, match="own mask"):
        masked(ids)


@pytest.mark.parametrize("build", [llama, mistral])
@torch.no_grad()
def test_decoding_with_a_static_cache_is_one_graph(build):
    ours, ids = pair(build, PATTERNS["by layer"])[0], tokens()
    cache = StaticCache(ours.config, max_cache_len=30)
    parts = [ours(ids[:, :12], past_key_values=cache).logits]
    counts = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(ours, backend=counts, fullgraph=True)
    for place in range(12, LENGTH):
        positions = torch.tensor([[place]])
        parts.append(step(ids[:, place : place + 1], position_ids=positions, past_key_values=cache).logits)
    close(torch.cat(parts, dim=1), ours(ids).logits)


# ---------------------------------------------------------------------------------------------------------------------
# The operator


@pytest.mark.parametrize("padded", [False, True])
def test_each_layer_runs_the_operator_once(monkeypatch, padded):
    calls, operator = [], interface.block_sparse_attention

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return operator(*args, **kwargs)

    model, mask = under_pattern(), padding("left") if padded else None
    expected = model(ids := tokens(), attention_mask=mask).logits
    monkeypatch.setattr(interface, "block_sparse_attention", counted)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert len(calls) == SIZES["num_hidden_layers"]
