"""Where progress goes: one live line in the terminal, the log, Weights & Biases, TensorBoard. Tracking never stops a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.config import Config
from launch.display import Display
from launch.measured import measured
from launch.trackers import Isolated, Sink, TensorBoard, Wandb
from upcycle.store import Artifact, Run, record_of
from upcycle.team import ALONE, Team

# Stages that train or measure something; the others have nothing to log but their progress.
TRACKED = ("seed", "branch", "mix", "dense", "dense_compute", "eval", "tasks", "ablation", "report")


class Tracker:
    """Builds each stage's `Run`, shows its progress, and sends what it trains and measures on.

    where: the run's directory, for trackers' files.
    """

    def __init__(self, cfg: Config, console: Console, where: Path, team: Team = ALONE):
        self.cfg, self.console, self.where, self.team = cfg, console, where, team

    @contextmanager
    def stage(self, stage: Artifact) -> Iterator[Run]:
        """What `stage` may use of the outside; only the first process of a group shows and tracks it."""
        display = Display(stage.name, self.console, self.cfg.track.progress and self.team.leads)
        sinks = self._sinks(stage) if self.team.leads and stage.name.split("/")[0] in TRACKED else []
        launch = self.cfg.launch

        def record(row: dict) -> None:
            for sink in sinks:
                sink.log({name: value for name, value in row.items() if not isinstance(value, list)})

        run = Run(
            say=lambda text: self._print(f"  {stage.name}: {text}"),
            advance=display.advance,
            record=record,
            checkpoint_steps=launch.checkpoint_steps,
            checkpoint_seconds=launch.checkpoint_seconds,
            keep_checkpoints=launch.keep_checkpoints,
            keep_every=launch.keep_every,
            team=self.team,
        )
        try:
            with display:
                yield run
        except BaseException:
            for sink in sinks:
                sink.finish(None)
            raise
        found = measured(stage.path) if sinks else None
        for sink in sinks:
            sink.finish(found)

    def _sinks(self, stage: Artifact) -> list[Isolated]:
        """The trackers that are on and can start."""
        track, makers = self.cfg.track, []
        if track.wandb != "off":
            config = record_of(stage) | {"experiment": self.cfg.name, "rng_seed": self.cfg.rng_seed}
            makers.append(("wandb", lambda: Wandb(track.project, self.cfg.name, track.wandb, self.where, config)))
        if track.tensorboard:
            makers.append(("tensorboard", lambda: TensorBoard(self.where / "tensorboard" / stage.path.name)))
        return [sink for name, make in makers if (sink := self._isolated(f"{stage.name}: {name}", make)) is not None]

    def _isolated(self, what: str, make: Callable[[], Sink]) -> Isolated | None:
        try:
            return Isolated(make(), lambda why: self._print(f"{what} stopped ({why}); the run goes on without it"))
        except Exception as error:  # not installed, or broken
            self._print(f"{what} could not start ({error}); the run goes on without it")
            return None

    def _print(self, text: Any) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
