"""Charts of the page as HTML: tables whose cells hold bars, intervals and shades, so that every mark has its number.

Positions are fractions of the cell's width, handed to page.css as the variables --v, --lo and --hi.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evals.figures import layer_numbers, routed_parts
from evals.findings import verdict
from evals.tables import longest_shown, quality_columns, write_perplexity, write_signed

PARTS = {"ffn": "feed-forward experts", "attention": "attention experts"}


def breakable(name: str) -> str:
    """A model's name as HTML that may break after an underscore or a slash."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def bars(report: Mapping[str, Any]) -> str:
    """A panel per domain and average: one bar per model, from zero, with the seed and the oracle as lines."""
    return "\n".join(_bar_panel(report, title, column) for title, column in quality_columns(report).items())


def _bar_panel(report: Mapping[str, Any], title: str, column: Mapping[str, float]) -> str:
    """One panel of `bars`: a table of model, bar and perplexity."""
    models = report["models"]
    longest = longest_shown(report, column)
    lines = "".join(
        f'<i class="line {models[name]["kind"]}" style="--v:{column[name] / longest:.4f}"></i>'
        for name in models
        if models[name]["kind"] in ("seed", "oracle")
    )
    rows = "".join(
        f'<tr><th scope="row">{breakable(name)}</th><td><div class="track">'
        f'<i class="bar {escape(models[name]["kind"])}{" cut" * (value > longest)}" '
        f'style="--v:{min(value / longest, 1):.4f}"></i>{lines}</div></td>'
        f'<td class="value">{write_perplexity(value)}</td></tr>'
        for name, value in column.items()
        if models[name]["kind"] != "oracle"
    )
    references = ", ".join(
        f"{name} {write_perplexity(column[name])}" for name in models if models[name]["kind"] in ("seed", "oracle")
    )
    return (
        f'<figure><h3>{escape(title)}</h3><table class="bars" aria-label="Perplexity: {escape(title)}">'
        f"<tbody>{rows}</tbody></table><figcaption>Lines: {escape(references or 'none')}</figcaption></figure>"
    )


def bar_key(report: Mapping[str, Any]) -> str:
    """What each bar's pattern and each line's dash stands for."""
    kinds = {model["kind"] for model in report["models"].values()}
    bars_shown = [kind for kind in ("branch", "dense", "soup", "merge", "ensemble", "seed") if kind in kinds]
    items = [(f"bar {kind}", {"seed": "seed (plain)"}.get(kind, kind)) for kind in bars_shown]
    if kinds - {"seed", "branch", "dense", "soup", "merge", "ensemble", "oracle"}:
        items.append(("bar", "mixture"))
    items += [(f"line {kind}", f"{kind}, as a line") for kind in ("seed", "oracle") if kind in kinds]
    marks = "".join(f'<li><span><i class="{mark}"></i></span>{label}</li>' for mark, label in items)
    return f'<ul class="key" aria-label="Key">{marks}</ul>'


def forest(report: Mapping[str, Any]) -> str:
    """Paired differences, a table per reference on a scale of its own; left of the 0 line the model is better."""
    references = dict.fromkeys(item["against"] for item in report["comparisons"])
    return "\n".join(
        _forest_table(reference, [item for item in report["comparisons"] if item["against"] == reference])
        for reference in references
    )


