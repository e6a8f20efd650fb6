"""Where progress goes: one live line in the terminal, the log, and Weights & Biases. Tracking never stops a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.config import Config
from launch.plan import human
from upcycle.store import Run
from upcycle.team import ALONE, Team

PLAIN_SECONDS = 30.0  # without a terminal, one line this often


class Tracker:
    """Builds each stage's `Run`, shows its progress, and sends its metrics on."""

    def __init__(self, cfg: Config, console: Console, team: Team = ALONE):
        self.cfg, self.console, self.team = cfg, console, team

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """What the stage called `name` may use of the outside; only the first process of a group shows and tracks it."""
        display = _Display(name, self.console, self.cfg.track.progress and self.team.leads)
        tracker = _start_wandb(self.cfg, name, self.console) if self.team.leads else None
        launch = self.cfg.launch

        def record(row: dict) -> None:
            nonlocal tracker
            if tracker is not None:
                try:
                    tracker.log(
                        {key: value for key, value in row.items() if not isinstance(value, list)}, step=row["step"]
                    )
                except Exception as error:  # a tracker that fails must not take the training with it
                    self.console.print(f"{name}: tracking stopped ({error}); training goes on")
                    tracker = None

        run = Run(
            say=lambda text: self.console.print(f"  {name}: {text}", highlight=False, markup=False, soft_wrap=True),
            advance=display.advance,
            record=record,
            checkpoint_steps=launch.checkpoint_steps,
            checkpoint_seconds=launch.checkpoint_seconds,
            keep_checkpoints=launch.keep_checkpoints,
            team=self.team,
        )
        with display:
            yield run
        if tracker is not None:
            tracker.finish()


def _start_wandb(cfg: Config, name: str, console: Console) -> Any:
    """A wandb run for one training stage, or None where tracking is off or can't start."""
    if cfg.track.wandb == "off" or name.split("/")[0] not in ("seed", "branch", "mix", "dense"):
        return None
    try:
        import wandb

        return wandb.init(
            project=cfg.track.project, group=cfg.name, name=name, mode=cfg.track.wandb, reinit="finish_previous",
            config={"experiment": cfg.name, "stage": name, "rng_seed": cfg.rng_seed},
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
    except Exception as error:
        console.print(f"{name}: wandb could not start ({error}); training goes on without it")
        return None


class _Display:
    """Progress of one stage: a live line in a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, console: Console, enabled: bool):
        self.name, self.console, self.enabled = name, console, enabled
        self.live = (
            Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal and enabled else None
        )
        self.start = self.printed = time.monotonic()
        self.first: int | None = None

    def __enter__(self):
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.__exit__(*error)

    def advance(self, done: int, total: int, **figures: Any) -> None:
        """Show that `done` of `total` is reached; `figures` is a row of metrics.jsonl where there is one."""
        now = time.monotonic()
        if self.first is None:
            self.first = done - 1
        left = (now - self.start) / max(done - self.first, 1) * (total - done)
        line = f"  {self.name}  {human(done)}/{human(total)}  {_figures(figures)}  {left:.0f} s left"
        if self.live:
            self.live.update(Text(line))
        elif self.enabled and now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _figures(row: dict[str, Any]) -> str:
    """The parts of a metrics row worth watching."""
    if "loss" not in row:
        return ""
    parts = [f"loss {row['loss']:.3f}", f"ce {row['cross_entropy']:.3f}"]
    parts += [f"{name} {row[name]:.3f}" for name in ("balance", "z") if name in row]
    parts += [f"lr {row['lr']:.1e}", f"{human(row['tokens_per_second'])} tok/s", f"{row['peak_share']:.0%} of peak"]
    if "largest_load" in row:
        parts.append(
            f"router: largest load {row['largest_load']:.0%}, dead {row['dead_experts']}, entropy {row['ffn_entropy']:.2f}, "
            f"gradient {row['router_gradient_norm']:.1e}"
        )
    return "  ".join(parts)
