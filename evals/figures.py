"""Figures of a report for papers and READMEs: figures/*.svg and *.png, drawn by matplotlib from the report alone.

No pyplot and no global state: each figure is a `Figure` of its own, so nothing needs a display. Series differ by
marker and dash as well as by colour. The page inlines the curves; `themed_svg` turns their colours into CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.tables import average_title, quality_columns, write_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light theme of page.css, by the names of its variables; the page swaps each colour for its variable.
THEME = {
    "ink": "#20262b",
    "muted": "#626a70",
    "rule": "#d9d6cd",
    "accent": "#17617a",
    "s0": "#17617b",
    "s1": "#b3541e",
    "s2": "#4d7c3a",
    "s3": "#7a4d9b",
    "s4": "#a8843a",
    "s5": "#b23a5e",
    "s6": "#3d5fa8",
    "s7": "#5c6670",
}
SERIES = [THEME[f"s{index}"] for index in range(8)]
MARKERS = "osD^vPX*"
DASHES = ["-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2))]
HATCHES = {"branch": "....", "dense": "////", "soup": "xxxx"}
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": THEME["muted"],
    "axes.labelcolor": THEME["muted"],
    "xtick.color": THEME["muted"],
    "ytick.color": THEME["muted"],
    "text.color": THEME["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",
}


def write_figures(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Write every figure of the report as NAME.svg and NAME.png (160 dots an inch) into `out`; returns the paths."""
    from matplotlib import rc_context

    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context(STYLE):
        for name, figure in draw_figures(report):
            for path in (out / f"{name}.svg", out / f"{name}.png"):
                metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
                figure.savefig(path, dpi=160, metadata=metadata, facecolor="white")
                paths.append(path)
    return paths


