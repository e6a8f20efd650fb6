"""`upcycle plan=true`: every stage with its state and what it will cost, computing nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from launch.recipes import Experiment
from upcycle.cost import Shape
from upcycle.store import Artifact


def human(number: float | None, unit: str = "") -> str:
    """1234567 -> "1.23M"."""
    if number is None:
        return ""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}{unit}"
    return f"{number:.3g}{unit}"


def stage_cost(experiment: Experiment, stage: Artifact) -> tuple[Shape | None, float | None, int | None]:
    """(shape of the model it makes or measures, FLOPs of its training, bytes it keeps in memory for it)."""
    _, _, name = stage.name.rpartition("/")
    lineage = experiment.lineages.get(name)
    if lineage is None or stage.name.startswith(("documents/", "tokens/")):
        return None, None, None
    shape = lineage.shape
    train = stage.config.train if stage.name == "seed" and stage.config else None
    if isinstance(stage.config, dict):
        train = stage.config.get("train", train)
    if train is None:  # assembled, merged, evaluated: the weights only
        return shape, None, shape.parameters * 4
    flops = train.steps * train.batch_tokens * shape.train_flops_per_token(train.sequence_length)
    return shape, flops, shape.train_bytes


def print_plan(experiment: Experiment, console: Console) -> None:
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    for title in ("stage", "state", "key"):
        table.add_column(title, no_wrap=True)
    for title in ("parameters", "active", "train FLOPs", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    total = 0.0
    for stage in experiment.store.stages.values():
        shape, flops, size = stage_cost(experiment, stage)
        total += 0 if stage.finished else flops or 0
        counts = (human(shape.parameters), human(shape.active_parameters)) if shape else ("", "")
        table.add_row(stage.name, stage.state, stage.key[:8], *counts, human(flops), human(size, "B"))
    console.print(table)
    done = sum(stage.finished for stage in experiment.store.stages.values())
    console.print(
        f"\n{done} of {len(experiment.store.stages)} stages done; {human(total)} training FLOPs left. Bytes: weights, "
        "gradients and optimizer state of training stages, weights of the others; activations come on top."
    )
