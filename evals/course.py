"""How the routers of a mixture went over its training, from what metrics.jsonl recorded of the training batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

POINTS = 50


def course_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means of at most `POINTS` stretches of training: `tokens` at the end of each, and of `ffn` and `attention`

    entropy        nats, mean over layers
    largest_load   of one expert of one layer
    dead_experts   with less than a tenth of an equal share, over all layers
    gate_sum       of a token, mean over layers (feed-forward)
    information    of expert and domain in nats, mean over layers; information_shuffled: of domains dealt anew

    and how many `experts` a layer and `layers` there are. rows: of metrics.jsonl, in order. None where none is of routers.
    """
    rows = [row for row in rows if "load" in row]
    if not rows:
        return None
    bins = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))

    def means(values_N: np.ndarray) -> list[float]:
        return [float(f"{values_N[inside].mean():.6g}") for inside in bins]

    found: dict[str, Any] = {"tokens": [rows[inside[-1]]["tokens"] for inside in bins]}
    for part, series in _series(rows).items():
        sizes = dict(zip(("layers", "experts"), series.pop("load").shape[1:], strict=True))
        found[part] = sizes | {measure: means(values_N) for measure, values_N in series.items()}
    return found


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Of each sublayer `load` (N, L, E) and every measure (N), over N rows."""
    from upcycle.routing import DEAD_SHARE  # torch, which reading a report has no need of

    parts = {
        "ffn": {"load": "load"} | {m: m for m in ("largest_load", "dead_experts", "gate_sum")},
        "attention": {"load": "attention_load"},
    }
    for part, names in parts.items():
        names |= {measure: f"{part}_{measure}" for measure in ("entropy", "information", "information_shuffled")}
    found = {}
    for part, names in parts.items():
        given = {measure: name for measure, name in names.items() if all(name in row for row in rows)}
        if not {"load", "entropy"} <= set(given):  # no router there, or metrics of an earlier version
            continue
        series = {measure: np.array([row[name] for row in rows], dtype=np.float64) for measure, name in given.items()}
        for measure in {"information", "information_shuffled"} & set(series):
            series[measure] = series[measure].mean(axis=1)
        load_NLE = series["load"]
        series.setdefault("largest_load", load_NLE.max(axis=(1, 2)))  # of loads that are written to four decimals
        series.setdefault("dead_experts", (load_NLE < DEAD_SHARE / load_NLE.shape[2]).sum(axis=(1, 2)))
        found[part] = series
    return found
