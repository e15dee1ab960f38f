"""One torch thread for each worker: two workers share two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # read when triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """What earlier tests of the same worker compiled counts towards torch.compile's limit of recompilations, and makes
    sizes symbols, for which Inductor's flex_attention on a CPU may write C++ that does not compile (torch 2.13)."""
    if any(word in request.node.name for word in ("compile", "backends_agree")):
        torch.compiler.reset()
