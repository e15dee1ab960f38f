"""What the two processes of test_tensor_parallel.py do: load every model cut between them, and compare it with a whole.

Each process holds the whole model, too, so what differs is found where it is.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig

import hf_tfamily
from hf_tfamily.modeling.attention_patterns import Fixed, Local, PerHead, Strided
from hf_tfamily.modeling.cache_patterns import PatternCache
from hf_tfamily.modeling.positions import POSITION_SCHEMES
from tests.loss_cases import cases
from tests.tiny_models import TINY, VOCABULARY, tiny_config

# Of four heads, of which a process has two, each sees something else.
FIXED = Fixed(6, 1, sub_blocks=4).to_dict()
MIXED = PerHead((Local(3), Strided(3), Local(5), Fixed(4, 1))).to_dict()
BACKENDS = ("eager", "sdpa", "block_sparse")
NEW_TOKENS = 9


class Case(NamedTuple):
    """A model with its weights, and a batch."""

    build: Callable[[], PreTrainedModel]
    batch: dict[str, torch.Tensor]
    backend: str | None = None
    generates: bool = False


def all_cases() -> dict[str, Case]:
    """Every head of every system as it comes, and what differs between heads under every backend."""
    found = {}
    for name, case in cases().items():
        if name.endswith(("multi_label_classification", "regression", "regression_of_three")):
            continue  # other losses of the same model
        generates = case.head in (AutoModelForCausalLM, AutoModelForSeq2SeqLM)
        found[name] = Case(case.build, case.collate(case.rows[:4]), generates=generates)
    swin = found["swin_transformer-single_label_classification"]
    found |= {f"swin_transformer-{backend}": swin._replace(backend=backend) for backend in BACKENDS}
    for backend in BACKENDS:
        for name, head, fields in _of_heads(backend):
            key = "-".join([name, backend, *(str(value) for value in fields.values() if isinstance(value, str))])
            key += "-patterns" * ("attention_patterns" in fields)
            found[key] = Case(_builder(name, head, fields, backend), _batch(name, head), backend, _is_decoder(head))
    return found


def _of_heads(backend: str):
    """(system, head, fields) of models in which each head is another's equal in nothing."""
    rope = {"num_key_value_heads": 2}
    yield "rope_decoder", AutoModelForCausalLM, {**rope, "attention_patterns": FIXED}
    yield "rope_decoder", AutoModelForCausalLM, {**rope, "attention_patterns": [MIXED, FIXED], "rotary_layout": "half"}
    yield "rope_decoder", AutoModelForCausalLM, {"position_encoding": "alibi", "attention_patterns": MIXED}
    yield "rope_decoder", AutoModelForCausalLM, {"position_encoding": "t5"}
    yield "sparse_transformer", AutoModelForCausalLM, {"attention_patterns": [MIXED, FIXED]}
    yield "image_transformer", AutoModelForCausalLM, {"attention_patterns": MIXED}
    yield "xl_sparse", AutoModelForCausalLM, {"attention_patterns": [MIXED, FIXED]}
    yield "memorizing_transformer", AutoModelForCausalLM, {"mem_len": 4, "segment_length": 4}
    for encoding in POSITION_SCHEMES:
        fields = {"position_encoding": encoding, "attention_patterns": MIXED, "max_position_embeddings": 32}
        if backend in _backends_of(encoding):
            yield "vanilla_encoder", AutoModelForMaskedLM, fields
        if backend == _backends_of(encoding)[-1]:
            yield "vanilla_transformer", AutoModelForSeq2SeqLM, {**fields, "decoder_attention_patterns": MIXED}
    if backend == "eager":
        yield (
            "compressive_transformer",
            AutoModelForCausalLM,
            {"compression": "most_used", "mem_len": 4, "compressed_mem_len": 2, "segment_length": 4},
        )


def _backends_of(encoding: str) -> tuple[str, ...]:
    """Those to which it makes a difference, or one."""
    if encoding in ("relative", "transformer_xl"):  # block_sparse takes no bias that is a tensor
        return ("eager", "sdpa")
    return BACKENDS if encoding in ("rotary", "alibi", "t5") else BACKENDS[-1:]


def _is_decoder(head: type) -> bool:
    return head is not AutoModelForMaskedLM


def _builder(name: str, head: type, fields: dict[str, Any], backend: str) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = tiny_config(name, **fields)
        for field in vars(config):
            if "dropout" in field and isinstance(getattr(config, field), float):
                setattr(config, field, 0.0)
        torch.manual_seed(0)
        model = head.from_config(config, attn_implementation=backend)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


def _batch(name: str, head: type) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    batch = TINY[name].inputs(2, 16)
    target = batch.get("decoder_input_ids", batch["input_ids"])
    batch["labels"] = target.clone()
    if name != "image_transformer":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, :3] = 0
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# A whole model and a cut one


def cut(folder: Path, model: PreTrainedModel, backend: str | None = None, how=None) -> PreTrainedModel:
    """The model as processes load it from a folder that the first of them writes."""
    if distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
    distributed.barrier()
    how = {"tp_plan": "auto"} if how is None else {"distributed_config": how}
    loaded = type(model).from_pretrained(folder, attn_implementation=backend, **how)
    distributed.barrier()
    return loaded


