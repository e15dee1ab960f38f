"""A datastore on a disk: keys [N, E], values [N], and what they are of (Khandelwal et al. 2019, section 2).

    keys.npy     float16 (or float32) [N, E], the model's states, memory-mapped when read
    values.npy   int32 [N], the token that followed each
    index.faiss  for more than a million keys; made again from the keys where it is missing or not what was written
    store.json   what the store is of, and how many entries are written

Nothing in it is a pickle. Shapes: N entries, E width, n queries, k neighbours.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..whole_files import write_text
from .fingerprints import check_same, model_fingerprint, tokenizer_fingerprint
from .search import EXACT, NPROBE, exact_index, nearest_keys, read_index, write_quantized_index

KEYS, VALUES, INDEX, DESCRIPTION = "keys.npy", "values.npy", "index.faiss", "store.json"
FORMAT = 1
QUERIES = 1024  # searched at once
MEASURED = 2**24  # numbers of keys that are read at once to measure distances


class Datastore:
    """A finished datastore; its keys stay on the disk until they are searched.

    Attributes:
        folder: where it is.
        description: what store.json says.
        keys: [N, E]; values: [N].
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            ValueError: if the folder holds no datastore, one that was not finished, or files that are not as it says.
        """
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        if self.description["written"] < self.description["entries"]:
            raise ValueError(_half_written(self.folder, self.description))
        shape = (self.description["entries"], self.description["width"])
        self.keys = _mapped(self.folder / KEYS, shape, self.description["dtype"])
        self.values = _mapped(self.folder / VALUES, shape[:1], "int32")
        self._index = None

    def __len__(self) -> int:
        return self.description["entries"]

    def __repr__(self) -> str:
        return f"Datastore({str(self.folder)!r}, {len(self):,} keys of width {self.keys.shape[1]})"

    @property
    def kind(self) -> str:
        """The kind of its index: "flat" or "ivfpq"."""
        return self.description["index"]["kind"]

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raise ValueError, naming both, if the store is of another model or of another tokenizer."""
        where = str(self.folder)
        check_same(self.description["model"], model_fingerprint(model), "model", where)
        check_same(self.description["tokenizer"], tokenizer_fingerprint(tokenizer), "tokenizer", where)

    def check_k(self, k: int) -> None:
        """Raise ValueError unless there are so many neighbours."""
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be from 1 to the {len(self):,} keys of {self.folder}, got {k}.")

    def search(self, queries: torch.Tensor, k: int, nprobe: int = NPROBE) -> tuple[torch.Tensor, torch.Tensor]:
        """What followed the k keys that are nearest to each query, and how far these are, nearest first.

        Args:
            queries: [n, E] float32.
            nprobe: lists of an "ivfpq" index that each query reads.

        Returns:
            tokens [n, k] int64, and squared L2 distances [n, k] float32, measured on the keys themselves; infinite for
            a neighbour that the index has not found.

        Raises:
            ValueError: if there are fewer than k keys, or queries are of another width.
        """
        self.check_k(k)
        if queries.ndim != 2 or queries.shape[1] != self.keys.shape[1]:
            raise ValueError(f"queries must be [n, {self.keys.shape[1]}], got {list(queries.shape)}.")
        found = [self._search(block, k, nprobe) for block in queries.detach().cpu().float().split(QUERIES)]
        tokens, distances = (torch.cat(parts) for parts in zip(*found))
        return tokens, distances

    def _search(self, queries: torch.Tensor, k: int, nprobe: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.from_numpy(nearest_keys(self.index(), self.kind, queries.numpy(), k, nprobe))
        distances, order = self._distances(queries, numbers).sort(dim=1)
        if distances[:, 0].isinf().any():
            raise ValueError(f"No neighbour was found in the {nprobe} nearest lists of {self.folder}; raise nprobe.")
        numbers = numbers.clamp(min=0).gather(1, order)
        return torch.from_numpy(self.values)[numbers].long(), distances

    def _distances(self, queries: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """[n, k], by differences: an index's own sums of squares lose digits, or are of quantized keys."""
        keys, rows = torch.from_numpy(self.keys), max(1, MEASURED // (numbers.shape[1] * self.keys.shape[1]))
        parts = [
            (keys[some.clamp(min=0)].float() - asked[:, None]).square_().sum(dim=-1)
            for asked, some in zip(queries.split(rows), numbers.split(rows))
        ]
        return torch.cat(parts).masked_fill(numbers < 0, torch.inf)

    def index(self):
        """The faiss index: of keys in memory, or read from its file, made again where that is not whole."""
        if self._index is None and self.kind == EXACT:
            self._index = exact_index(self.keys)
        elif self._index is None:
            if digest_of(self.folder / INDEX) != self.description["index"]["sha256"]:
                self.rebuild_index()
            self._index = read_index(self.folder / INDEX)
        return self._index

    def rebuild_index(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Make the index again from the keys; do so with the store of a stranger, since faiss trusts what it reads."""
        self._index = None
        if self.kind != EXACT:
            write_quantized_index(self.keys, self.folder / INDEX, advance)
            self.description["index"]["sha256"] = digest_of(self.folder / INDEX)
            write_description(self.folder, self.description)


def read_description(folder: Path) -> dict[str, Any]:
    """What store.json says. Raises ValueError if there is none, naming a half-written store that lies beside."""
    file = folder / DESCRIPTION
    if not file.is_file():
        partial = partial_of(folder)
        if (partial / DESCRIPTION).is_file():
            raise ValueError(_half_written(partial, read_description(partial)))
        raise ValueError(f"{folder} is no datastore: it has no {DESCRIPTION}. `hf-tfamily knn build` makes one.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        found = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as the description of a datastore.") from error
    if found != FORMAT:
        raise ValueError(f"{file} is of format {found}, and this version reads {FORMAT}.")
    return description


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write store.json: whole, or not at all."""
    write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")


def partial_of(folder: Path) -> Path:
    """Where a store is while it is written."""
    return folder.with_name(f"{folder.name}.partial")


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _half_written(folder: Path, description: dict[str, Any]) -> str:
    return (
        f"{folder} is half-written: {description['written']:,} of {description['entries']:,} entries. Go on with the "
        "command that began it and --resume (resume=True)."
    )


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array in a file, which is read as it is used. Raises ValueError if it is not as the store says."""
    try:
        # Copy-on-write: torch wants memory that might be written; the file never is.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read, or is cut: {error}") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, and {DESCRIPTION} says {dtype} {shape}.")
    return array.view(np.ndarray)
