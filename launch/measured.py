"""What a finished stage measured, as figures and as tables (columns, rows), for trackers. From its files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

Tables = dict[str, tuple[list[str], list[list[Any]]]]


class Measured(NamedTuple):
    """`figures` and `tables` by name; `files`, which belong to a report."""

    figures: dict[str, float]
    tables: Tables
    files: list[Path]


def measured(stage: Path) -> Measured:
    """What the files of an artifact hold; of stages that measure nothing, nothing."""
    for name, read in READERS.items():
        if (stage / name).is_file():
            figures, tables = read(json.loads((stage / name).read_text(encoding="utf-8")))
            files = [stage / "report.json", stage / "report.html"] if name == "report.json" else []
            return Measured(figures, tables, files)
    return Measured({}, {}, [])


def _evaluation(found: Mapping[str, Any]) -> tuple[dict[str, float], Tables]:
    """Domains; of a mixture's routers also, for each sublayer that has some, each domain's and everybody's use of experts."""
    rows = [
        [name, math.exp(one["nats"] / one["tokens"]), one["nats"] / math.log(2) / one["bytes"], one["tokens"]]
        for name, one in found["domains"].items()
    ]
    tables: Tables = {"domains": (["domain", "perplexity", "bits_per_byte", "tokens"], rows)}
    for part in ("ffn", "attention"):
        if routing := (found.get("routing") or {}).get(part):
            tables |= _routing(part, routing)
    figures = {f"perplexity/{row[0]}": row[1] for row in rows} | {f"bits_per_byte/{row[0]}": row[2] for row in rows}
    return figures, tables


def _routing(part: str, routing: Mapping[str, Any]) -> Tables:
    layers, experts = routing["layers"], routing["experts"]
    shares = [
        [layer, domain, routing["entropy"][domain][at], *share[at]]
        for domain, share in routing["share"].items()
        for at, layer in enumerate(layers)
    ]
    loads = [
        [layer, routing["mean_entropy"][at], routing["mutual_information"][at], *routing["load"][at]]
        for at, layer in enumerate(layers)
    ]
    return {
        f"{part}_share": (["layer", "domain", "entropy", *experts], shares),
        f"{part}_load": (["layer", "entropy", "mutual_information", *experts], loads),
    }


def _tasks(found: Mapping[str, Any]) -> tuple[dict[str, float], Tables]:
    rows = [
        [task, metric, one["value"], one["stderr"], row["chance"], row["questions"]]
        for task, row in found["tasks"].items()
        for metric, one in row["metrics"].items()
    ]
    columns = ["task", "metric", "value", "stderr", "chance", "questions"]
    return {f"{row[0]}/{row[1]}": row[2] for row in rows}, {"tasks": (columns, rows)}


def _ablation(found: Mapping[str, Any]) -> tuple[dict[str, float], Tables]:
    """Nats per token of each domain, whole, and for each expert without it and with it alone."""

    def rate(of: Mapping[str, Any] | None, domain: str) -> float | None:
        return of[domain]["nats"] / of[domain]["tokens"] if of else None

    rows = [
        [expert, domain, rate(found["whole"], domain), rate(one["removed"], domain), rate(one["forced"], domain)]
        for expert, one in found["experts"].items()
        for domain in found["whole"]
    ]
    return {}, {"ablation": (["expert", "domain", "whole", "removed", "forced"], rows)}


def _report(found: Mapping[str, Any]) -> tuple[dict[str, float], Tables]:
    """One row a model: what it is, what it took, its averages and its perplexity on every domain."""
    groups = [group for group, domains in found["domain_groups"].items() if domains]
    taken = ["parameters", "active_parameters", "train_tokens", "train_flops", "seconds"]
    columns = ["model", "kind", *(f"{group} average" for group in groups), *found["domains"], *taken]
    rows = [
        [
            name,
            model["kind"],
            *(model["average"][group]["perplexity"] for group in groups),
            *(model["perplexity"][domain] for domain in found["domains"]),
            *(model[key] for key in taken),
        ]
        for name, model in found["models"].items()
    ]
    return {}, {"summary": (columns, rows)}


# The file that tells what kind of measurement a stage made.
READERS = {
    "evaluation.json": _evaluation,
    "tasks.json": _tasks,
    "ablation.json": _ablation,
    "report.json": _report,
}
