"""Models whose attention runs on Triton, in its interpreter or on a GPU, against eager: loss, gradients, generation."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

pytest.importorskip("triton")

from hf_tfamily import set_attention_patterns
from tests.block_sparse.triton_support import DEVICE, models_on_triton
from tests.tiny_models import tiny_config

LOCAL = {"type": "local", "window": 5}
STRIDED = {"type": "strided", "stride": 6}
MERGED = {"type": "union", "patterns": [LOCAL, STRIDED]}
FIXED = {"type": "fixed", "block": 6, "summary": 2, "sub_blocks": 2}
BY_TABLE = {"type": "union", "patterns": [STRIDED, {"type": "strided", "stride": 4}]}
SIZES = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": None}
SEGMENT, NUM_SEGMENTS, BATCH = 14, 2, 2
ROUNDING = 16 * torch.finfo(torch.float32).eps


def of_ours(name, **fields):
    config = tiny_config(name, **{**SIZES, **fields})
    return AutoModelForCausalLM.from_config(config)


def llama():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=1))
    set_attention_patterns(model, [MERGED, FIXED])
    return model


MODELS = {
    "sparse, strided": lambda: of_ours("sparse_transformer", attention_patterns=MERGED),
    "sparse, interleaved": lambda: of_ours("sparse_transformer", attention_patterns=[LOCAL, STRIDED]),
    "sparse, fixed": lambda: of_ours("sparse_transformer", attention_patterns=FIXED),
    "sparse, per head": lambda: of_ours(
        "sparse_transformer", attention_patterns={"type": "per_head", "patterns": [MERGED, FIXED]}
    ),
    "transformer_xl": lambda: of_ours("transformer_xl", mem_len=20),
    "transformer_xl, same length": lambda: of_ours("transformer_xl", mem_len=9, same_length=True),
    "compressive": lambda: of_ours("compressive_transformer", mem_len=6, compressed_mem_len=4, compression_rate=2),
    "memorizing": lambda: of_ours("memorizing_transformer", mem_len=6, memory_size=9, num_neighbors=3),
    "xl_sparse, strided": lambda: of_ours("xl_sparse", mem_len=20, attention_patterns=MERGED),
    "xl_sparse, fixed": lambda: of_ours("xl_sparse", mem_len=20, attention_patterns=[FIXED, LOCAL]),
    "xl_sparse, by table": lambda: of_ours("xl_sparse", mem_len=20, attention_patterns=BY_TABLE),
    "llama": llama,
}
RECURRENT = ("transformer_xl", "compressive", "memorizing", "xl_sparse")
LAW = {"llama": "block_sparse"}  # a stock model's eager knows no patterns: there it is PyTorch's executor
QUICK = ("sparse, per head", "transformer_xl", "compressive")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
)


def build(name):
    """The model as the law runs it; every weight, of biases and norms too, is away from what it began as."""
    model = MODELS[name]().to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(LAW.get(name, "eager"))
    return model


def loss_and_gradients(model, ids, recurrent):
    """Of rows with padding before them; a recurrent model reads them in segments, and its memory with them."""
    mask, targets = torch.ones_like(ids), ids.clone()
    mask[0, :4], targets[0, :5] = 0, -100  # what padding predicts is anything
    length = SEGMENT if recurrent else ids.shape[1]
    memory, loss = None, 0
    for start in range(0, ids.shape[1], length):
        piece = slice(start, start + length)
        shown = mask[:, : piece.stop]
        output = model(ids[:, piece], attention_mask=shown, labels=targets[:, piece], past_key_values=memory)
        memory, loss = output.past_key_values if recurrent else None, loss + output.loss
    names, parameters = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"loss": loss.detach()} | {n: grad for n, grad in zip(names, grads) if grad is not None}


@every_model
def test_loss_and_gradients_equal_eager(name):
    """Errors against float64 are at most twice those of eager, plus rounding: some gradients cancel to 0."""
    model = build(name)
    ids = torch.randint(SIZES["vocab_size"], (BATCH, NUM_SEGMENTS * SEGMENT), device=DEVICE)
    recurrent = name.startswith(RECURRENT)
    exact = loss_and_gradients(copy.deepcopy(model).double(), ids, recurrent)
    eager = loss_and_gradients(model, ids, recurrent)
    model.set_attn_implementation("block_sparse")
    with models_on_triton() as ran:
        ours = loss_and_gradients(model, ids, recurrent)
    assert len(ran) == 2 or DEVICE == "cuda", "an operator and its backward were to run on Triton"
    assert ours.keys() == eager.keys() == exact.keys()
    largest = max(true.abs().max() for true in exact.values())
    for key, true in exact.items():
        budget = 2 * (eager[key] - true).abs().max() + ROUNDING * largest
        error = (ours[key] - true).abs().max()  # NaN fails too
        assert error <= budget, f"{key}: {error:.2e} > {budget:.2e}"


@every_model
def test_generation_equals_eager(name):
    """Padding on the left; the prompt is read at once and then one token at a time."""
    model = build(name)
    ids = torch.randint(1, SIZES["vocab_size"], (BATCH, 10), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    eager = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    model.set_attn_implementation("block_sparse")
    with models_on_triton() as ran:
        ours = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    assert ran or DEVICE == "cuda", "an operator was to run on Triton"
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), atol=1e-4, rtol=1e-4)