def draw_figures(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of every figure that the report has numbers for."""
    yield "perplexity", draw_perplexity(report)
    if report["comparisons"]:
        yield "comparisons", draw_comparisons(report)
    if curve_families(report):
        yield "curves", draw_curves(report)
    for name, model in report["models"].items():
        for part in routed_parts(model):
            yield f"routing-{name}-{part}", draw_routing(name, part, model["routing"], report["domains"])
            yield f"information-{name}-{part}", draw_information(name, part, model["routing"][part])


def routed_parts(model: Mapping[str, Any]) -> list[str]:
    """Which sublayers of a model are routed and were measured: of `ffn`, `attention`."""
    return [part for part in ("ffn", "attention") if model["routing"] and model["routing"].get(part)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of rows × columns axes, each `width` by `height` inches, and the axes as a 2-D array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_perplexity(report: Mapping[str, Any]) -> Figure:
    """One panel per domain and average: a bar per model from zero; dashed line the seed, dotted line the oracle."""
    columns = quality_columns(report)
    models = report["models"]
    shown = [name for name, model in models.items() if model["kind"] != "oracle"]
    across = min(4, len(columns))
    figure, axes = _figure(-(-len(columns) // across), across, 3.4, 0.9 + 0.22 * len(shown))
    for axis, (title, column) in zip(axes.flat, columns.items(), strict=False):
        for row, name in enumerate(shown):
            kind = models[name]["kind"]
            color = THEME["rule"] if kind in ("seed", *HATCHES) else SERIES[0]
            axis.barh(row, column[name], height=0.7, color=color, hatch=HATCHES.get(kind), edgecolor=THEME["muted"])
            number = write_perplexity(column[name])
            axis.text(1.01, row, number, va="center", fontsize=7.5, transform=axis.get_yaxis_transform())
        for name, model in models.items():
            if model["kind"] in ("seed", "oracle"):
                dash = "--" if model["kind"] == "seed" else ":"
                axis.axvline(column[name], color=THEME["s1"], linestyle=dash, linewidth=1.2, label=name)
        axis.set_yticks(range(len(shown)), shown)
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.set_title(title.replace(" (", "\n("))
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    figure.supxlabel(f"{report['split']} perplexity, lower is better", color=THEME["muted"], fontsize=9)
    return figure


def draw_comparisons(report: Mapping[str, Any]) -> Figure:
    """Forest plot, one panel per reference: difference in nats per token with its interval; left of 0 is better."""
    references = list(dict.fromkeys(item["against"] for item in report["comparisons"]))
    most = max(sum(item["against"] == name for item in report["comparisons"]) for name in references)
    figure, axes = _figure(1, len(references), 3.3, 1.1 + 0.3 * most)
    for axis, reference in zip(axes.flat, references, strict=True):
        items = [item for item in report["comparisons"] if item["against"] == reference]
        for row, item in enumerate(items):
            low, high = item["interval"]
            clear = low > 0 or high < 0
            axis.plot([low, high], [row, row], color=THEME["ink"], linewidth=1.4)
            face = THEME["accent"] if clear else "white"
            axis.plot(item["nats_difference"], row, "o", color=THEME["accent"], markerfacecolor=face, markersize=5)
        axis.axvline(0, color=THEME["muted"], linewidth=0.9)
        axis.set_yticks(range(len(items)), [item["model"] for item in items])
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(items) - 0.5, -0.5)
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(f"against {reference}")
    title = average_title(report, "trained")
    figure.supxlabel(
        f"nats per token, {title}: left of 0 the model is better; hollow: the interval holds 0",
        color=THEME["muted"],
        fontsize=9,
    )
    return figure


def curve_families(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """{panel title: models with a training curve}; the seed, the branches and all else saw unlike budgets."""
    families = {"Seed": [], "Branches": [], "Mixtures and dense": []}
    for name, model in report["models"].items():
        if model["curve"]:
            families[{"seed": "Seed", "branch": "Branches"}.get(model["kind"], "Mixtures and dense")].append(name)
    return {title: names for title, names in families.items() if names}


def draw_curves(report: Mapping[str, Any]) -> Figure:
    """Training cross-entropy against tokens of the stage: a panel per family of models."""
    families = curve_families(report)
    figure, axes = _figure(1, len(families), 3.9, 3.4)
    for axis, (title, names) in zip(axes.flat, families.items(), strict=True):
        draw_family(axis, title, {name: report["models"][name]["curve"] for name in names})
    return figure


def draw_family(axis: Axes, title: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The curves of one family on one pair of axes; lines differ by dash and marker as well as by colour."""
    from matplotlib.ticker import EngFormatter

    for index, (name, curve) in enumerate(curves.items()):
        tokens, loss = zip(*curve, strict=True)
        axis.plot(
            tokens,
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
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="y", color=THEME["rule"], linewidth=0.6)
    axis.set_title(title)
    axis.set_xlabel("tokens seen in the stage")
    axis.set_ylabel("training loss, nats per token")
    axis.legend(frameon=False, fontsize=8, ncols=2 if len(curves) > 4 else 1)


def draw_routing(name: str, part: str, routing: Mapping[str, Any], domains: Sequence[str]) -> Figure:
    """A heat map per layer, domain × expert: share of the assignments (ffn) or mean gate (attention), in percent."""
    share = routing[part]["share"]
    experts = routing["experts"]
    layers = len(next(iter(share.values())))
    across = min(4, layers)
    cell = 0.46
    figure, axes = _figure(-(-layers // across), across, 1 + cell * len(experts), 1 + cell * 0.75 * len(domains))
    for layer, axis in enumerate(axes.flat):
        axis.set_visible(layer < layers)
        if layer >= layers:
            continue
        grid = [share[domain][layer] for domain in domains]
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")  # pale enough for dark numbers
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(experts)), experts, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(domains)), domains if layer % across == 0 else [""] * len(domains))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"layer {layer}")
    what = "share of assignments" if part == "ffn" else "mean gate"
    figure.suptitle(f"{name}, {part}: {what}, percent", x=0.01, ha="left", fontsize=10)
    return figure


def draw_information(name: str, part: str, measured: Mapping[str, Any]) -> Figure:
    """Mutual information of expert and domain per layer (dots), and the range of its shuffled control (bars)."""
    values = measured["mutual_information"]
    figure, axes = _figure(1, 1, 3.6, 1.2 + 0.26 * len(values))
    axis = axes[0, 0]
    for layer, (value, control) in enumerate(zip(values, measured["shuffled"], strict=True)):
        axis.plot([min(control), max(control)], [layer, layer], color=THEME["s4"], linewidth=5, solid_capstyle="butt")
        axis.plot(value, layer, "o", color=THEME["accent"], markersize=5)
    axis.set_yticks(range(len(values)), [f"layer {layer}" for layer in range(len(values))])
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_title(f"{name}, {part}")
    axis.set_xlabel("mutual information, nats\n(dot: measured; bar: domains shuffled)")
    return figure


def themed_svg(report: Mapping[str, Any]) -> dict[str, str]:
    """{panel title: SVG element} of the training curves, in the page's own colours and font (CSS variables)."""
    from matplotlib import rc_context

    panels = {}
    for index, (title, names) in enumerate(curve_families(report).items()):
        buffer = io.StringIO()
        with rc_context(STYLE | {"svg.hashsalt": f"upcycle{index}"}):  # ids must differ between SVGs of one page
            figure, axes = _figure(1, 1, 3.8, 3.1)
            draw_family(axes[0, 0], "", {name: report["models"][name]["curve"] for name in names})
            figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
        for variable, color in THEME.items():
            svg = svg.replace(color, f"var(--{variable})")
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # matplotlib names the groups of every figure alike
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
        panels[title] = svg
    return panels
