"""Weights & Biases and TensorBoard, each in a thread of its own: one that fails, hangs or is killed costs the run nothing.

wandb hands everything to a process of its own, `wandb-core`. Where that process is gone, wandb raises; where it has
stopped, `log`, `finish` and even the interpreter's exit wait for it for ever (tried with wandb 0.31). So nothing of
wandb's is called from the thread that trains, and a service that does not answer is ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Protocol

from launch.measured import Measured

PATIENCE_SECONDS = 120.0  # for one call; wandb itself waits 90 s for its server when a run starts
FAILED_SECONDS = 5.0  # of a stage that failed: nobody wants to wait for a tracker then
BY_FLOPS = ("loss", "cross_entropy")


class Sink(Protocol):
    """Where a stage's metrics go. Every method may raise or block."""

    def start(self) -> None: ...

    def log(self, row: dict[str, float]) -> None: ...

    def finish(self, measured: Measured | None) -> None:
        """measured: what the stage measured; None where it failed."""

    def give_up(self) -> None:
        """Called instead of `finish` after a failure, from any thread; must not block."""


class Isolated:
    """A sink that is called from a thread of its own, in order. Nothing here raises, or blocks for long.

    say: called once, if the sink fails or does not answer, with why.
    """

    def __init__(self, sink: Sink, say: Callable[[str], None]):
        self._sink, self._say, self._over = sink, say, False
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._busy_since: float | None = None
        self._thread = Thread(target=self._work, daemon=True, name=f"tracking by {type(sink).__name__}")
        self._calls.put(sink.start)
        self._thread.start()

    def log(self, row: dict[str, float]) -> None:
        since = self._busy_since
        if since is not None and time.monotonic() - since > PATIENCE_SECONDS:
            self._give_up(f"it has not answered for {PATIENCE_SECONDS:.0f} s")
        elif not self._over:
            self._calls.put(lambda: self._sink.log(row))

    def finish(self, measured: Measured | None) -> None:
        """Wait until everything is logged; not longer than PATIENCE_SECONDS."""
        if self._over:
            self._thread.join(FAILED_SECONDS)  # it may still be ending its service, and must not end the next stage's
            return
        self._calls.put(lambda: self._sink.finish(measured))
        self._calls.put(None)
        patience = PATIENCE_SECONDS if measured is not None else FAILED_SECONDS
        self._thread.join(patience)
        if self._thread.is_alive():
            self._give_up(f"it has not answered for {patience:.0f} s")
            self._thread.join(FAILED_SECONDS)  # it ends with the service that it waits for

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._over:
            self._busy_since = time.monotonic()
            try:
                call()
            except Exception as error:  # a tracker that fails must not take the training with it
                self._give_up(str(error) or type(error).__name__)
            self._busy_since = None

    def _give_up(self, why: str) -> None:
        if self._over:  # what a call raises after its service was ended is no news
            return
        self._over = True
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        self._calls.put(None)
        self._say(why)
        with suppress(Exception):
            self._sink.give_up()


class Wandb:
    """One wandb run for one stage. An attempt after a crash has the same id, so it goes on with the run."""

    def __init__(self, project: str, group: str, mode: str, where: Path, config: dict[str, Any]):
        import wandb  # here, not in the thread: two threads that import at once may see half of a module

        self._wandb, self._mode, self._where, self._config = wandb, mode, where, config
        self._project, self._group, self._run = project, group, None

    def start(self) -> None:
        self._where.mkdir(parents=True, exist_ok=True)
        name, key = self._config["stage"], self._config["key"]
        self._run = self._wandb.init(
            project=self._project, group=self._group, job_type=name.split("/")[0], name=name, id=key[:16], resume="allow",
            mode=self._mode, dir=self._where, config=self._config, reinit="finish_previous",
            settings=self._wandb.Settings(silent=True, console="off"),  # what is printed is ours, and in the terminal
        )  # fmt: skip
        self._run.define_metric("*", step_metric="tokens")
        self._run.define_metric("by_flops/*", step_metric="train_flops")

    def log(self, row: dict[str, float]) -> None:
        by_flops = {f"by_flops/{name}": row[name] for name in BY_FLOPS if name in row}
        self._run.log(row | by_flops, step=row["step"])  # a step that an earlier attempt has logged is dropped by wandb

    def finish(self, measured: Measured | None) -> None:
        if measured is not None:
            tables = {
                name: self._wandb.Table(columns=columns, data=rows) for name, (columns, rows) in measured.tables.items()
            }
            if measured.figures or tables:
                self._run.log(measured.figures | tables)
            if measured.files:
                artifact = self._wandb.Artifact(f"report-{self._group}", type="report")
                for path in measured.files:
                    artifact.add_file(str(path), policy="immutable")  # artifacts never change: no copy is needed
                self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if measured is not None else 1)

    def give_up(self) -> None:
        """End wandb's service and forget it: the next stage starts another, and the interpreter can exit."""
        import psutil

        for child in psutil.Process().children():
            if "wandb-core" in child.name():
                child.kill()
        self._wandb.teardown()


class TensorBoard:
    """Event files of one stage, by accelerate's tracker; the axis is tokens."""

    def __init__(self, where: Path):
        from accelerate.state import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState()  # accelerate's logger wants it; in a group it is there already
        self._tracker = TensorBoardTracker(run_name=where.name, logging_dir=where.parent)

    def start(self) -> None:
        self._tracker.start()

    def log(self, row: dict[str, float]) -> None:
        self._tracker.log(row, step=row["tokens"])

    def finish(self, measured: Measured | None) -> None:
        if measured is not None and measured.figures:
            self._tracker.log(measured.figures, step=0)
        self._tracker.finish()

    def give_up(self) -> None:
        """Nothing is held that could keep a process from ending."""
