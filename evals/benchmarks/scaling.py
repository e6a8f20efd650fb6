"""How a step's time and memory, and assembly's time, grow with sizes: exponents fitted to measurements beside predicted ones.

An exponent is the slope of log(measured) over log(size); the predicted one is that of cost.py's FLOPs, of bytes that have to be
held or moved, or 0, over the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evals.benchmarks.ranks import run_ranks
from evals.benchmarks.rows import Row, unscored
from evals.benchmarks.shapes import EXPERTS, QUICK, SMALL, TOP_K, Size
from evals.benchmarks.sides import Bench, SideFailed
from evals.benchmarks.training import config_of

WIDEST = {"experts": (2, 4, 8, 16), "top_k": (2, 4, 8), "length": (128, 256, 512, 1024), "layers": (2, 4, 8, 16)}
UNIT = "exponent"


@dataclass(frozen=True)
class Curve:
    """One measurement over one size. measured, predicted: of each size, in `unit`; a prediction counts only by its growth.

    predicted_by: what says how it should grow. rounds: measurements of each size.
    """

    name: str
    over: str
    unit: str
    sizes: tuple[float, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    predicted_by: str = "cost.py"
    rounds: int = 1

    def row(self) -> Row:
        """ours: the exponent measured, peer: the predicted one; a difference of them stands in the note, for ratios of 0 say nothing."""
        ours, peer = exponent(self.sizes, self.measured), exponent(self.sizes, self.predicted)
        values = ", ".join(f"{size:g}: {value:.3g}" for size, value in zip(self.sizes, self.measured, strict=True))
        note = f"{round(ours - peer, 2) + 0.0:+.2f} from {self.predicted_by}; {self.unit} by {self.over}: {values}"
        return Row(
            name=self.name, case=f"over {self.over}", unit=UNIT, ours=ours, peer=peer, rounds=self.rounds,
            checked="nothing: a prediction", note=note,
        )  # fmt: skip


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through (log size, log value)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def training(bench: Bench) -> Iterator[Curve]:
    """Seconds of a BTX step and its peak memory, one size changed at a time."""
    for over, values in WIDEST.items():
        values = values[:2] if bench.quick else values
        seconds, peaks, flops, states = [], [], [], []
        for value in values:
            size, more = _changed(QUICK if bench.quick else SMALL, over, value)
            config = config_of(bench, size, method="btx", warm_up=3, **more)
            with bench.side("training_sides:LoopSide", config, keeps_freed_memory=True) as side:
                found = [side.ask("measure")["seconds"] for _ in range(min(bench.rounds, 2))]
                said = side.ready()
            with bench.side("memory:PeakSide", config | {"chunked": True}, keeps_freed_memory=True) as side:
                peaks.append(side.ask("measure")["peak"])
            seconds.append(median(found))
            flops.append(said["flops_per_token"] * size.tokens)
            states.append(16 * said["parameters"])
        plain = tuple(map(float, values))
        yield Curve("scaling_step", over, "s", plain, tuple(seconds), tuple(flops), "cost.py", len(found))
        yield Curve(
            "scaling_memory", over, "bytes", plain, tuple(peaks), tuple(states), "weights, gradients and moments"
        )


def _changed(size: Size, over: str, value: int) -> tuple[Size, dict[str, Any]]:
    """The size and the choices of a mixture with one of them changed. Sequences of another length: as many as make the same tokens."""
    experts, top_k = EXPERTS, TOP_K
    if over == "length":
        value = min(value, size.seed["max_position_embeddings"])
        size = Size(size.name, size.seed, max(1, size.tokens // value), value)
    elif over == "layers":
        size = Size(size.name, size.seed | {"num_hidden_layers": value}, size.sequences, size.length)
    elif over == "experts":
        experts = value
    else:
        experts, top_k = max(WIDEST["top_k"]), value
    return size, {"experts": experts, "top_k": top_k}


def ranks(bench: Bench) -> Iterator[Curve]:
    """Seconds of a step of one and of two ranks, the same tokens a rank: at best they do not grow."""
    size = QUICK if bench.quick else SMALL
    config = config_of(bench, size, method="btx", top_k=TOP_K)
    seconds = []
    for count in (1, 2):
        own = config | {"sequences": count * size.sequences, "micro": size.sequences}
        seconds.append(run_ranks(bench, "ddp", count, own)["seconds"])
    yield Curve("scaling_step", "ranks", "s", (1.0, 2.0), tuple(seconds), (1.0, 1.0), "no growth")


def assembly(bench: Bench) -> Iterator[Curve]:
    """Seconds of assembling in process, over experts, and over bytes of one checkpoint."""
    for over, values in (("experts", (2, 4, 8)), ("bytes", (1, 2, 4))):
        seconds, moved, found = [], [], []
        for value in values[:2] if bench.quick else values:
            folder = bench.folder / f"assembly-{over}-{value}"
            (folder / "models").mkdir(parents=True)
            layers = (2 if bench.quick else 6) * (value if over == "bytes" else 1)
            seed = (QUICK if bench.quick else SMALL).seed | {"num_hidden_layers": layers}
            bytes_ = bench.once("checkpoints:write_models", {"folder": str(folder / "models"), "sizes": seed})["bytes"]
            count = value if over == "experts" else EXPERTS
            config = {"models": str(folder / "models"), "out": str(folder / "out"), "how": "assemble", "experts": count}
            with bench.side("checkpoints:InProcess", config, keeps_freed_memory=True) as side:
                side.ask("measure")
                answers = [side.ask("measure") for _ in range(min(bench.rounds, 2))]
            seconds.append(median(answer["seconds"] for answer in answers))
            moved.append(median(answer["seconds"] * answer["rate"] for answer in answers))
            found.append(float(value if over == "experts" else bytes_ / 4))
        yield Curve(
            "scaling_assembly", over, "s", tuple(found), tuple(seconds), tuple(moved), "bytes moved", len(answers)
        )


def draw(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """A figure a curve: measured and predicted over size, both axes logarithmic, the prediction through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for curve in curves:
        figure, axes = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
        own, planned = exponent(curve.sizes, curve.measured), exponent(curve.sizes, curve.predicted)
        scaled = [value * curve.measured[0] / curve.predicted[0] for value in curve.predicted]
        axes.loglog(curve.sizes, curve.measured, "o-", label=f"measured, exponent {own:.2f}")
        axes.loglog(curve.sizes, scaled, "--", label=f"{curve.predicted_by}, exponent {planned:.2f}")
        axes.set(xlabel=curve.over, ylabel=curve.unit, title=f"{curve.name} over {curve.over}")
        axes.legend()
        paths.append(folder / f"{curve.name}_{curve.over}.svg")
        figure.savefig(paths[-1])
        plt.close(figure)
    return paths


CURVES: dict[str, Callable[[Bench], Iterator[Curve]]] = {"training": training, "ranks": ranks, "assembly": assembly}


def _rows(make: Callable[[Bench], Iterator[Curve]], name: str) -> Callable[[Bench], Iterator[Row]]:
    """Rows of curves, which are kept to be drawn."""

    def benchmark(bench: Bench) -> Iterator[Row]:
        try:
            for curve in make(bench):
                bench.known.setdefault("curves", []).append(curve)
                yield curve.row()
        except SideFailed as error:
            yield unscored(f"scaling_{name}", "", UNIT, str(error))

    return benchmark


BENCHMARKS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    f"scaling_{name}": _rows(make, name) for name, make in CURVES.items()
}
