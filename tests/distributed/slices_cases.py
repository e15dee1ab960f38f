"""What each rank of test_context_parallel.py runs: a model whose rows are cut over ranks equals one process.

Every rank has everything whole as well, and compares.
"""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from hf_tfamily import set_attention_patterns
from hf_tfamily.block_sparse.cpu import block_sparse_attention
from hf_tfamily.distributed import context_parallel, predicted_bytes
from hf_tfamily.distributed.attention import attend_slices
from hf_tfamily.distributed.exchange import Wire
from hf_tfamily.distributed.exchange_plan import Sizes, Slices, plan_exchange
from hf_tfamily.modeling.attention_patterns import Fixed, Local, PerHead, Sink, Strided, Union
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


def half_precision():
    """Log-sum-exps travel in float32, beside outputs in bfloat16; bytes are counted so."""
    for pattern in (Union([Local(3), Strided(5)]), Union([Local(5), Sink(2)])):
        whole = [torch.randn(2, 41, 4, 16, dtype=torch.bfloat16) for _ in range(3)]
        wanted = block_sparse_attention(*(x.double() for x in whole), pattern, causal=True, scale=0.25, q_offset=0)
        wire, slices = Wire(None), Slices(41, distributed.get_world_size())
        held = slices.of(wire.rank)
        mine = [x[:, held.start : held.stop].clone().requires_grad_() for x in whole]
        plan = plan_exchange(pattern, slices, True, Sizes(4, 4, 16, 16))
        output, lse = attend_slices(plan, wire, *mine, 0.25, None, 0)
        assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        close(output.double(), wanted[:, held.start : held.stop], 0.05)
        output.sum().backward()
        for backward, direction in ((False, "forward"), (True, "backward")):
            foretold = predicted_bytes(pattern, 41, slices.ranks, 4, 16, 2, batch_size=2, backward=backward)
            assert wire.sent[0, direction] == foretold[wire.rank]


def autocast():
    """A model under autocast, held to itself in one process."""
    model, batch = llama(Union([Local(6), Sink(2)])).train(), batch_of(37, "right")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, wanted = whole_step(copy.deepcopy(model), batch)
        with context_parallel(model) as ranks:
            outputs = model(**ranks.shard(batch))
            outputs.loss.backward()
            ranks.sum_gradients()
    total = outputs.loss.detach().clone()
    distributed.all_reduce(total)
    close(total, loss, 0.01)
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name], 0.02)


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


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    dropped = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = BertConfig(**sizes, **dropped, vocab_size=50, attn_implementation="block_sparse")
    return BertModel(config, add_pooling_layer=False)


def ours(name, **changes):
    return without_dropout(
        tiny_model(name, AutoModelForCausalLM, vocab_size=50, attn_implementation="block_sparse", **changes)
    )


