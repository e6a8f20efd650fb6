"""Being asked to stop at the next checkpoint: by SIGTERM, or by a file that appears, which reaches processes on other machines too.

A batch system's script makes that file before the time limit (launch/slurm/job.sh). Training looks after every step, writes a checkpoint and ends with
the exit status `AGAIN`: start it again and it goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "UPCYCLE_STOP_FILE"
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


def asked() -> bool:
    file = os.environ.get(FILE)
    return _state["asked"] is not None or (file is not None and Path(file).exists())
