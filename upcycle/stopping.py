"""Being asked to stop at the next checkpoint: by SIGTERM, or by a file that appears, which reaches processes on other machines too.

A batch system's script makes that file before the time limit (launch/slurm/job.sh). Training looks after every step, writes a checkpoint and ends with
the exit status `AGAIN`: start it again and it goes on. A process that has started others, and waits for them, passes the request on by a file of its own
(`passing_on`); one that dies without a word takes them along (`end_with_parent`).
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "UPCYCLE_STOP_FILE"
PASSED_ON = "UPCYCLE_PASSED_ON_STOP_FILE"  # the same, in the environment of processes that one of ours has started
PARENT = "UPCYCLE_PARENT"  # there too: the number of that one
ELASTIC = "TORCHELASTIC_RUN_ID"  # in the environment of what torchrun starts
PR_SET_PDEATHSIG = 1  # of prctl(2)
AGAIN = 75  # EX_TEMPFAIL of sysexits.h
TERMINATED = 143  # 128 + SIGTERM, as shells say it

ONE_REQUEST = (
    5.0  # seconds: a batch system and a launcher that it has signalled may both tell a process, which is asking once
)

_state: dict[str, Any] = {"looks": False, "asked": None}  # asked: when first, by the monotonic clock


class Stopped(SystemExit):
    """Ends the process with the status AGAIN, passing handlers of errors: nothing has failed."""

    def __init__(self):
        super().__init__(AGAIN)


@contextmanager
def looking() -> Iterator[None]:
    """Around a loop that asks `asked` after each of its steps."""
    _state["looks"] = True
    try:
        yield
    finally:
        _state["looks"] = False


def on_sigterm(*_: Any) -> None:
    """For `signal.signal`. Where nobody looks (a stage without checkpoints), or when asked twice, the process ends at once."""
    now = time.monotonic()
    if not _state["looks"] or (_state["asked"] is not None and now - _state["asked"] > ONE_REQUEST):
        sys.exit(TERMINATED)
    _state["asked"] = _state["asked"] or now


def signalled() -> bool:
    """Asked by SIGTERM."""
    return _state["asked"] is not None


def asked() -> bool:
    files = [os.environ.get(name) for name in (FILE, PASSED_ON)]
    return signalled() or any(Path(file).exists() for file in files if file)


@contextmanager
def passing_on() -> Iterator[Path]:
    """Around waiting for processes that have the file it yields as PASSED_ON, which is not there: making it asks them all."""
    file = Path(tempfile.gettempdir()) / f"upcycle-stop-{secrets.token_hex(8)}"
    try:
        with looking():
            yield file
    finally:
        file.unlink(missing_ok=True)


def end_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, by kill -9 too: nobody would end it any more, and it may hold a lock or a GPU.

    For what one of ours or torchrun has started, from its main thread (the kernel's rule is of threads); no effect elsewhere, and on systems other than Linux.
    """
    parent = os.environ.pop(PARENT, None)  # not for what this process starts in turn
    if sys.platform != "linux" or (parent is None and ELASTIC not in os.environ):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != int(parent):  # it died before
        sys.exit(TERMINATED)