def _forest_table(reference: str, items: Sequence[Mapping[str, Any]]) -> str:
    """One reference's comparisons: model, dot with interval, difference, verdict."""
    ends = [end for item in items for end in item["interval"]] + [0.0]
    low, high = _padded(min(ends), max(ends))
    rows = []
    for item in items:
        left, right = item["interval"]
        dot = "dot hollow" if left <= 0 <= right else "dot"
        plot = _range_plot(low, high, item["nats_difference"], item["interval"], dot)
        rows.append(
            f'<tr><th scope="row">{breakable(item["model"])}</th><td class="plot">{plot}</td><td class="number">'
            f"{write_signed(item['nats_difference'])} <small>[{write_signed(left)}, {write_signed(right)}]</small>"
            f"<small>{verdict(item)}</small></td></tr>"
        )
    return (
        f'<div class="scroll"><table class="forest"><thead><tr><th scope="col" class="text">against '
        f'<b>{breakable(reference)}</b></th><th scope="col" class="plot">{_ticks(low, high)}</th>'
        f'<th scope="col">nats per token</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """The range with 6% of air at both ends, never empty."""
    air = 0.06 * (high - low) or 1e-3
    return low - air, high + air


def _ticks(low: float, high: float) -> str:
    """The scale over a plot: 0 where it lies, and each end that leaves room beside it."""
    zero = -low / (high - low)
    ends = f'<span class="low">−{-low:.3f}</span>' if zero > 0.45 else ""
    ends += f'<span class="high">{high:.3f}</span>' if zero < 0.55 else ""
    return f'<div class="ticks">{ends}<span style="--v:{zero:.4f}">0</span></div>'


def _range_plot(low: float, high: float, value: float, band: Sequence[float], dot: str = "dot") -> str:
    """A dot at `value` over the band [left, right], and a line at 0, on the scale from `low` to `high`."""
    zero, at, left, right = ((number - low) / (high - low) for number in (0, value, *band))
    return (
        f'<div class="range"><i class="zero" style="--v:{zero:.4f}"></i>'
        f'<i class="whisker" style="--lo:{left:.4f};--hi:{right:.4f}"></i>'
        f'<i class="{dot}" style="--v:{at:.4f}"></i></div>'
    )


def heat_maps(part: str, routing: Mapping[str, Any], domains: Sequence[str]) -> str:
    """A table per layer, domain × expert, in percent, shaded by value; the last column is the router's entropy."""
    measured = routing[part]
    names = measured.get("experts", routing["experts"])
    tables = "".join(_heat_table(place, measured, names, domains) for place in range(len(layer_numbers(measured))))
    what = "share of token-to-expert assignments" if part == "ffn" else "mean gate"
    return f'<h3>{PARTS[part].capitalize()}: {what}, percent</h3><div class="grid small">{tables}</div>'


def _heat_table(layer: int, measured: Mapping[str, Any], experts: Sequence[str], domains: Sequence[str]) -> str:
    """One layer of `heat_maps`; a domain's own experts (code, code:2, code/1) are underlined."""
    head = "".join(f'<th scope="col">{escape(expert)}</th>' for expert in experts)
    rows = []
    for domain in domains:
        cells = "".join(
            f'<td class="{"own" * (re.split("[:/]", expert)[0] == domain)}" style="--v:{share:.3f}">{100 * share:.0f}</td>'
            for expert, share in zip(experts, measured["share"][domain][layer], strict=True)
        )
        entropy = f'<td class="entropy">{measured["entropy"][domain][layer]:.2f}</td>'
        rows.append(f'<tr><th scope="row">{escape(domain)}</th>{cells}{entropy}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><caption>layer {layer_numbers(measured)[layer]}</caption><thead><tr><td></td>{head}'
        f'<th scope="col">entropy</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def information(report: Mapping[str, Any]) -> str:
    """Mutual information of expert and domain, a panel per routed sublayer, all on one scale."""
    measured = [
        (name, part, model["routing"][part]) for name, model in report["models"].items() for part in routed_parts(model)
    ]
    numbers = [[part["mutual_information"], *part["shuffled"]] for _, _, part in measured]
    low, high = _padded(0, max((value for lists in numbers for values in lists for value in values), default=0))
    return "".join(_information_table(name, PARTS[part], values, low, high) for name, part, values in measured)


def _information_table(name: str, part: str, measured: Mapping[str, Any], low: float, high: float) -> str:
    """One panel of `information`: a layer's dot over the range of its control with domains shuffled."""
    rows = []
    layers = zip(layer_numbers(measured), measured["mutual_information"], measured["shuffled"], strict=True)
    for layer, value, control in layers:
        band = (min(control), max(control))
        rows.append(
            f'<tr><th scope="row">layer {layer}</th><td class="plot control">'
            f'{_range_plot(low, high, value, band)}</td><td class="number">{value:.4f} '
            f"<small>{band[0]:.4f} to {band[1]:.4f}</small></td></tr>"
        )
    return (
        f'<figure><h3>{escape(name)}, {part}</h3><table class="forest"><thead><tr><td></td>'
        f'<th scope="col" class="plot">{_ticks(low, high)}</th><th scope="col">nats</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></figure>"
    )
