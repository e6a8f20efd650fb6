"""Being asked to stop at the next checkpoint: by SIGTERM, or by a file that appears, which reaches processes on other machines too.

A batch system's script makes that file before the time limit (launch/slurm/job.sh). Training looks after every step, writes a checkpoint and ends with
the exit status `AGAIN`: start it again and it goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "UPCYCLE_STOP_FILE"
AGAIN = 75  # EX_TEMPFAIL of sysexits.h
TERMINATED = 143  # 128 + SIGTERM, as shells say it

_state = {"looks": False, "asked": False}


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
    if _state["asked"] or not _state["looks"]:
        sys.exit(TERMINATED)
    _state["asked"] = True


def asked() -> bool:
    file = os.environ.get(FILE)
    return _state["asked"] or (file is not None and Path(file).exists())
