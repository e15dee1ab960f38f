"""Building a datastore: one pass of the model over a text, which may be cut off at any time and gone on with.

While it lasts everything is in FOLDER.partial; whatever is at FOLDER is whole. store.json says how many entries are
on the disk and is written after them, so what was being written when a process died is written again.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..run_errors import CURES, RunError
from ..run_lock import locked
from .datastore import (
    DESCRIPTION,
    FORMAT,
    INDEX,
    KEYS,
    VALUES,
    Datastore,
    digest_of,
    partial_of,
    read_description,
    write_description,
)
from .fingerprints import model_fingerprint, tokenizer_fingerprint
from .progress import progress_bar
from .search import BY_SIZE, EXACT, index_bytes, index_kind, write_quantized_index
from .states import FFN_INPUT, StateRecorder
from .windows import (
    as_documents,
    batches,
    check_window,
    count_predictions,
    default_window,
    read,
    windows_of,
)

DTYPES = ("float16", "float32")


def build_datastore(
    model: PreTrainedModel,
    tokens,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keys: str = FFN_INPUT,
    window: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    dtype: str = "float16",
    index: str = BY_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Datastore:
    """Write an entry (state before a token, the token) for every token of a text but a document's first.

    Args:
        model: any causal language model; it is put in evaluation mode and stays where it is.
        tokens: ids [n], rows of ids [rows, n], or a list of documents, each [n].
        folder: where the store will be; until then it is in `folder.partial`.
        tokenizer: whose ids they are; the store then refuses others.
        keys: "ffn_input", the input of the last layer's feed-forward network (the paper's choice, section 5); "final",
            the base model's last hidden state; or the dotted name of a module, whose input it is.
        window: tokens read at once [default: the model's positions, at most 1,024].
        context: tokens of a window that only help to predict the others [default: half of it].
        batch_size: windows read at once.
        dtype: "float16" or "float32", of the keys.
        index: "flat" (exact), "ivfpq", or "auto": exact up to a million keys.
        resume: go on with a store that was cut off.
        overwrite: throw one away that was cut off, and replace a finished one once the new one is finished.
        say: called with lines such as what the store will take on the disk.

    Raises:
        ValueError: if there is nothing to predict, an id that the model does not know, a window that does not fit it,
            no such module, or states that are not finite or too large for float16.
        RunError: if there is a store already or a half-written one and neither flag says what to do with it, if what is
            to be gone on with is another store, or if the disk takes no more.
    """
    folder, recorder = Path(folder), StateRecorder(model, keys)
    model.eval()
    documents = as_documents(tokens, vocabulary_of(model))
    window = default_window(model) if window is None else window
    context = window // 2 if context is None else context
    check_window(model, window, context)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    entries = count_predictions(documents)
    kind = index_kind(index, entries)
    with recorder, locked(folder.with_name(f"{folder.name}.lock")):
        description = {
            "format": FORMAT,
            "entries": entries,
            "width": _width(model, recorder, documents),
            "dtype": dtype,
            "keys": keys,
            "module": recorder.name,
            "window": window,
            "context": context,
            "vocab_size": vocabulary_of(model),
            "text_sha256": _digest(documents),
            "model": model_fingerprint(model),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "written": 0,
            "index": {"kind": kind},
        }
        partial = _begin(folder, description, resume, overwrite, say)
        _write_entries(model, recorder, documents, partial, batch_size, progress)
        _write_index(partial, kind, progress)
        _publish(partial, folder)
    return Datastore(folder)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of ids that the model knows."""
    return model.config.get_text_config(decoder=True).vocab_size


@torch.inference_mode()
def _width(model: PreTrainedModel, recorder: StateRecorder, documents: Sequence[np.ndarray]) -> int:
    """The width of keys: that of the state at one token."""
    token = next(int(document[0]) for document in documents if len(document))
    model(input_ids=torch.tensor([[token]], device=model.device), use_cache=False)
    return recorder.states(1).shape[-1]


def _digest(documents: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{len(document)} ".encode())
        digest.update(np.ascontiguousarray(document, "<i8").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _begin(folder: Path, description: dict[str, Any], resume: bool, overwrite: bool, say: Callable) -> Path:
    """FOLDER.partial, with files for all entries, and a store.json that says how many are written."""
    partial = partial_of(folder)
    if folder.exists() and not (overwrite and (folder / DESCRIPTION).exists()):
        raise RunError(
            f"{folder} exists already; choose another folder"
            + (", or replace it with --overwrite (overwrite=True)." if (folder / DESCRIPTION).exists() else ".")
        )
    if (partial / DESCRIPTION).exists() and not overwrite:
        if not resume:
            raise RunError(
                f"{partial} was begun and not finished; go on with --resume (resume=True), or begin anew with "
                "--overwrite (overwrite=True)."
            )
        description = _what_is_written(partial, description)
    else:  # nothing, or what a process left before it had written anything
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    written = description["written"]
    _check_space(partial, description, say)
    if written == 0:
        shape = (description["entries"], description["width"])
        with _explaining(partial, description["entries"]):
            for name, dtype, size in ((KEYS, description["dtype"], shape), (VALUES, "int32", shape[:1])):
                np.lib.format.open_memmap(partial / name, mode="w+", dtype=dtype, shape=size).flush()
            write_description(partial, description)
    else:
        say(f"Going on behind entry {written:,} of {description['entries']:,}.")
    return partial


def _what_is_written(partial: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What store.json says in a half-written store. Raises RunError if that is another store than is wanted now."""
    kept = read_description(partial)
    others = [name for name in wanted if name not in ("written", "index") and kept.get(name) != wanted[name]]
    if kept["index"]["kind"] != wanted["index"]["kind"]:
        others.append("index")
    if others:
        said = "; ".join(f"{name}: {kept.get(name)} and now {wanted[name]}" for name in others)
        raise RunError(f"{partial} cannot be gone on with, having been begun otherwise ({said}).")
    return kept


def _check_space(partial: Path, description: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say what the store takes. Raises RunError if the disk has less than is left to write."""
    entries, width = description["entries"], description["width"]
    row = width * np.dtype(description["dtype"]).itemsize + 4
    index = index_bytes(description["index"]["kind"], entries, width)
    needed, free = (entries - description["written"]) * row + index, shutil.disk_usage(partial).free
    say(
        f"{entries:,} entries of {row:,} bytes (a {description['dtype']} key of width {width}, a token)"
        + (f" and an index of about {index:,} bytes" if index else "")
        + f": {entries * row + index:,} bytes, {free:,} are free."
    )
    if needed > free:
        raise RunError(f"{partial} needs {needed:,} bytes more, and {free:,} are free; free space, or take less text.")


def _publish(partial: Path, folder: Path) -> None:
    """The store appears at FOLDER; one that was there goes."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Its files


def _write_entries(
    model: PreTrainedModel,
    recorder: StateRecorder,
    documents: Sequence[np.ndarray],
    partial: Path,
    batch_size: int,
    progress: bool,
) -> None:
    """Entries behind those that are written, in order."""
    description = read_description(partial)
    entries, written = description["entries"], description["written"]
    keys, values = _ArrayFile(partial / KEYS), _ArrayFile(partial / VALUES)
    windows = windows_of(documents, description["window"], description["context"])
    left = [window for window in windows if window.end > written]
    bar = progress_bar("Reading", entries, written, progress)
    with _explaining(partial, entries), bar as advance, keys, values:
        for batch in batches(left, batch_size):
            reading = read(model, recorder, documents, batch, with_logits=False)
            keys.write(reading.entry, _as_keys(reading.states, description["dtype"]))
            values.write(reading.entry, reading.targets.numpy())
            keys.sync()
            values.sync()
            advance(batch[-1].end - description["written"])
            description["written"] = batch[-1].end
            write_description(partial, description)


def _as_keys(states: torch.Tensor, dtype: str) -> np.ndarray:
    keys = states.to(getattr(torch, dtype))
    if not keys.isfinite().all():
        raise ValueError(
            f"Hidden states go to {states.abs().max():.0f}, beyond what float16 holds; build the store with "
            'dtype="float32" (--dtype float32).'
        )
    return keys.numpy()


def _write_index(partial: Path, kind: str, progress: bool) -> None:
    if kind == EXACT:
        return
    description = read_description(partial)
    keys = np.load(partial / KEYS, mmap_mode="r")
    entries = description["entries"]
    with _explaining(partial, entries), progress_bar("Indexing", entries, 0, progress) as advance:
        write_quantized_index(keys, partial / INDEX, advance)
        description["index"]["sha256"] = digest_of(partial / INDEX)
        write_description(partial, description)


class _ArrayFile:
    """A .npy file that is there in its whole length, written from some row on.

    By `write` and not through a memory map: of a disk that is full, that is told.
    """

    def __init__(self, path: Path):
        array = np.lib.format.open_memmap(path, mode="r")
        self.begin, self.dtype, self.row = array.offset, array.dtype, array.strides[0]
        self.file = path.open("r+b")

    def __enter__(self) -> "_ArrayFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, start: int, rows: np.ndarray) -> None:
        self.file.seek(self.begin + start * self.row)
        self.file.write(np.ascontiguousarray(rows, self.dtype).tobytes())

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def _explaining(partial: Path, entries: int) -> Iterator[None]:
    """What a disk does not take becomes a RunError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in CURES:
            raise
        free = shutil.disk_usage(partial).free
        raise RunError(
            f"{partial}: {os.strerror(error.errno)} ({free:,} bytes are free). What store.json counts of {entries:,} "
            f"entries is written and stays; {CURES[error.errno]}, then go on with --resume (resume=True)."
        ) from error
