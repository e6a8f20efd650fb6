"""What a person sees of a stage that is being made: one live line in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launch.plan import human

PLAIN_SECONDS = 30.0  # without a terminal, one line this often


class Display:
    """Progress of one stage: a live line in a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, console: Console, enabled: bool):
        self.name, self.console, self.enabled = name, console, enabled
        self.live = (
            Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal and enabled else None
        )
        self.start = self.printed = time.monotonic()
        self.first, self.done, self.total = 0, 0, -1

    def __enter__(self):
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *error):
        if self.live:
            self.live.__exit__(*error)

    def advance(self, done: int, total: int, **figures: Any) -> None:
        """Show that `done` of `total` is reached. figures: a row of metrics.jsonl, or `doing`, what is being done, in words.

        Another total, or less done than before, is another part of the stage: its time left is worked out anew.
        """
        now = time.monotonic()
        if total != self.total or done < self.done:
            self.start, self.first, self.total = now, done, total
        self.done = done
        parts = [f"  {self.name}", f"{human(done)}/{human(total)}", *_figures(figures)]
        if done > self.first:
            parts.append(f"{(now - self.start) / (done - self.first) * (total - done):.0f} s left")
        line = "  ".join(parts)
        if self.live:
            self.live.update(Text(line))
        elif self.enabled and now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _figures(row: dict[str, Any]) -> list[str]:
    """The parts of a metrics row worth watching; what is being done, where there is no such row."""
    if "loss" not in row:
        return [row["doing"]] if row.get("doing") else []
    parts = [f"loss {row['loss']:.3f}", f"ce {row['cross_entropy']:.3f}"]
    parts += [f"{name} {row[name]:.3f}" for name in ("balance", "z") if name in row]
    parts += [f"lr {row['lr']:.1e}", f"{human(row['tokens_per_second'])} tok/s", f"{row['peak_share']:.0%} of peak"]
    if "largest_load" in row:
        parts.append(
            f"router: largest load {row['largest_load']:.0%}, dead {row['dead_experts']}, entropy {row['ffn_entropy']:.2f}, "
            f"gradient {row['router_gradient_norm']:.1e}"
        )
    return parts
