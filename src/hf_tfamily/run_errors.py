"""What is said where a run cannot begin or go on, and where a disk does not take what a run writes."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from .manifest import MANIFEST, size_of

PROBE_BYTES = 1 << 20
# What a person does about an error of the file system, by its number.
CURES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space or have the quota raised",
    errno.EFBIG: "have the limit on the size of files raised (ulimit -f)",
    errno.EROFS: "have the file system mounted for writing",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EIO: "look after the disk",
}


class RunError(ValueError):
    """A folder that a run must not touch, a run that cannot be resumed, or a disk that does not take what it writes."""


@contextmanager
def explaining_disks(run: Path) -> Iterator[None]:
    """Errors of the file system while a run works in the folder `run` become a RunError: which file, why, and what now.

    Errors about files elsewhere, such as data that nobody may read, stay as they are.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        found = _disk_error(error, run)
        if found is None:
            raise
        raise RunError(_explain(*found, run)) from error


def _disk_error(error: BaseException, run: Path) -> tuple[int | None, str, str | None] | None:
    """(number, words, file) of what the file system said, None if it is no error of that kind."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in CURES and _is_of(run, cause):
            return cause.errno, os.strerror(cause.errno), cause.filename
        if isinstance(cause, SafetensorError) and (number := re.search(r"\(os error (\d+)\)", str(cause))):
            return int(number[1]), os.strerror(int(number[1])), None
    # torch.save knows no numbers.
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)):
        number = _probe(run)
        return number, os.strerror(number) if number else str(error).splitlines()[0], None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            yield from (failure[0] for failure in error.failures.values())
        error = error.__cause__ or error.__context__


def _is_of(run: Path, error: OSError) -> bool:
    """Is it about the run's folder? A write that fails names no file."""
    if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return Path(os.path.abspath(os.fsdecode(error.filename))).is_relative_to(run.absolute().parent)


def _probe(run: Path) -> int | None:
    """The number of the error that writing into `run` meets, None if there is none."""
    file = run / "probe.tmp"
    try:
        file.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return error.errno
    finally:
        with suppress(OSError):  # on what cannot be written
            file.unlink(missing_ok=True)
    return None


def _explain(number: int | None, words: str, file: str | None, run: Path) -> str:
    whole = sorted(run.glob(f"checkpoint-*/{MANIFEST}"), key=lambda manifest: manifest.stat().st_mtime_ns)
    space = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        needed = f"a checkpoint takes {size_of(whole[-1].parent):,} bytes, " if whole else ""
        space = f" ({needed}{shutil.disk_usage(_existing(run)).free:,} are free)"
    left = f"{whole[-1].parent} is whole" if whole else "No checkpoint is whole yet"
    cure = CURES.get(number, "see to that")
    return f"{file or _last_written(run)}: {words}{space}. {left}; {cure}, then go on by --resume."


def _last_written(run: Path) -> Path:
    """The file that was being written, as far as one can see."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=run)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