def compare(folder: Path, case: Case) -> dict[str, float]:
    """The largest differences between a whole model and a cut one, and how much of its weights this process holds."""
    whole = case.build()
    parts = cut(folder / "model", whole, case.backend or whole.config._attn_implementation)
    expected, loss = _step(whole.train(), case.batch)
    found, cut_loss = _step(parts.train(), case.batch)
    assert expected.keys() == found.keys()
    worst = max((_difference(found[name], gradient), name) for name, gradient in expected.items())
    result = {"loss": abs(loss - cut_loss), "gradients": worst[0], "worst": worst[1]}
    with torch.no_grad():
        first, second = (model.eval()(**case.batch) for model in (whole, parts))
        name = next(key for key in ("logits", "reconstruction") if getattr(first, key, None) is not None)
        result["outputs"] = _difference(getattr(second, name), getattr(first, name))
    if case.generates:
        result["tokens"] = _tokens_that_differ(whole, parts, case.batch)
    result["cut"] = sum(isinstance(parameter, DTensor) for parameter in parts.parameters())
    result["held"] = sum(_local(parameter).numel() for parameter in parts.parameters())
    result["all"] = sum(parameter.numel() for parameter in whole.parameters())
    return result


def _step(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """Two backward passes, whose gradients add up; all of them, and the loss."""
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return whole, loss.item()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() / max(1.0, other.abs().max().item())


def _tokens_that_differ(whole: PreTrainedModel, parts: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """In greedy generation with a cache."""
    start = {"input_ids": batch["input_ids"]}
    if not whole.config.is_encoder_decoder:
        start["input_ids"] = start["input_ids"][:, :7]
    if "attention_mask" in batch:
        start["attention_mask"] = batch["attention_mask"][:, : start["input_ids"].shape[1]]
        if not bool(start["attention_mask"].any(dim=-1).all()):
            del start["attention_mask"]
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    one, other = (model.generate(**start, **how) for model in (whole, parts))
    return int((one != other).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Saving, stock models, refusals


def saved(folder: Path) -> float:
    """How far weights that a cut model saved are from those it was loaded from."""
    whole = all_cases()["rope_decoder-block_sparse-patterns"].build()
    parts = cut(folder / "model", whole)
    parts.save_pretrained(folder / "again")
    distributed.barrier()
    expected, found = (load_file(folder / name / "model.safetensors") for name in ("model", "again"))
    assert found.keys() == expected.keys()
    return max(_difference(found[name], weight) for name, weight in expected.items())


def stock() -> Case:
    """A Llama whose heads follow patterns of their own."""

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))
        hf_tfamily.set_attention_patterns(model, [Fixed(6, 1, sub_blocks=4), PerHead((Local(3), Strided(3)) * 2)])
        return model

    batch = _batch("rope_decoder", AutoModelForCausalLM)
    return Case(build, batch, "block_sparse", generates=True)


def refusals(folder: Path) -> dict[str, str]:
    """What is said to numbers of heads that cannot be dealt out, and to a cache for all heads."""
    said = {}
    for name, fields in {"heads": {"num_attention_heads": 1}, "key heads": {"num_key_value_heads": 1}}.items():
        whole = _builder("rope_decoder", AutoModelForCausalLM, fields, "sdpa")()
        said[name] = _said(cut(folder / "model", whole), use_cache=False)
    whole = all_cases()["rope_decoder-block_sparse-patterns"].build()
    parts = cut(folder / "model", whole)
    said["cache"] = _said(parts, past_key_values=PatternCache.from_config(parts.config))
    assert _said(parts, past_key_values=DynamicCache()) == "nothing"
    return said


def without_gradients(folder: Path) -> dict[str, float]:
    """What a whole model and a cut one differ in, by what else reads patterns that differ between heads."""
    whole = all_cases()["rope_decoder-block_sparse-patterns"].build().eval()
    parts = cut(folder / "model", whole, "block_sparse").eval()
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    mask = (seen | torch.eye(12, dtype=torch.bool)).tril()
    found = {}
    with torch.no_grad():
        static = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
        one, other = (model.generate(ids, **static) for model in (whole, parts))
        found["static cache"] = float((one != other).sum())
        for backend in ("sdpa", "eager", "flex_attention"):
            for model in (whole, parts):
                model.set_attn_implementation(backend)
            masks = {} if backend == "flex_attention" else {"attention_mask": mask}
            found[backend] = _difference(parts(ids, **masks).logits, whole(ids, **masks).logits)
    return found


def _said(model: PreTrainedModel, **arguments) -> str:
    try:
        model.eval()(input_ids=torch.arange(1, 9)[None], **arguments)
    except ValueError as error:
        return str(error)
    return "nothing"


def two_ranks(folder: Path) -> None:
    found = {name: compare(folder, case) for name, case in all_cases().items()}
    found["stock"] = compare(folder, stock())
    results = {"cases": found, "saved": saved(folder), "said": refusals(folder), "others": without_gradients(folder)}
    (folder / f"found-{distributed.get_rank()}.json").write_text(json.dumps(results))


def four_ranks(folder: Path) -> None:
    """Pairs of processes that cut each layer, of which FSDP2 makes each hold a part of its part."""
    found = {}
    for name in ("rope_decoder-block_sparse-patterns", "rope_decoder-sdpa-t5", "transformer_xl-CausalLM"):
        case = all_cases()[name]
        whole = case.build()
        parts = cut(folder / "model", whole, case.backend, DistributedConfig(tp_size=2, fsdp_size=2))
        assert sum(isinstance(module, FSDPModule) for module in parts.modules()) > 2
        expected, loss = _step(whole.train(), case.batch)
        gradients, cut_loss = _step(parts.train(), case.batch)
        assert expected.keys() == gradients.keys()
        worst = max((_difference(gradients[key], gradient), key) for key, gradient in expected.items())
        found[name] = {"loss": abs(loss - cut_loss), "gradients": worst[0], "worst": worst[1]}
        held = sum(_local(parameter).numel() for parameter in parts.parameters())
        found[name]["held"] = held / sum(parameter.numel() for parameter in whole.parameters())
    (folder / f"four-{distributed.get_rank()}.json").write_text(json.dumps(found))
