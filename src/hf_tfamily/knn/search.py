"""Nearest neighbours by faiss: exact up to a million keys, an inverted file with product quantization beyond.

What an index finds is measured again on the keys themselves (`Datastore.search`), so an index decides which neighbours
are found and never how far they are. Shapes: n queries, k neighbours, N keys, E width.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..data.sequences import require

EXACT, QUANTIZED, BY_SIZE = "flat", "ivfpq", "auto"
EXACT_UP_TO = 1_000_000  # keys
LEAST_QUANTIZED = 1024  # keys that train the 256 values of a code
CODE_BYTES = 64  # of a quantized key at most, as in the paper (section 4.1)
PER_LIST = 39  # keys that faiss wants to train each list with
TRAINED_ON = 1_000_000  # keys at most
ADDED = 65_536  # keys at once
NPROBE = 32  # lists that a query reads, as in the paper (section 4.1)


def index_kind(asked: str, entries: int) -> str:
    """ "flat" or "ivfpq". Raises ValueError for what is neither, nor "auto", and for too few keys to quantize."""
    if asked not in (EXACT, QUANTIZED, BY_SIZE):
        raise ValueError(f'index must be "{BY_SIZE}", "{EXACT}" or "{QUANTIZED}", got {asked!r}.')
    if asked == QUANTIZED and entries < LEAST_QUANTIZED:
        raise ValueError(f'index="{QUANTIZED}" needs {LEAST_QUANTIZED:,} keys, got {entries:,}; give "{EXACT}".')
    if asked == BY_SIZE:
        return EXACT if entries <= EXACT_UP_TO else QUANTIZED
    return asked


def index_bytes(kind: str, entries: int, width: int) -> int:
    """What an index takes on a disk, roughly; the exact one is the keys."""
    return 0 if kind == EXACT else entries * (code_bytes(width) + 8) + 4 * width * number_of_lists(entries)


def code_bytes(width: int) -> int:
    """Bytes of a quantized key: parts of equal width, one byte each."""
    return next(size for size in range(CODE_BYTES, 0, -1) if width % size == 0)


def number_of_lists(entries: int) -> int:
    """About 4 sqrt(N), a power of 2."""
    return max(1, min(2 ** round(math.log2(4 * math.sqrt(entries))), entries // PER_LIST))


def exact_index(keys: np.ndarray):
    """All keys in float32 in memory, 4 N E bytes."""
    index = require("faiss").IndexFlatL2(keys.shape[1])
    for start in range(0, len(keys), ADDED):
        index.add(_block(keys, start))
    return index


def write_quantized_index(keys: np.ndarray, path: Path, advance: Callable[[int], None] = lambda count: None) -> None:
    """Train an index of `keys` [N, E] and write it: whole, or not at all. The same keys give the same index."""
    faiss = require("faiss")
    entries, width = keys.shape
    lists = number_of_lists(entries)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, lists, code_bytes(width), 8)
    count = min(entries, max(PER_LIST * lists, ADDED), TRAINED_ON)
    chosen = np.sort(np.random.default_rng(0).choice(entries, count, replace=False))
    index.train(keys[chosen].astype(np.float32))
    for start in range(0, entries, ADDED):
        block = _block(keys, start)
        index.add(block)
        advance(len(block))
    being_written = path.with_name(f"{path.name}.tmp")
    faiss.write_index(index, str(being_written))
    being_written.replace(path)


def read_index(path: Path):
    """An index that `write_quantized_index` wrote. Raises ValueError if faiss cannot read it."""
    try:
        return require("faiss").read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index that faiss can read: {str(error).splitlines()[0]}") from error


def nearest_keys(index, kind: str, queries: np.ndarray, k: int, nprobe: int) -> np.ndarray:
    """Numbers of keys [n, k]; -1 where the lists that were read hold no more."""
    options = {}
    if kind == QUANTIZED:
        if nprobe < 1:
            raise ValueError(f"nprobe must be at least 1, got {nprobe}.")
        options["params"] = require("faiss").SearchParametersIVF(nprobe=min(nprobe, index.nlist))
    _, numbers = index.search(np.ascontiguousarray(queries, np.float32), k, **options)
    return numbers


def _block(keys: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(keys[start : start + ADDED], np.float32)
