"""Figures of training: loss against tokens and against FLOPs, and how the routers of a mixture went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.drawing import DASHES, MARKERS, SERIES, THEME, inlined, new_figure, write_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {
    "information": "I(domain; expert), nats",
    "entropy": "entropy, nats",
    "largest_load": "largest load",
    "dead_experts": "dead experts",
}
CONTROL = "information_shuffled"
SIDES = {"ffn": ("feed-forward", "s0", "-", "o"), "attention": ("attention", "s1", (0, (6, 2)), "s")}


def curve_families(report: Mapping[str, Any], of: str = "tokens") -> dict[str, list[str]]:
    """{panel title: models with a training curve against `of`}; the seed, the branches and all else saw unlike budgets.

    of: "tokens" or "flops"; for FLOPs the cost of a token must be known.
    """
    families = {"Seed": [], "Branches": [], "Mixtures and dense": []}
    for name, model in report["models"].items():
        if model["curve"] and (of == "tokens" or model.get("flops_per_token")):
            families[{"seed": "Seed", "branch": "Branches"}.get(model["kind"], "Mixtures and dense")].append(name)
    return {title: names for title, names in families.items() if names}


def curve_of(model: Mapping[str, Any], of: str) -> list[tuple[float, float]]:
    """[(tokens or FLOPs of the stage, nats per token), ...] of a model."""
    scale = model["flops_per_token"] if of == "flops" else 1
    return [(tokens * scale, loss) for tokens, loss in model["curve"]]


def draw_curves(report: Mapping[str, Any], of: str = "tokens") -> Figure:
    """Training cross-entropy against tokens or FLOPs of the stage: a panel per family of models."""
    families = curve_families(report, of)
    figure, axes = new_figure(1, len(families), 3.9, 3.4)
    for axis, (title, names) in zip(axes.flat, families.items(), strict=True):
        draw_family(axis, title, {name: curve_of(report["models"][name], of) for name in names}, of)
    return figure


def draw_family(axis: Axes, title: str, curves: Mapping[str, Sequence[tuple[float, float]]], of: str) -> None:
    """The curves of one family on one pair of axes; lines differ by dash and marker as well as by colour."""
    for index, (name, curve) in enumerate(curves.items()):
        spent, loss = zip(*curve, strict=True)
        axis.plot(
            spent,
            loss,
            color=SERIES[index % len(SERIES)],
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markevery=(0.1 + 0.1 * (index % 5) / 5, 0.2),
            markersize=4,
            linewidth=1.1,
            label=name,
        )
    ordered = sorted(loss for curve in curves.values() for _, loss in curve)
    top = ordered[int(0.97 * (len(ordered) - 1))]  # the first steps of a fresh model would flatten all the rest
    span = max(top - ordered[0], 1e-3)
    axis.set_ylim(ordered[0] - 0.05 * span, top + 0.12 * span)
    axis.set_xlim(left=0)
    axis.locator_params(axis="x", nbins=5)
    write_ticks(axis, of)
    axis.grid(axis="y", color=THEME["rule"], linewidth=0.6)
    axis.set_title(title)
    axis.set_xlabel("training FLOPs of the stage" if of == "flops" else "tokens seen in the stage")
    axis.set_ylabel("training loss, nats per token")
    axis.legend(frameon=False, fontsize=8, ncols=2 if len(curves) > 4 else 1)


def curve_panels(report: Mapping[str, Any], of: str) -> dict[str, str]:
    """{panel title: SVG element} of `draw_curves` for the page."""
    panels = {}
    for title, names in curve_families(report, of).items():
        curves = {name: curve_of(report["models"][name], of) for name in names}
        panels[title] = inlined(
            lambda axis, curves=curves: draw_family(axis, "", curves, of), 3.8, 3.1, f"{of} {title}"
        )
    return panels


def measures_of(course: Mapping[str, Any]) -> list[str]:
    """Those of MEASURES that were recorded of every routed sublayer."""
    return [measure for measure in MEASURES if all(measure in course[part] for part in SIDES if part in course)]


def draw_course(name: str, course: Mapping[str, Any]) -> Figure:
    """The course of one mixture's routers over training, a panel for each measure."""
    measures = measures_of(course)
    figure, axes = new_figure(1, len(measures), 2.7, 2.4)
    for axis, measure in zip(axes.flat, measures, strict=True):
        draw_measure(axis, course, measure)
        axis.set_title(MEASURES[measure])
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{name}: its routers over training", x=0.01, ha="left", fontsize=10)
    return figure


def draw_measure(axis: Axes, course: Mapping[str, Any], measure: str) -> None:
    """One measure against tokens, a line for each routed sublayer; dotted: what equal shares would give, or shuffled domains."""
    for part, (label, color, dash, marker) in SIDES.items():
        if part not in course:
            continue
        axis.plot(
            course["tokens"], course[part][measure], color=THEME[color], linestyle=dash, marker=marker,
            markevery=(0.1, 0.2), markersize=4, linewidth=1.2, label=label,
        )  # fmt: skip
        if measure == "information":
            axis.plot(course["tokens"], course[part][CONTROL], color=THEME[color], linestyle=":", linewidth=1.0)
        if equal := equal_shares(measure, course[part]["experts"]):
            axis.axhline(equal, color=THEME["muted"], linestyle=":", linewidth=1.0)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0, top=max(axis.get_ylim()[1], 1.0) if measure == "dead_experts" else None)
    axis.locator_params(axis="x", nbins=4)
    write_ticks(axis, "tokens")
    axis.grid(axis="y", color=THEME["rule"], linewidth=0.6)
    axis.set_xlabel("tokens seen in the stage")


def equal_shares(measure: str, experts: int) -> float | None:
    """A measure where every expert has the same share: entropy ln E, load 1 / E; None for the number of dead experts."""
    return {"entropy": math.log(experts), "largest_load": 1 / experts}.get(measure)


def course_panels(name: str, course: Mapping[str, Any]) -> dict[str, str]:
    """{measure in words: SVG element} of `draw_course` for the page."""
    return {
        title: inlined(lambda axis, measure=measure: draw_measure(axis, course, measure), 2.7, 2.1, f"{name} {measure}")
        for measure, title in MEASURES.items()
        if measure in measures_of(course)
    }
