"""Groups of processes that a fault in native code ended are started again; every other failure is one.

A heap that threads of gloo corrupted ended one of two processes once in some fifty runs, never twice at one place, and never under a
debugger or a checking allocator.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from subprocess import CompletedProcess

ATTEMPTS = 3
# What torch's launcher and ours say of a process that a fault ended; never of one that a test, a user or the launcher killed.
FAULT = re.compile(r"\bSIG(ABRT|SEGV|BUS|ILL|FPE)\b")


def run_again_after_a_fault(run: Callable[[], CompletedProcess[str]]) -> CompletedProcess[str]:
    """`run()`, at most ATTEMPTS times while a fault ends it; each time with a warning of what was said."""
    for _ in range(ATTEMPTS - 1):
        done = run()
        said = f"{done.stdout}\n{done.stderr}"
        if done.returncode == 0 or not FAULT.search(said):
            return done
        warnings.warn(f"a process was ended by a fault, and its group is started again: {said[-6000:]}", stacklevel=2)
    return run()
