"""Sections of the page on what training took and did: quality against compute, curves, routers over training."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from evals.figures_pareto import PANELS, kinds_shown, pareto_panels
from evals.figures_training import SIDES, course_panels, curve_panels
from evals.page_parts import cell, figures, row_header, sortable_table
from evals.tables import CUT, average_title, write_cost, write_perplexity

SHAPES = {
    "seed": "square",
    "branch": "diamond",
    "dense": "cross",
    "soup": "plus",
    "merge": "hexagon",
    "ensemble": "star",
    "mixture": "circle",
}


def quality_against_compute(report: Mapping[str, Any]) -> str:
    """Perplexity over training FLOPs and over active parameters; who is on the front, in words and in a table."""
    if not report.get("pareto"):  # reports of earlier versions have none
        return ""
    shapes = ", ".join(f"{SHAPES[kind]} {kind}" for kind in kinds_shown(report))
    lead = (
        f"Perplexity of the {average_title(report, 'trained')} with its 95% interval, over what a model cost. The step line is "
        "the Pareto front: no model is better and cheaper than those on it (filled marks, bold names). "
        f"An arrow after a figure: it lies beyond the scale, which ends at {CUT:g} times the seed's. Marks: {shapes}."
    )
    named = "".join(f"<li>{escape(front_sentence(report, cost))}</li>" for cost in PANELS)
    panels = figures({f"Against {title}": svg for title, svg in pareto_panels(report).items()}, "Perplexity")
    return (
        f'<p class="lead">{escape(lead)}</p><ul class="findings">{named}</ul><div class="grid wide">{panels}</div>'
        f"{_front_table(report)}"
    )


def front_sentence(report: Mapping[str, Any], cost: str) -> str:
    """Who is on the front of a cost, cheapest first, and whose cost nobody knows."""
    found = report["pareto"][cost]
    members = ", ".join(
        f"{name} ({write_cost(cost, report['models'][name][cost])}, "
        f"{write_perplexity(report['models'][name]['average']['trained']['perplexity'])})"
        for name in found["front"]
    )
    unknown = f" Unknown, so left out: {', '.join(found['unknown'])}." if found["unknown"] else ""
    return f"On the front of {PANELS[cost]}: {members or 'none'}.{unknown}"


def _front_table(report: Mapping[str, Any]) -> str:
    """Models × both costs; on the front or not."""
    rows = []
    for name, model in report["models"].items():
        if model["kind"] == "oracle":
            continue
        average = model["average"]["trained"]
        low, high = average["interval"]
        cells = cell(
            average["perplexity"],
            write_perplexity(average["perplexity"]),
            f"{write_perplexity(low)} to {write_perplexity(high)}",
        )
        for cost in PANELS:
            on = "on the front" if name in report["pareto"][cost]["front"] else ""
            cells += cell(model[cost], write_cost(cost, model[cost]), on)
        rows.append(f"<tr>{row_header(name, model['kind'])}{cells}</tr>")
    titles = {"model": "text", average_title(report, "trained"): "", "training FLOPs": "", "active parameters": ""}
    note = (
        "The front goes by the measured perplexities; where intervals overlap, other documents may change who is on it."
    )
    return sortable_table("pareto-table", "Quality against compute", titles, rows, note)


def curves(report: Mapping[str, Any]) -> str:
    """Training loss against tokens and against FLOPs, one drawing per family."""
    panels = {of: curve_panels(report, of) for of in ("tokens", "flops")}
    if not panels["tokens"]:
        return ""
    lead = (
        "Training cross-entropy on each model's own data, so curves of different mixtures of data do not compare. Tokens and "
        "FLOPs are those of a model's last training stage alone."
    )
    drawn = "".join(
        f'<h3>Against {word}</h3><div class="grid">{figures(panels[of], f"Training loss against {word}")}</div>'
        for of, word in (("tokens", "tokens"), ("flops", "FLOPs"))
        if panels[of]
    )
    return f'<p class="lead">{lead}</p>{drawn}'


COLUMNS = (
    ("information", 4), ("information_shuffled", 4), ("entropy", 3), ("largest_load", 3), ("dead_experts", 1), ("gate_sum", 3),
)  # fmt: skip


def specialisation(report: Mapping[str, Any], opened: str | None) -> str:
    """Of every mixture that was trained: information, entropy, largest load and dead experts over training; `opened` is open."""
    courses = {name: model["course"] for name, model in report["models"].items() if model.get("course")}
    if not courses:
        return ""
    lead = (
        "What training recorded of the routers, batch by batch. Information: how much a token's expert tells of its domain; dotted: the "
        "same with domains dealt anew to the batch's texts, which is chance. Else dotted: what equal shares would give, entropy ln E and load 1/E. "
        "Entropy that falls means surer routers, load that rises above the dotted line means experts that take more than their "
        "share of a batch of all domains."
    )
    folds = "".join(
        f"<details{' open' if name == opened else ''}><summary>{escape(name)}</summary>{_lines(course)}"
        f'<div class="grid small">{figures(course_panels(name, course), name)}</div></details>'
        for name, course in courses.items()
    )
    return f'<p class="lead">{lead}</p>{_course_table(courses)}{folds}'


def _lines(course: Mapping[str, Any]) -> str:
    """Which line is which sublayer's."""
    marks = {"ffn": "solid, dots", "attention": "dashed, squares"}
    return f"<p class='note'>{'; '.join(f'{SIDES[part][0]}: {marks[part]}' for part in SIDES if part in course)}.</p>"


def _course_table(courses: Mapping[str, Mapping[str, Any]]) -> str:
    """Mixtures × sublayers: each measure in the first and the last stretch of training."""
    rows = []
    for name, course in courses.items():
        for part in (part for part in SIDES if part in course):
            found = course[part]
            cells = cell(SIDES[part][0], SIDES[part][0], css="text") + cell(
                found["experts"], str(found["experts"]), f"{found['layers']} layers"
            )
            for measure, digits in COLUMNS:
                first, last = (found[measure][0], found[measure][-1]) if measure in found else (None, None)
                shown = "–" if last is None else f"{last:.{digits}f}"
                cells += cell(last, shown, "" if first is None else f"from {first:.{digits}f}")
            rows.append(f"<tr>{row_header(name)}{cells}</tr>")
    titles = dict.fromkeys(["model", "sublayer"], "text")
    named = ["experts", "information, nats", "shuffled", "entropy, nats", "largest load", "dead experts", "gate sum"]
    titles |= dict.fromkeys(named, "")
    note = "Mean over the last stretch of training, and below it over the first."
    return sortable_table("course-table", "Routers over training", titles, rows, note)
