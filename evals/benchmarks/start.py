"""How long the command takes before it does anything: `upcycle plan=true`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.sides import LAST_WORDS, Bench, SideFailed, environment

NAME, WANTED = "start_plan", 3.0  # seconds


def plan(bench: Bench) -> Iterator[Row]:
    """Wall time of the whole process, in an empty directory, files in the page cache."""
    folder = bench.folder / "plan"
    folder.mkdir()
    command = [sys.executable, "-m", "launch.cli", "plan=true"]
    try:
        seconds = []
        for _ in range(bench.rounds + 1):
            start = time.perf_counter()
            ended = subprocess.run(command, cwd=folder, env=environment(bench.threads), capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            if ended.returncode or "mix/btx" not in ended.stdout:
                words = (ended.stderr or ended.stdout).strip()[-LAST_WORDS:]
                raise SideFailed(f"upcycle plan=true ended with exit status {ended.returncode}: {words}")
        warm = seconds[1:]
        imports = f"a bare Python starts in {_bare_start():.2f} s"
        yield compared(
            NAME, "experiment=demo", warm, [WANTED] * len(warm), "s", less_is_better=True, checked="it prints the plan",
            limit=imports, note=f"the peer is {WANTED:g} s, which is wanted",
        )  # fmt: skip
    except SideFailed as error:
        yield unscored(NAME, "experiment=demo", "s", str(error))


def _bare_start() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=dict(os.environ), check=True)
    return time.perf_counter() - start


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {"plan": plan}
