"""Which ends of a group of processes start it again."""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest

from tests.crashes import ATTEMPTS, run_again_after_a_fault

ABORTED = CompletedProcess([], 1, "", "  traceback : Signal 6 (SIGABRT) received by PID 9319")
FAILED = CompletedProcess(
    [], 1, "", "ValueError: rank 1 fails here\n  traceback : Signal 15 (SIGTERM) received by PID 9320"
)
DONE = CompletedProcess([], 0, "done", "")


@pytest.mark.parametrize(
    "ends, starts, last",
    [
        ([DONE], 1, DONE),
        ([FAILED, DONE], 1, FAILED),
        ([ABORTED, DONE], 2, DONE),
        ([ABORTED, FAILED, DONE], 2, FAILED),
        ([ABORTED] * 9, ATTEMPTS, ABORTED),
    ],
    ids=["done", "failed", "a fault", "a fault, then failed", "a fault every time"],
)
@pytest.mark.filterwarnings("ignore:a process was ended by a fault")
def test_only_a_fault_starts_a_group_again(ends, starts, last):
    left = list(ends)
    assert run_again_after_a_fault(lambda: left.pop(0)) is last
    assert len(ends) - len(left) == starts
