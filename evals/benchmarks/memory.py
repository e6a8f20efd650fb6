"""Memory of a training step: the loss in chunks against full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.benchmarks.checks import same_first_step
from evals.benchmarks.rows import Row, compared, unscored
from evals.benchmarks.shapes import largest
from evals.benchmarks.sides import Bench, SideFailed, alternate
from evals.benchmarks.training import config_of

UNIT = "bytes"


def _status(field: str) -> int:
    """Bytes, as the kernel counts this process's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: peaks of memory are read on Linux only")


class PeakSide:
    """Two training steps in a fresh process, the second with all moments there; its peak above what imports take.

    config: as of training_sides.LoopSide; `chunked`: the loss works on part of the tokens at a time.
    """

    def __init__(self, config: Mapping[str, Any]):
        import upcycle.losses
        from evals.benchmarks.training_sides import LoopSide

        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = _status("VmRSS")
        if not config["chunked"]:
            upcycle.losses.FULL_LOGITS_BYTES = 2**62
        side = LoopSide(config)
        self.first_loss = side.step()
        self.rows = side.rows
        side.step()
        self.peak = _status("VmHWM") - before
        self.about = {"parameters": side.about["parameters"]}

    def measure(self) -> dict[str, Any]:
        return {"peak": self.peak, "first_loss": [self.first_loss], "rows": self.rows}


def logits(bench: Bench) -> Iterator[Row]:
    """One step of a dense model, without and with activation checkpointing (which leaves less beside the logits)."""
    size = largest(bench.quick)
    for name, case, checkpointing in (
        ("memory_logits", size.name, False),
        ("memory_logits_checkpointed", f"{size.name}, activation checkpointing", True),
    ):
        config = config_of(bench, size, checkpointing=checkpointing)
        sides = {
            "chunked": bench.side("memory:PeakSide", config | {"chunked": True}, keeps_freed_memory=True),
            "full": bench.side("memory:PeakSide", config | {"chunked": False}, keeps_freed_memory=True),
        }
        found = alternate(sides, min(bench.rounds, 2), held=False)
        try:
            peaks = found.pair("chunked", "full", "peak")
            same_first_step(found.answers["chunked"], found.answers["full"], "full logits")
            state, full = 16 * found.ready["chunked"]["parameters"], 16 * size.tokens * size.seed["vocab_size"]
            limit = (
                f"weights, gradients and moments are {state / peaks[0][0]:.0%} of ours; full logits, their softmax and their "
                f"gradients, in bf16 and fp32, are {full / 1e9:.1f} GB"
            )
            checked = "loss and gradients of the first step"
            yield compared(name, case, *peaks, UNIT, less_is_better=True, checked=checked, limit=limit)
        except SideFailed as error:
            yield unscored(name, case, UNIT, str(error))


BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {"logits": logits}
