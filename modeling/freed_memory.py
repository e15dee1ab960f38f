"""What happens to memory on a CPU once a tensor is gone."""

from functools import cache

import torch

_FREED = (32 << 20) - (16 << 10)  # bytes, just below the largest that glibc takes as a sign of what is to come


@cache
def keep_freed_memory() -> None:
    """Free a large block once: glibc then gives memory back to the system only beyond twice that size (mallopt(3)).

    To have the pages of gradients mapped anew at each call costs up to a tenth of its time.
    """
    torch.empty(_FREED, dtype=torch.uint8, device="cpu")