def without_dropout(model):
    """Each rank draws its own."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


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


# ---------------------------------------------------------------------------------------------------------------------
# Recurrent models: each rank's memory is the next one's


def memory_equals(name, length=37, padded=False, **changes):
    """As one process that reads the slices in a row; then a second batch that goes on."""
    model = without_dropout(tiny_model(name, AutoModelForCausalLM, vocab_size=50, **changes)).train()
    alone = copy.deepcopy(model)
    batches = [batch_of(length, "left" if padded else None), batch_of(length)][: 1 if padded else 2]
    memory, rank, size = None, distributed.get_rank(), distributed.get_world_size()
    ours_memory = None
    for batch in batches:
        model.zero_grad()
        alone.zero_grad()
        with context_parallel(model) as ranks:
            mine = ranks.shard(batch)
            outputs = model(**mine, past_key_values=ours_memory)
            outputs.loss.backward()
            ranks.sum_gradients()
            ours_memory = ranks.hand_round(outputs.past_key_values)
        assert (ranks.sent["memory", "forward"] > 0) == (size > 1)
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        losses = []
        for held in _all_slices(model, length):
            read = slice(held.start, held.stop)
            mask = {"attention_mask": batch["attention_mask"][:, : held.stop]} if padded else {}
            given = {"input_ids": batch["input_ids"][:, read], "shift_labels": targets[:, read], **mask}
            one = alone(**given, past_key_values=memory, use_cache=True, num_items_in_batch=(targets != -100).sum())
            memory = one.past_key_values
            one.loss.backward()
            losses.append(one.loss.detach())
        close(outputs.loss.detach(), losses[rank], 1e-5)
        found, wanted = gradients(model), gradients(alone)
        for key, gradient in wanted.items():
            close(found[key], gradient, 1e-5)
    assert (ours_memory is not None) == (rank == 0)


@torch.no_grad()
def memory_evaluates(name, length=37, **changes):
    """Without gradients memories hold keys and values."""
    model, batch = tiny_model(name, AutoModelForCausalLM, vocab_size=50, **changes), batch_of(length)
    memory, found = None, []
    for held in _all_slices(model, length):
        outputs = model(batch["input_ids"][:, held.start : held.stop], past_key_values=memory, use_cache=True)
        memory = outputs.past_key_values
        found.append(outputs.logits)
    with context_parallel(model) as ranks:
        logits = model(**ranks.shard({"input_ids": batch["input_ids"]})).logits
    close(logits, found[ranks.rank], 1e-5)


def _all_slices(model, length):
    step = model.config.segment_length or 1
    cut = Slices(-(-length // step), distributed.get_world_size())
    return [range(held.start * step, min(held.stop * step, length)) for held in map(cut.of, range(cut.ranks))]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by all ranks alike


def refused(call, *words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        call()
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def refusals_of_models():
    def entered(model):
        return lambda: context_parallel(model).start()

    refused(entered(llama(attn_implementation="eager")), "eager", "set_attn_implementation")
    refused(entered(LlamaForSequenceClassification(LlamaConfig(**SIZES))), "head", "whole rows")
    refused(entered(llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})), "dynamic")
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    refused(entered(BertModel(BertConfig(**encoder, attn_implementation="block_sparse"))), "pooler")
    refused(entered(tiny_model("vanilla_transformer", AutoModelForSeq2SeqLM)), "two sequences")
    refused(entered(ours("rope_decoder", position_encoding="alibi")), "scores by distance")
    long = tiny_model("long_encoder", AutoModelForMaskedLM, attn_implementation="block_sparse")
    refused(entered(long), "global tokens, which every rank would need")
    refused(entered(torch.nn.Linear(2, 2)), "Linear")
    refused(entered(tiny_model("transformer_xl", AutoModelForSequenceClassification)), "whole rows")

    wrong = llama()
    wrong.model.rotary_emb.forward = _positions_from_zero(wrong.model.rotary_emb.forward)
    refused(entered(wrong), "does not equal one process")
    half = llama()
    half.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    refused(entered(half), "1 of 2 layers")
    assert not any(hasattr(module, "context_parallel") for module in half.modules())

    different = llama()
    with torch.no_grad():
        different.model.layers[0].self_attn.k_proj.weight.mul_(1 + distributed.get_rank())
    refused(entered(different), "different weights")


def _positions_from_zero(forward):
    return lambda states, position_ids: forward(states, torch.arange(states.shape[1])[None])


def refusals_of_batches():
    model, batch = llama(Local(6)).train(), batch_of(24)
    with context_parallel(model) as ranks:
        refused(lambda: context_parallel(model).start(), "already")
        refused(lambda: ranks.shard({"input_ids": torch.ones(1, 1, dtype=torch.long)}), "cannot be cut")
        packed = torch.arange(24).remainder(9).expand(3, -1)
        refused(lambda: ranks.shard({**batch, "position_ids": packed}), "packed")
        refused(lambda: ranks.shard({**batch, "pixels": torch.ones(3, 24)}), "pixels")
        refused(lambda: ranks.shard({**batch, "attention_mask": torch.ones(3, 1, 24, 24)}), "attention_mask")
        refused(lambda: ranks.shard({**batch, "logits_to_keep": 1}), "logits_to_keep")
        refused(lambda: model(**batch), "position_ids")
        others = {**batch, "input_ids": batch["input_ids"] + (ranks.rank == 1)}
        refused(lambda: ranks.shard(others), "different batches")
        cut = ranks.shard(batch)
        refused(lambda: model(**{**cut, "shift_labels": None}), "shift_labels")
        refused(lambda: model(**{**cut, "labels": None, "num_items_in_batch": None}), "num_items_in_batch")
        refused(lambda: model(**{**cut, "use_cache": True}), "no generation")
        refused(lambda: model.generate(batch["input_ids"], max_new_tokens=2), "generation")
        refused(lambda: model(**{**cut, "position_ids": torch.arange(cut["input_ids"].shape[1])[None]}), "shard")
        first = 1 if ranks.rank == 0 else 0  # one rank alone has another batch: all must say so
        refused(lambda: model(input_ids=cut["input_ids"][first:], position_ids=cut["position_ids"][first:]), "rows")
        refused(lambda: model.model(input_ids=cut["input_ids"]), "call the model that was given")
        model.set_attn_implementation("sdpa")
        refused(lambda: model(**cut), "exchanges keys")
    model(**batch)


def refusals_of_losses():
    model = tiny_model("vanilla_encoder", AutoModelForMaskedLM, vocab_size=50, attn_implementation="block_sparse")
    with context_parallel(model) as ranks:
        refused(lambda: ranks.shard(batch_of(24)), "loss of its own")


def one_way_equals(build, padding=None):
    """Without a loss: hidden states or logits, and gradients of a sum of them, in float64."""
    model = build().double().train()
    alone, batch = copy.deepcopy(model), batch_of(37, padding)
    batch.pop("labels")
    mask = batch.get("attention_mask")
    whole = alone(**batch)[0]
    weights = torch.randn_like(whole.detach()) * (1 if mask is None else mask[..., None])
    (whole * weights).sum().backward()
    with context_parallel(model) as ranks:
        found = model(**ranks.shard(batch))[0]
        cut = ranks.shard({"inputs_embeds": weights, **({} if mask is None else {"attention_mask": mask})})
        (found * cut["inputs_embeds"]).sum().backward()
        ranks.sum_gradients()
    valid = slice(None) if mask is None else mask.bool()
    close(ranks.gather(found.detach(), mask)[valid], whole.detach()[valid], 1e-10)
    for wanted, found in zip(alone.parameters(), model.parameters()):
        if wanted.grad is not None:
            close(found.grad, wanted.grad, 1e-10)


def sharded_parameters():
    """FSDP2 over the same ranks, which averages gradients."""
    model, batch = llama(Local(6)).train(), batch_of(37, "left")
    loss, _, wanted = whole_step(copy.deepcopy(model), batch)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with context_parallel(model) as ranks:
        outputs = model(**ranks.shard(batch))
        (outputs.loss * distributed.get_world_size()).backward()
    total = outputs.loss.detach().clone()
    distributed.all_reduce(total)
    close(total, loss, 1e-5)
    for name, parameter in model.named_parameters():
        close(parameter.grad.full_tensor(), wanted[name], 1e-5)


def two_batches_in_flight():
    """Checkpoints compute each batch anew, with its own padding."""
    model = llama(Local(6)).train()
    alone = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    batches = [batch_of(37, "right"), batch_of(41), batch_of(37)]
    batches[2]["attention_mask"] = batches[0]["attention_mask"].flip(0)
    with context_parallel(model) as ranks:
        sum([model(**ranks.shard(batch)).loss for batch in batches]).backward()
        ranks.sum_gradients()
    sum(alone(**batch, use_cache=False).loss for batch in batches).backward()
    found = gradients(model)
    for name, gradient in gradients(alone).items():
        close(found[name], gradient, 1e-5)


def backward_outside():
    """Without checkpoints it is all the same; with them layers are computed anew, and need the others."""
    model, batch = llama(Local(6)).train(), batch_of(24)
    with context_parallel(model) as ranks:
        loss = model(**ranks.shard(batch)).loss
    loss.backward()
    ranks.sum_gradients()
    _, _, wanted = whole_step(copy.deepcopy(model), batch)
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name], 1e-5)
    model.gradient_checkpointing_enable()
    with context_parallel(model) as ranks:
        loss = model(**ranks.shard(batch)).loss
    refused(loss.backward, "go back inside it")


def data_and_context_parallel():
    """Ranks 0 and 1 share rows, 2 and 3 others; DistributedDataParallel averages over all four."""
    if distributed.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model, batch = llama(Local(6)).train(), batch_of(24)
    _, _, wanted = whole_step(copy.deepcopy(model), batch)
    mine = {name: value[mesh["dp"].get_local_rank() :: 2] for name, value in batch.items()}
    mine["num_items_in_batch"] = torch.tensor(3 * 23)
    with context_parallel(model, mesh["cp"]) as ranks:
        parallel = DistributedDataParallel(model)
        outputs = parallel(**ranks.shard(mine))
        (outputs.loss * distributed.get_world_size()).backward()
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name], 1e-5)


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
    "vanilla_transformer": partial(model_equals, partial(ours, "vanilla_transformer")),
    "bert": partial(one_way_equals, bert, "right"),
}
MEMORIES = {
    "transformer_xl": partial(memory_equals, "transformer_xl"),
    "transformer_xl, segments": partial(memory_equals, "transformer_xl", segment_length=5),
    "transformer_xl, padding": partial(memory_equals, "transformer_xl", padded=True),
    "compressive_transformer": partial(memory_equals, "compressive_transformer"),
    "memorizing_transformer": partial(memory_equals, "memorizing_transformer", segment_length=5, mem_len=4),
    "xl_sparse": partial(memory_equals, "xl_sparse"),
    "transformer_xl evaluates": partial(memory_evaluates, "transformer_xl"),
    "compressive_transformer evaluates": partial(memory_evaluates, "compressive_transformer"),
    "memorizing_transformer evaluates": partial(memory_evaluates, "memorizing_transformer", mem_len=4),
    "xl_sparse evaluates": partial(memory_evaluates, "xl_sparse"),
}
CASES = {
    **{f"attention under example {index}": partial(attention_under, index) for index in range(len(EXAMPLES))},
    "columns": columns,
    "half precision": half_precision,
    "autocast": autocast,
    **MODELS,
    **MEMORIES,
    "two batches in flight": two_batches_in_flight,
    "backward outside": backward_outside,
    "sharded parameters": sharded_parameters,
    "data and context parallel": data_and_context_parallel,
    "refusals of models": refusals_of_models,
    "refusals of batches": refusals_of_batches,
    "refusals of losses": refusals_of_losses,
}
