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
        with suppress(OSError, ValueError):  # on a full disk it holds all the same
            _sign(file)
    except Timeout:
        raise RunError(
            f"{file} is held by {holder}, which writes into the same folder; wait for it, end it, or choose another "
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


def _sign(file: Path) -> None:
    """Write who holds it, in the form that filelock itself writes on file systems without locks."""
    pid, host = os.getpid(), socket.gethostname()
    if not file.read_text(encoding="utf-8").startswith(f"{pid}\n{host}"):
        file.write_text(f"{pid}\n{host}\n", encoding="utf-8")


def _holder(file: Path) -> str:
    try:
        pid, host = file.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"
