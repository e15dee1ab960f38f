"""One run at a time in a folder: a lock that the system takes back when the process dies, however it dies."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .run_errors import RunError


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `file`, which says who holds it and goes at the end.

    Raises:
        RunError: if another process holds it, by its id and host, or if the file cannot be written.
    """
    holder = _holder(file)  # before older versions of filelock empty the file
    lock = FileLock(file, blocking=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        raise RunError(
            f"{file} is held by {holder}, which trains into the same folder; wait for it, end it, or choose another "
            "--output."
        ) from None
    except OSError as error:
        raise RunError(
            f"{file}: {error.strerror or error}. A run locks its folder; make {file.parent} writable, or choose "
            "another --output."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # while it is held: whoever waits for this file finds that it is gone, and makes a new one
        lock.release()


def _holder(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"
