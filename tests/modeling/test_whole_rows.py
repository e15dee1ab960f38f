"""Context parallelism hands each process a part of every row, which no model here can follow: refused, not wrong."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_tfamily import Local, set_attention_patterns
from tests.tiny_models import TINY, all_heads, batch_for, tiny_model


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def dealt_out(mesh):
    return context_parallel(mesh, buffers=[torch.zeros(1, 8)], buffer_seq_dims=[1])


@pytest.mark.parametrize("name", [name for name, facts in TINY.items() if facts.takes_ids])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "block_sparse"])
def test_models_refuse_parts_of_rows(mesh, name, implementation):
    head = next(head for system, head in all_heads() if system == name)
    model, inputs = tiny_model(name, head), batch_for(name, head)
    model.set_attn_implementation(implementation)
    assert not model.supports_context_parallel
    model(**inputs)
    with dealt_out(mesh), pytest.raises(ValueError, match=r"holds a part of every row.*; use data parallelism or FSDP"):
        model(**inputs)
    model(**inputs)


@pytest.mark.parametrize("pattern", [None, Local(4)])
def test_the_engine_refuses_parts_of_rows_of_stock_models(mesh, pattern):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model.set_attn_implementation("block_sparse")
    set_attention_patterns(model, pattern)
    with dealt_out(mesh), pytest.raises(ValueError, match="context_parallel each process holds a part of every row"):
        model(torch.zeros(1, 8, dtype=torch.long))
