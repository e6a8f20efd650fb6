"""Quality against compute: perplexity with its interval over what a model's making, or its use, takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.drawing import THEME, inlined, new_figure, write_ticks
from evals.tables import average_title, longest_shown, write_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "train_flops": "training FLOPs of everything behind the model",
    "active_parameters": "active parameters",
}
KINDS = {"seed": "s", "branch": "D", "dense": "X", "soup": "P", "merge": "h", "ensemble": "*"}  # matplotlib's markers
MIXTURE = "o"
LINE_INCHES = 0.15  # of a label


def draw_pareto(report: Mapping[str, Any]) -> Figure:
    """A panel for each cost: a marker per model with its interval, and the front as a step line."""
    costs = costs_shown(report)
    figure, axes = new_figure(1, len(costs), 4.6, panel_height(report) + 0.3)
    for axis, cost in zip(axes.flat, costs, strict=True):
        draw_panel(axis, report, cost)
        axis.set_title(f"against {PANELS[cost]}", fontsize=9)
    handles = [_sample(kind, marker) for kind, marker in kinds_shown(report).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def costs_shown(report: Mapping[str, Any]) -> list[str]:
    """The costs that two models at least are known to have had; none in a report of an earlier version."""
    models = sum(model["kind"] != "oracle" for model in report["models"].values())
    return [cost for cost, found in report.get("pareto", {}).items() if models - len(found["unknown"]) > 1]


def kinds_shown(report: Mapping[str, Any]) -> dict[str, str]:
    """{kind in words: marker} of the models that the report has."""
    kinds = {model["kind"] for model in report["models"].values()} - {"oracle"}
    found = {kind: marker for kind, marker in KINDS.items() if kind in kinds}
    return found | ({"mixture": MIXTURE} if kinds - set(KINDS) else {})


def _sample(label: str, marker: str) -> Any:
    """A marker for the key; it is on no axis."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, markerfacecolor="none", color=THEME["accent"], label=label)


def panel_height(report: Mapping[str, Any]) -> float:
    """Inches that leave every label a line of its own."""
    return max(3.1, 0.8 + LINE_INCHES * len(report["models"]))


def draw_panel(axis: Axes, report: Mapping[str, Any], cost: str) -> None:
    """One panel. Filled: on the front. Whoever is beyond the scale stands at its upper edge, with an arrow by the figure."""
    averages = {name: model["average"]["trained"] for name, model in report["models"].items()}
    on_front, unknown = report["pareto"][cost]["front"], report["pareto"][cost]["unknown"]
    shown = {n: m[cost] for n, m in report["models"].items() if m["kind"] != "oracle" and n not in unknown}
    top = longest_shown(report, {name: averages[name]["perplexity"] for name in averages})
    low = min(averages[name]["interval"][0] for name in shown)
    _perplexities(axis, low, top)
    _scale(axis, list(shown.values()), cost)
    heights = {name: min(averages[name]["perplexity"], top) for name in shown}
    costs, front = [shown[name] for name in on_front], [heights[name] for name in on_front]
    right = axis.get_xlim()[1]
    axis.step([*costs, right], [*front, front[-1]], where="post", color=THEME["accent"], linewidth=1.2)
    for name in shown:
        first, last = (min(end, top) for end in averages[name]["interval"])
        axis.plot([shown[name]] * 2, [first, last], color=THEME["muted"], linewidth=1.0)
        face = THEME["accent"] if name in on_front else "none"
        marker = KINDS.get(report["models"][name]["kind"], MIXTURE)
        axis.plot(
            shown[name], heights[name], marker, color=THEME["accent"], markerfacecolor=face, markersize=5.5,
            clip_on=False,
        )  # fmt: skip
    labels = {
        name: f"{name} {write_perplexity(averages[name]['perplexity'])}{' ↑' * (averages[name]['perplexity'] > top)}"
        for name in shown
    }
    _label(axis, {name: (shown[name], heights[name]) for name in shown}, labels, on_front)
    axis.set_xlabel(PANELS[cost].partition(" of ")[0])  # the title has room for all of it
    axis.set_ylabel(f"perplexity,\n{average_title(report, 'trained')}")


def _perplexities(axis: Axes, low: float, top: float) -> None:
    """The vertical axis: logarithmic, as equal ratios of perplexity are equal differences in nats."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    span = max(top / low, 1.01)
    axis.set_yscale("log")
    axis.set_ylim(low / span**0.06, top * span**0.02)
    axis.yaxis.set_major_locator(MaxNLocator(7))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(ScalarFormatter())


def _scale(axis: Axes, costs: Sequence[float], cost: str) -> None:
    """Logarithmic where the costs span more than a factor of 5 and none is 0; a little air at both ends."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(costs), max(costs)
    if low > 0 and high / low > 5:
        axis.set_xscale("log")
        axis.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        air = 0.06 * (high - low) or 0.06 * high or 1.0
        axis.set_xlim(low - air, high + air)
        axis.locator_params(axis="x", nbins=4)
    write_ticks(axis, "flops" if cost == "train_flops" else "count")


def _label(
    axis: Axes, points: Mapping[str, tuple[float, float]], labels: Mapping[str, str], bold: Sequence[str]
) -> None:
    """The names in a column to the right, in the order of their heights, each with a thin line from its point."""
    bottom, top = (math.log(end) for end in axis.get_ylim())
    names = sorted(points, key=lambda name: points[name][1])
    inches = axis.get_figure().get_size_inches()[1] - 0.8
    places = spread([(math.log(points[name][1]) - bottom) / (top - bottom) for name in names], LINE_INCHES / inches)
    for name, place in zip(names, places, strict=True):
        axis.annotate(
            labels[name], xy=points[name], xytext=(1.08, place), textcoords="axes fraction", va="center", zorder=1, fontsize=8,
            weight="bold" if name in bold else "normal",
            arrowprops={"arrowstyle": "-", "color": THEME["rule"], "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as keeps them `gap` apart (least squares), and all between 0 and 1 if they fit there."""
    from scipy.optimize import isotonic_regression

    count = len(places)
    room = [place - index * gap for index, place in enumerate(places)]
    highest = max(0.0, 1 - (count - 1) * gap)
    moved = isotonic_regression(room).x
    return [min(max(float(place), 0.0), highest) + index * gap for index, place in enumerate(moved)]


def pareto_panels(report: Mapping[str, Any]) -> dict[str, str]:
    """{cost in words: SVG element} of `draw_pareto` for the page."""
    height = panel_height(report)
    return {
        PANELS[cost]: inlined(lambda axis, cost=cost: draw_panel(axis, report, cost), 4.1, height, f"pareto {cost}")
        for cost in costs_shown(report)
    }
