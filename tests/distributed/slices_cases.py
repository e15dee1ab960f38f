"""What each rank of test_context_parallel.py runs: a model whose rows are cut over ranks equals one process.

Every rank has everything whole as well, and compares.
"""

import copy
from functools import partial
from itertools import product

import torch
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_tfamily import set_attention_patterns
from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.distributed import context_parallel, predicted_bytes
from hf_tfamily.distributed.attention import attend_slices
from hf_tfamily.distributed.exchange import Wire
from hf_tfamily.distributed.exchange_plan import Sizes, Slices, plan_exchange
from hf_tfamily.modeling.attention_patterns import Fixed, Full, Local, PerHead, Sink, Strided, Union
from tests.pattern_examples import EXAMPLES
from tests.tiny_models import tiny_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "block_sparse",
}
BYTES = {}


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The attention function alone


def attention_case(pattern, length, causal, key_heads=4, head_dim=8, value_dim=6, padded=False):
    """Outputs, log-sum-exps, gradients of both, and bytes, in float64."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    shapes = (4, head_dim), (key_heads, head_dim), (key_heads, value_dim)
    whole = [torch.randn(2, length, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    lengths = torch.tensor([length, length // 3]) if padded else None
    valid = None if lengths is None else torch.arange(length) < lengths[:, None]
    output, lse = block_sparse_attention(
        *whole, pattern, causal=causal, scale=0.3, q_offset=0, key_valid=valid, return_lse=True
    )
    if padded:
        output, lse = output * valid[..., None, None], lse.masked_fill(~valid[..., None], float("-inf"))
    weights = torch.randn_like(output), torch.randn_like(lse)
    (_score(output, lse, weights)).backward()

    held = Slices(length, ranks).of(rank)
    mine = [x.detach()[:, held.start : held.stop].clone().requires_grad_() for x in whole]
    wire = Wire(None)
    plan = plan_exchange(pattern, Slices(length, ranks), causal, Sizes(4, key_heads, head_dim, value_dim))
    found, found_lse = attend_slices(plan, wire, *mine, 0.3, lengths, 0)
    cut = slice(held.start, held.stop)
    close(found, output.detach()[:, cut], 1e-12)
    close(found_lse, lse.detach()[:, cut], 1e-12)
    _score(found, found_lse, [weight[:, cut] for weight in weights]).backward()
    for ours, theirs in zip(mine, whole):
        close(ours.grad, theirs.grad[:, cut], 1e-11)
    for backward, direction in ((False, "forward"), (True, "backward")):
        sizes = {"key_heads": key_heads, "value_dim": value_dim, "causal": causal, "batch_size": 2}
        foretold = predicted_bytes(pattern, length, ranks, 4, head_dim, 8, backward=backward, **sizes)
        assert wire.sent[0, direction] == foretold[rank], (pattern, direction, wire.sent, foretold)
    return plan


def _score(output, lse, weights):
    return (output * weights[0]).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * weights[1]).sum()


def attention_under(index):
    pattern = EXAMPLES[index]
    for length, causal in product((50, 67), (True, False)):
        attention_case(pattern, length, causal)
    attention_case(pattern, 53, True, padded=True)
    attention_case(pattern, 53, True, key_heads=2)
    attention_case(pattern, 7, True)


def columns():
    """Large heads or many ranks make columns the cheaper route."""
    taken = 0
    for pattern in (Strided(5), Union([Local(3), Strided(5)]), Union([Local(11), Strided(5)]), Strided(8)):
        for length, padded in product((40, 53), (False, True)):
            plan = attention_case(pattern, length, True, head_dim=16, value_dim=16, padded=padded)
            taken += plan.routes[0].columns is not None
        attention_case(Strided(5), 41, False, head_dim=16, value_dim=16)
    attention_case(PerHead([Local(3), Strided(6)]), 47, True)
    assert taken or distributed.get_world_size() == 2


# ---------------------------------------------------------------------------------------------------------------------
# Models


def llama(pattern=None, **changes):
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    if pattern is not None:
        set_attention_patterns(model, pattern)
    return model


def mistral(**changes):
    return MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": 6, **changes}))


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 128}
    dropped = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropped, attn_implementation="block_sparse"))


def gpt_oss():
    config = GptOssConfig(
        **{**SIZES, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    )
    return GptOssForCausalLM(config)


def ours(name, **changes):
    return tiny_model(name, AutoModelForCausalLM, vocab_size=50, attn_implementation="block_sparse", **changes)


def batch_of(length, padding=None):
    ids = torch.randint(1, 50, (3, length))
    if padding is None:
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones(3, length, dtype=torch.long)
    ends = (length, length // 3, length // 2 + 1)
    for row, tokens in enumerate(ends):
        where = slice(tokens, None) if padding == "right" else slice(0, length - tokens)
        mask[row, where] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def whole_step(model, batch):
    """Loss, logits and gradients of one process."""
    model.zero_grad()
    mask = batch.get("attention_mask")
    extra = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    outputs = model(**batch, **extra, use_cache=False)
    outputs.loss.backward()
    return outputs.loss.detach(), outputs.logits.detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_equals(build, lengths=(37,), paddings=(None, "left", "right"), checkpointing=False):
    model = build().train()
    alone = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for length, padding in product(lengths, paddings):
        batch = batch_of(length, padding)
        loss, logits, wanted = whole_step(alone, batch)
        model.zero_grad()
        with context_parallel(model) as ranks:
            outputs = model(**ranks.shard(batch))
            outputs.loss.backward()
            ranks.sum_gradients()
        total = outputs.loss.detach().clone()
        distributed.all_reduce(total)
        close(total, loss, 1e-5)
        mask = batch.get("attention_mask")
        found = ranks.gather(outputs.logits, mask)
        valid = slice(None) if mask is None else mask.bool()
        close(found[valid], logits[valid], 1e-5)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            close(found[name], gradient, 1e-5)
    close(whole_step(model, batch)[0], loss, 0)  # nothing stays behind


PER_HEAD = PerHead([Union([Local(5), Sink(2)]), Strided(6), Fixed(7, 2), Local(9)])
MODELS = {
    "llama": partial(model_equals, llama, (37, 8), checkpointing=False),
    "llama, checkpointing": partial(model_equals, llama, checkpointing=True),
    "llama under a window with sinks": partial(model_equals, partial(llama, Union([Local(6), Sink(2)]))),
    "llama under strided": partial(model_equals, partial(llama, Union([Local(6), Strided(6)]), num_key_value_heads=4)),
    "llama under fixed": partial(model_equals, partial(llama, Fixed(8, 2))),
    "llama, a pattern for each head": partial(model_equals, partial(llama, PER_HEAD), checkpointing=True),
    "mistral": partial(model_equals, mistral, (37, 41)),
    "gpt2": partial(model_equals, gpt2),
    "gpt-oss": partial(model_equals, gpt_oss, paddings=(None, "right")),
    "rope_decoder": partial(model_equals, partial(ours, "rope_decoder")),
    "rope_decoder under fixed": partial(
        model_equals, partial(ours, "rope_decoder", attention_patterns=Fixed(8, 2, sub_blocks=2).to_dict())
    ),
    "sparse_transformer": partial(model_equals, partial(ours, "sparse_transformer"), checkpointing=True),
}
CASES = {
    **{f"attention under example {index}": partial(attention_under, index) for index in range(len(EXAMPLES))},
    "columns": columns,
    **MODELS,
}
