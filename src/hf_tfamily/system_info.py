"""What is installed, what it runs on, and which attention implementation really works where."""

import os
import platform
from collections.abc import Callable
from importlib import metadata

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_sparse.triton.views import dense_kernel
from .modeling.configuration_sparse_transformer import SparseTransformerConfig

PACKAGES = ("hf-tfamily", "torch", "transformers", "huggingface_hub", "accelerate", "triton", "datasets", "matplotlib")
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "block_sparse")


def versions() -> list[tuple[str, str]]:
    """(package, version) of Python and the packages that matter."""
    return [("python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """(device, description) of the CPU and every accelerator."""
    found = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        names = [getattr(torch, kind).get_device_name(index) for index in range(torch.accelerator.device_count())]
        found += [(f"{kind}:{index}", name) for index, name in enumerate(names)]
    return found


def attention_implementations() -> list[tuple[str, str, str, str]]:
    """(implementation, device, forward, backward), found by running a tiny Sparse Transformer."""
    kinds = sorted({name.partition(":")[0] for name, _ in devices()})
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    tried = [name for name in IMPLEMENTATIONS if name in known]
    return [(name, kind, *_try(name, kind)) for name in tried for kind in kinds]


def block_sparse_executors() -> list[tuple[str, str]]:
    """(device, what runs block_sparse there)."""
    return [(name, _executor(name)) for name, _ in devices()]


def _executor(device: str) -> str:
    kind = device.partition(":")[0]
    if kind == "cuda":
        view = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
        return (
            f"Triton kernels (triton {_version('triton')}), with relative scores up to head dimension 128; "
            f"views by {dense_kernel(view, view)}; single tokens by gathered keys and SDPA"
        )
    return "PyTorch: " + ("the flash kernel of CPUs" if kind == "cpu" else "matrix products")


def _try(implementation: str, device: str) -> tuple[str, str]:
    config = SparseTransformerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(device)
    ids = torch.zeros(1, 64, dtype=torch.long, device=device)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return _outcome(forward), _outcome(lambda: model(input_ids=ids, labels=ids).loss.backward())


def _outcome(run: Callable[[], None]) -> str:
    """ "yes", or the first line of why not."""
    try:
        run()
    except Exception as error:
        return f"no: {str(error).splitlines()[0][:80]}"
    return "yes"
