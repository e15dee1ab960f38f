"""What training keeps for the backward, kept on disk or in bfloat16 instead of in memory as it is.

    with on_disk("/scratch"):  # or in_bfloat16()
        model(**batch).loss.backward()

Made for gradient checkpointing, under which that is what each layer begins with, [B, T, hidden]. A recipe says it by
`training.kept_activations: disk`. Hooks on saved tensors do it; they hold for the thread that opened the context.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 1 << 20  # what is smaller stays as it is


@contextmanager
def on_disk(folder: str | Path | None = None, least_bytes: int = LEAST_BYTES) -> Iterator[None]:
    """Activations go to files and come back in the backward, bit for bit.

    Args:
        folder: where the files are while something needs them; the system's temporary folder if None, which may be in
            memory itself. A process that is killed leaves a folder `activations-*` there.
        least_bytes: smaller tensors stay in memory.
    """
    with tempfile.TemporaryDirectory(prefix="activations-", dir=folder) as place:
        numbers = itertools.count()

        def keep(tensor: torch.Tensor) -> torch.Tensor | _OnDisk:
            return _OnDisk.write(tensor, f"{place}/{next(numbers)}") if _is_large(tensor, least_bytes) else tensor

        with saved_tensors_hooks(keep, lambda kept: kept.read() if isinstance(kept, _OnDisk) else kept):
            yield


@contextmanager
def in_bfloat16(folder: None = None, least_bytes: int = LEAST_BYTES) -> Iterator[None]:
    """Activations of float32 are rounded to bfloat16, half as large; gradients are then those of what was rounded."""

    def keep(tensor: torch.Tensor) -> torch.Tensor | _Rounded:
        rounded = tensor.dtype == torch.float32 and _is_large(tensor, least_bytes)
        return _Rounded(tensor.detach().to(torch.bfloat16)) if rounded else tensor

    with saved_tensors_hooks(keep, lambda kept: kept.tensor.float() if isinstance(kept, _Rounded) else kept):
        yield


@contextmanager
def in_memory(folder: None = None) -> Iterator[None]:
    """Activations stay as they are."""
    yield


# By the words of a recipe's `training.kept_activations`; each takes a folder.
KEPT_ACTIVATIONS: dict[str, Callable[..., AbstractContextManager]] = {
    "memory": in_memory,
    "disk": on_disk,
    "bfloat16": in_bfloat16,
}


def _is_large(tensor: torch.Tensor, least_bytes: int) -> bool:
    """Is it an activation worth the trouble? They have three dimensions; weights have two or are leaves."""
    is_weight = tensor.is_leaf and tensor.requires_grad
    return tensor.is_floating_point() and tensor.ndim >= 3 and tensor.nbytes >= least_bytes and not is_weight


@dataclass
class _Rounded:
    tensor: torch.Tensor


@dataclass
class _OnDisk:
    """A tensor in a file, which goes when nobody holds this any more."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def write(cls, tensor: torch.Tensor, file: str) -> "_OnDisk":
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(file)
        return cls(Path(file), tensor.shape, tensor.dtype, tensor.device)

    def read(self) -> torch.Tensor:
        read = torch.from_numpy(np.fromfile(self.file, dtype=np.uint8)).view(self.dtype)
        return read.view(self.shape).to(self.device)

    def __del__(self) -> None:
        self.file.unlink(missing_ok=True)
