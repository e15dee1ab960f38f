"""Who looks on while operators run."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_observed() -> bool:
    """Does somebody export, trace, count or transform operators, and know PyTorch's own alone?

    torch.compile is not meant: it takes operators that are registered.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        return False
    return is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()


def is_plain_on_cpu(*tensors: Tensor) -> bool:
    """Tensors of one type on a CPU, neither quantised, sharded nor empty, in a call that nobody observes or casts?"""
    if is_observed() or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.numel() > 0 for x in tensors)
    return plain and len({x.dtype for x in tensors}) == 1
