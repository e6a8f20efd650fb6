"""Figures of a report for papers and READMEs: figures/*.svg and *.png, drawn by matplotlib from the report alone.

No pyplot and no global state: each figure is a `Figure` of its own, so nothing needs a display. Series differ by
marker and dash as well as by colour. The page inlines some of them (`drawing.inlined`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.drawing import HATCHES, SERIES, STYLE, THEME, new_figure
from evals.figures_pareto import costs_shown, draw_pareto
from evals.figures_training import curve_families, draw_course, draw_curves
from evals.tables import average_title, quality_columns, write_perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    for of in ("tokens", "flops"):
        if curve_families(report, of):
            yield "curves" if of == "tokens" else f"curves-{of}", draw_curves(report, of)
    if costs_shown(report):
        yield "pareto", draw_pareto(report)
    for name, model in report["models"].items():
        if model.get("course"):
            yield f"course-{name}", draw_course(name, model["course"])
        for part in routed_parts(model):
            yield f"routing-{name}-{part}", draw_routing(name, part, model["routing"], report["domains"])
            yield f"information-{name}-{part}", draw_information(name, part, model["routing"][part])
            if "histograms" in model["routing"][part]:
                yield f"gates-{name}-{part}", draw_gates(name, part, model["routing"][part])


def layer_numbers(measured: Mapping[str, Any]) -> list[int]:
    """The layers that were measured: of a mixture in some layers only, those."""
    return measured.get("layers") or list(range(len(measured["mutual_information"])))


def routed_parts(model: Mapping[str, Any]) -> list[str]:
    """Which sublayers of a model are routed and were measured: of `ffn`, `attention`."""
    return [part for part in ("ffn", "attention") if model["routing"] and model["routing"].get(part)]


def draw_perplexity(report: Mapping[str, Any]) -> Figure:
    """One panel per domain and average: a bar per model from zero; dashed line the seed, dotted line the oracle."""
    columns = quality_columns(report)
    models = report["models"]
    shown = [name for name, model in models.items() if model["kind"] != "oracle"]
    across = min(4, len(columns))
    figure, axes = new_figure(-(-len(columns) // across), across, 3.4, 0.9 + 0.22 * len(shown))
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
    figure, axes = new_figure(1, len(references), 3.3, 1.1 + 0.3 * most)
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


def draw_routing(name: str, part: str, routing: Mapping[str, Any], domains: Sequence[str]) -> Figure:
    """A heat map per layer, domain × expert: share of the assignments (ffn) or mean gate (attention), in percent."""
    share, numbers = routing[part]["share"], layer_numbers(routing[part])
    experts = routing[part].get("experts", routing["experts"])
    layers = len(numbers)
    across = min(4, layers)
    cell = 0.46
    figure, axes = new_figure(-(-layers // across), across, 1 + cell * len(experts), 1 + cell * 0.75 * len(domains))
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
        axis.set_title(f"layer {numbers[layer]}")
    what = "share of assignments" if part == "ffn" else "mean gate"
    figure.suptitle(f"{name}, {part}: {what}, percent", x=0.01, ha="left", fontsize=10)
    return figure


def draw_information(name: str, part: str, measured: Mapping[str, Any]) -> Figure:
    """Mutual information of expert and domain per layer (dots), and the range of its shuffled control (bars)."""
    values = measured["mutual_information"]
    figure, axes = new_figure(1, 1, 3.6, 1.2 + 0.26 * len(values))
    axis = axes[0, 0]
    for layer, (value, control) in enumerate(zip(values, measured["shuffled"], strict=True)):
        axis.plot([min(control), max(control)], [layer, layer], color=THEME["s4"], linewidth=5, solid_capstyle="butt")
        axis.plot(value, layer, "o", color=THEME["accent"], markersize=5)
    axis.set_yticks(range(len(values)), [f"layer {layer}" for layer in layer_numbers(measured)])
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_title(f"{name}, {part}")
    axis.set_xlabel("mutual information, nats\n(dot: measured; bar: domains shuffled)")
    return figure


def draw_gates(name: str, part: str, measured: Mapping[str, Any]) -> Figure:
    """Histogram of the tokens' largest gates, a panel per layer; dashed line at 1 / experts, where all gates are alike."""
    edges, numbers = measured["histograms"]["edges"], layer_numbers(measured)
    across = min(4, len(numbers))
    figure, axes = new_figure(-(-len(numbers) // across), across, 2.1, 1.5)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(numbers))
        if place < len(numbers):
            shares = [100 * share for share in measured["histograms"]["largest_gate"][place]]
            axis.stairs(shares, edges, fill=True, color=SERIES[0])
            axis.axvline(1 / len(measured["load"][place]), color=THEME["s1"], linestyle="--", linewidth=1.0)
            axis.set_xlim(0, 1)
            axis.set_title(f"layer {numbers[place]}")
    figure.suptitle(f"{name}, {part}: tokens by their largest gate, percent", x=0.01, ha="left", fontsize=10)
    return figure
