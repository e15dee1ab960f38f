"""Who looks on while operators run."""

import torch
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
