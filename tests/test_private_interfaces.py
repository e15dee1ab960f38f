"""Private interfaces of torch and Transformers that we stand on, all of them, each with what an upgrade would break.

A public one could not do it: the reason is said. A name that is used in the code and missing here fails too.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer
from transformers.generation import GenerationMixin
from transformers.utils import output_capturing

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten

# torch operator: its arguments, and what uses it.
OPERATORS = {
    # Flash attention of CPUs with its log-sum-exp, which merges parts and which no public function hands out.
    "_scaled_dot_product_flash_attention_for_cpu": "block_sparse on a CPU, forward (cpu.py)",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "block_sparse on a CPU, backward (cpu.py)",
    # The same of GPUs, for patterns that are dense attention on a view.
    "_scaled_dot_product_flash_attention": "block_sparse on a GPU, views (triton/views.py)",
    "_scaled_dot_product_flash_attention_backward": "block_sparse on a GPU, views, backward",
    "_scaled_dot_product_cudnn_attention": "block_sparse on a GPU, views by cuDNN",
    "_scaled_dot_product_cudnn_attention_backward": "block_sparse on a GPU, views by cuDNN, backward",
}
# What Transformers asks of models and tells them: its contract of version 5, though named with an underscore.
METHODS = {
    "_check_and_adjust_attn_implementation": (
        PreTrainedModel,
        "block_sparse by default, and the refusals that name it",
    ),
    "_init_weights": (PreTrainedModel, "initial weights of every system"),
    "_resize_token_embeddings": (PreTrainedModel, "resize_token_embeddings of the vanilla Transformer's two tables"),
    "_get_resized_embeddings": (PreTrainedModel, "resize_token_embeddings of the vanilla Transformer's two tables"),
    "_prepare_cache_for_generation": (GenerationMixin, "generate() with a PatternCache"),
    "_supports_default_dynamic_cache": (GenerationMixin, "generate() of recurrent models with their own memory"),
}
ATTRIBUTES = {
    "_no_split_modules": "FSDP and device_map",
    "_supports_sdpa": "attn_implementation='sdpa'",
    "_supports_flex_attn": "attn_implementation='flex_attention'",
    "_tied_weights_keys": "tied embeddings in checkpoints",
    "_can_record_outputs": "output_hidden_states and output_attentions",
}


FUNCTIONS = {
    # A check in a compiled graph without waiting for the device; torch._check wants a value of the host.
    "_assert_async": "packed rows of stock models under torch.compile (mask_checks.py)",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_torch(name):
    assert hasattr(aten, name), f"torch has lost {name}: {OPERATORS[name]}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_torch(name):
    assert callable(getattr(torch, name, None)), f"torch has lost {name}: {FUNCTIONS[name]}"


def test_what_the_flash_attention_of_cpus_gives():
    query, key, value = torch.randn(3, 1, 2, 8, 16).unbind(0)
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True, scale=0.5)
    scores = (query @ key.mT * 0.5).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ value)


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_transformers(name):
    home, feature = METHODS[name]
    assert callable(getattr(home, name, None)), f"Transformers has lost {home.__name__}.{name}: {feature}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_transformers_reads(name):
    sources = inspect.getsource(inspect.getmodule(PreTrainedModel)) + inspect.getsource(output_capturing)
    assert name in sources, f"Transformers no longer reads {name}: {ATTRIBUTES[name]}"


def test_label_smoothing_goes_by_a_table_of_class_names():
    """No public name says that a model shifts labels; causal_lm.ShiftedLabels enters ours in this table."""
    source = inspect.getsource(Trainer.compute_loss)
    assert "model_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()" in source


def test_nothing_else_private_of_torch_is_used():
    pattern = re.compile(r"(?:torch|aten|ops)\.(_[a-z]\w+)|torch\._C")
    for path in [*ROOT.glob("modeling/*.py"), *ROOT.glob("src/hf_tfamily/**/*.py")]:
        for found in pattern.finditer(path.read_text()):
            assert found[1] in {*OPERATORS, *FUNCTIONS}, (
                f"{path.relative_to(ROOT)}: {found[0]} is private and not in the list above"
            )


def test_no_private_names_of_either_are_imported():
    for path in [*ROOT.glob("modeling/*.py"), *ROOT.glob("src/hf_tfamily/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "transformers"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                private = [name for name in names if name.startswith("_")]
                assert not private, f"{path.relative_to(ROOT)}, line {node.lineno}: {private}"
