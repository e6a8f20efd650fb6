"""A sweep's points side by side: one row a point and model, and means with intervals over points that differ in rng_seed only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from scipy.stats import t

from evals.page_parts import cell, document, row_header, section, sortable_table
from evals.tables import ABSENT, COSTS, write_perplexity

REPLICATE = "rng_seed"


def summarise(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a sweep's points say; JSON-serialisable.

    points: of each its number `point`, `settings` (those that points differ in), `state`, `error`, and `report` (None without one). `groups`: points
    that differ in rng_seed only, with each model's `nats_per_token`: mean over points, its 95 % interval (Student's t; None for one point)
    and their number.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(_settings(point).items()), []).append(point)
    return {
        "keys": list(dict.fromkeys(key for point in points for key in point["settings"])),
        "points": [{key: value for key, value in point.items() if key != "report"} for point in points],
        "models": list(
            dict.fromkeys(name for point in points if point["report"] for name in point["report"]["models"])
        ),
        "domains": next((point["report"]["domain_groups"]["trained"] for point in points if point["report"]), []),
        "groups": [
            {"settings": dict(settings), "points": len(members), "models": _models(members)}
            for settings, members in groups.items()
        ],
    }


def _settings(point: Mapping[str, Any]) -> dict[str, str]:
    """Of a point, less what makes it a replicate of another."""
    return {key: value for key, value in point["settings"].items() if key != REPLICATE}


def _models(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    reports = [point["report"] for point in points if point["report"]]
    names = dict.fromkeys(name for report in reports for name in report["models"])
    return {
        name: _mean([r["models"][name]["average"]["trained"]["nats_per_token"] for r in reports if name in r["models"]])
        for name in names
    }


def _mean(values: Sequence[float]) -> dict[str, Any]:
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "interval": None, "points": count}
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return {"mean": mean, "interval": [mean - half, mean + half], "points": count}


def rows(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of sweep.csv: a point and model each; one for a point without a report."""
    found = []
    for point in points:
        start = {"point": point["point"], **point["settings"], "state": point["state"], "error": point["error"]}
        models = point["report"]["models"] if point["report"] else {}
        for name, model in models.items():
            costs = {field: model.get(field) for field in COSTS}
            perplexity = {f"perplexity {domain}": value for domain, value in model["perplexity"].items()}
            average = {"trained perplexity": model["average"]["trained"]["perplexity"]}
            found.append(start | {"model": name, "kind": model["kind"]} | average | perplexity | costs)
        if not models:
            found.append(start)
    return found


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows as text: settings × models, the mean trained perplexity and its interval."""
    keys = [key for key in found["keys"] if key != REPLICATE]
    lines = [[*keys, "points", *found["models"]]]
    for group in found["groups"]:
        shown = [write_mean(group["models"].get(name)) for name in found["models"]]
        lines.append([*(group["settings"].get(key, ABSENT) for key in keys), _points(group), *shown])
    return lines


def _points(group: Mapping[str, Any]) -> str:
    """How many points there are, and of how many of them figures are shown where that is fewer."""
    shown = max((model["points"] for model in group["models"].values()), default=0)
    return str(shown) if shown == group["points"] else f"{shown} of {group['points']}"


def write_mean(mean: Mapping[str, Any] | None) -> str:
    """`28.31 [27.90, 28.73]`: exp of the mean nats per token."""
    if mean is None:
        return ABSENT
    middle = write_perplexity(float(np.exp(mean["mean"])))
    if mean["interval"] is None:
        return middle
    low, high = (write_perplexity(float(np.exp(end))) for end in mean["interval"])
    return f"{middle} [{low}, {high}]"


def note(found: Mapping[str, Any]) -> str:
    return (
        f"Test perplexity over {', '.join(found['domains'])}: exp of the mean nats per token over points that differ in rng_seed only, with the 95 % "
        "interval of Student's t over them."
    )


def format_sweep(found: Mapping[str, Any]) -> str:
    """The table for a terminal, its note, and the points that failed."""
    lines = table(found)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(one.ljust(width) for one, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "─" * (sum(widths) + 2 * len(widths) - 2))
    said = ["", note(found)] if found["models"] else []
    return "\n".join(
        [
            *(text if found["models"] else []),
            *said,
            *(_unfinished(point) for point in found["points"] if point["state"] != "done"),
        ]
    )


def _unfinished(point: Mapping[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in point["settings"].items())
    why = f": {point['error']}" if point["error"] else ""
    return f"point {point['point']} ({settings}) {point['state']}{why}"


def render_sweep(name: str, found: Mapping[str, Any]) -> str:
    """The whole page as one HTML string."""
    keys = [key for key in found["keys"] if key != REPLICATE]
    lines = []
    for group in found["groups"]:
        first, *others = [group["settings"].get(key, ABSENT) for key in keys] or ["all"]
        cells = "".join(cell(one, one, css="text") for one in others) + cell(group["points"], _points(group))
        for model in found["models"]:
            mean = group["models"].get(model)
            cells += cell(mean["mean"] if mean else "", write_mean(mean))
        lines.append(f"<tr>{row_header(first)}{cells}</tr>")
    titles = dict.fromkeys(keys or ["settings"], "text") | {"points": ""} | dict.fromkeys(found["models"], "")
    left = [_unfinished(point) for point in found["points"] if point["state"] != "done"]
    listed = f"<ul>{''.join(f'<li>{escape(one)}</li>' for one in left)}</ul>" if left else ""
    body = section(
        "summary",
        "Settings and models",
        sortable_table("sweep-table", "Settings and models", titles, lines, note(found)),
    )
    return document(name, f"Sweep: {name}", body + section("unfinished", "Points without a report", listed), found)
