"""Past one process: rows cut into slices over ranks, which send each other only what is seen. See
docs/context_parallel.md."""

from .context import ContextParallel, context_parallel
from .exchange_plan import dense_bytes, predicted_bytes

__all__ = ["ContextParallel", "context_parallel", "dense_bytes", "predicted_bytes"]
