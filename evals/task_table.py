"""Tasks in the report: each model's figure on each task, with its standard error. Reads tasks.json, imports no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.tables import ABSENT
from upcycle.durable import read_object, reading

FEW = 8  # tasks whose table still fits a terminal
NOTE = (
    "Figure of each task ± its standard error; the first row is what guessing gets. continuations: which of the passages "
    "goes on from a held-out text of the domain; acc_mutual_info takes the one that the context makes likelier by most, and "
    "its error is over documents."
)


def add_tasks(report: dict[str, Any], directories: Mapping[str, Path]) -> None:
    """Put every model's figures into `report["models"][model]["tasks"]`, and what they are into `report["tasks"]`.

    A table shows a task's first metric; members of a group are in tasks.json only.
    """
    chance: dict[str, float | None] = {}
    for name, directory in directories.items():
        path = directory / "tasks.json"
        found = read_object(path)
        with reading(path):
            report["tasks"] = {"lm_eval": found["lm_eval"], "chance": chance}
            shown = {task: row for task, row in found["tasks"].items() if row["group"] is None}
            report["models"][name]["tasks"] = {
                task: {key: row[key] for key in ("metrics", "questions", "sources")} for task, row in shown.items()
            }
            chance |= {task: row["chance"] for task, row in shown.items()}


def task_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows as text: chance, then every model that was given tasks; empty without any."""
    if "tasks" not in report:
        return []
    chance = report["tasks"]["chance"]
    given = {name: model["tasks"] for name, model in report["models"].items() if "tasks" in model}
    metrics = {task: next(iter(row["metrics"])) for tasks in given.values() for task, row in tasks.items()}
    return [
        ["model", *(f"{task} {metrics[task]}" for task in chance)],
        ["chance", *(ABSENT if p is None else f"{p:.3f}" for p in chance.values())],
        *([name, *(_cell(tasks[task]["metrics"][metrics[task]]) for task in chance)] for name, tasks in given.items()),
    ]


def _cell(figure: Mapping[str, Any]) -> str:
    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.3f}"
    return f"{figure['value']:.3f}{error}"


def format_tasks(report: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal, titles word below word; none where there are no tasks, or too many."""
    rows = task_rows(report)
    if not rows or len(rows[0]) - 1 > FEW:
        return []
    header, *body = rows
    words = [title.replace("continuations_", "continuations ").split() for title in header]
    depth = max(map(len, words))
    titles = [[title[line] if line < len(title) else "" for title in words] for line in range(depth)]
    widths = [max(len(row[column]) for row in titles + body) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in titles + body]
    return ["", *(line.rstrip() for line in lines), "", NOTE]
