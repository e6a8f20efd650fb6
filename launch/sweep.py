"""Sweeps (`upcycle -m`): a point that fails leaves the others be, and one table of all is written at the end.

Hydra expands the sweep and names its points' directories, runs/NAME/0, 1, ...
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from launch.follow import StageState, stage_states
from launch.scheduler import queue
from launch.sharing import submitted_stages
from launch.status import read_manifest, read_settings
from launch.sweep_jobs import submit_table
from upcycle.durable import read_object, write_json
from upcycle.store import RECORD

POINT = "point.json"


def only_shows(config: DictConfig) -> bool:
    """Whether a run of these settings makes nothing."""
    return bool(config.plan or config.dry_run or OmegaConf.select(config, "assemble.dry_run"))


def note_point(where: Path, overrides: Sequence[str], error: str | None, ended: bool) -> None:
    """Keep beside a point's results what it is and how it went."""
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / POINT, {"overrides": list(overrides), "error": error, "ended": ended})


@dataclass(frozen=True)
class Point:
    """A point of a sweep: its directory, the settings that points differ in, and, as far as the command that made or submitted it knows, why it
    failed and whether it came to its end."""

    where: Path
    settings: dict[str, str]
    error: str | None
    ended: bool


def points_of(sweep: Path) -> list[Point]:
    """The points under a sweep's directory, by number.

    Raises ValueError: none are there, or a file is damaged.
    """
    paths = sorted(sweep.glob(f"*/{POINT}"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not paths:
        raise ValueError(
            f"{sweep}: no point of a sweep is there (no {sweep}/0/{POINT}); `upcycle -m KEY=A,B` makes some"
        )
    notes = [read_object(path, "overrides", "error", "ended", fix="start the sweep again") for path in paths]
    settings = [dict(override.split("=", 1) for override in note["overrides"] if "=" in override) for note in notes]
    keys = [
        key
        for key in dict.fromkeys(key for one in settings for key in one)
        if len({one.get(key) for one in settings}) > 1
    ]
    return [
        Point(path.parent, {key: own[key] for key in keys if key in own}, note["error"], note["ended"])
        for path, note, own in zip(paths, notes, settings, strict=True)
    ]


def read_points(sweep: Path) -> list[dict[str, Any]]:
    """The points as `evals.sweeps.summarise` wants them. Raises ValueError: see `points_of`. RuntimeError: Slurm does not answer."""
    found, points = points_of(sweep), []
    queued = _queue_of(found)
    for point in found:
        report, state, error = _how_it_went(point, queued)
        points.append({
            "point": point.where.name,
            "settings": point.settings,
            "state": state,
            "error": error,
            "report": report,
        })  # fmt: skip
    return points


def _queue_of(points: Sequence[Point]) -> dict[str, tuple[str, str, str]]:
    """What Slurm's queue has of their unfinished stages. It is asked once, and not where all is done: the table can then be made anywhere."""
    entries = [entry for point in points for entry in submitted_stages(point.where).values()]
    return queue(entry["job"] for entry in entries if not (Path(entry["artifact"]) / RECORD).is_file())


def _how_it_went(point: Point, queued: Mapping[str, tuple[str, str, str]]) -> tuple[dict | None, str, str | None]:
    """A point's report, if the run that its manifest names has one, its state, and why it failed. A report.json of an earlier sweep is none."""
    if point.error:
        return None, "failed", point.error
    rows, store = _stages(point.where, queued)
    for row in rows:
        if row.stage == "report" and row.state == "done":
            manifest = read_manifest(point.where)
            return json.loads((store / manifest["report"] / "report.json").read_text()), "done", None
    states = {row.state for row in rows}
    if bad := [row for state in ("failed", "cancelled") for row in rows if row.state == state]:
        return None, "failed", f"{bad[0].stage}: {bad[0].said}"
    if states & {"running", "pending"}:
        return None, "submitted", None
    return None, "done" if point.ended else "ended without a word", None


def _stages(run: Path, queued: Mapping[str, tuple[str, str, str]]) -> tuple[list[StageState], Path]:
    """How far a point's stages are, and where its artifacts are; none for one that was refused before it had a manifest."""
    if not (run / "manifest.json").is_file():
        return [], run
    store = Path(read_settings(run)["artifacts"])
    return stage_states(run, read_manifest(run), store, queued), store


def point_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Of each point its number, settings, state, how many of its stages are done, the stage it is in, and how far that is or why it ended.

    Raises RuntimeError: Slurm does not answer.
    """
    queued = _queue_of(points)
    return [
        (
            point.where.name,
            " ".join(f"{key}={value}" for key, value in point.settings.items()),
            *_progress(point, queued),
        )
        for point in points
    ]


def _progress(point: Point, queued: Mapping[str, tuple[str, str, str]]) -> tuple[str, str, str, str]:
    rows, _ = _stages(point.where, queued)
    count = f"{sum(row.state == 'done' for row in rows)} of {len(rows)} stages" if rows else ""
    if point.error and point.ended:
        return "failed", count, "", point.error
    for state in ("failed", "cancelled", "running", "pending"):
        if found := [row for row in rows if row.state == state]:
            others = f" and {len(found) - 1} more" if state == "running" and len(found) > 1 else ""
            return state, count, found[0].stage + others, found[0].more or found[0].word
    if point.ended:
        return "done", count, "", ""
    left = [row.stage for row in rows if row.state == "missing"]
    return "unfinished", count, f"next: {left[0]}" if left else "", ""


def write_tables(root: Path) -> tuple[str, bool]:
    """Write sweep.csv and sweep.html into a sweep's directory; the table as text, and whether a point failed."""
    from evals.sweeps import format_sweep, render_sweep, rows, summarise

    points = read_points(root)
    found, lines = summarise(points), rows(points)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    with (root / "sweep.csv.tmp").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(lines)
    (root / "sweep.csv.tmp").replace(root / "sweep.csv")
    (root / "sweep.html").write_text(render_sweep(root.name, found), encoding="utf-8")
    said = f"\n{format_sweep(found)}\n\nsweep: {root / 'sweep.csv'}, {root / 'sweep.html'}"
    return said, any(point["state"] not in ("done", "submitted") for point in points)


class Table(Callback):
    """Hydra's callback of every sweep: what the points before left is forgotten at its start, its tables are written at its end."""

    failed = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not only_shows(config):
            for path in Path(config.hydra.sweep.dir).glob(f"*/{POINT}"):
                path.unlink(missing_ok=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        root = Path(config.hydra.sweep.dir)
        if os.environ.get("RANK", "0") != "0" or only_shows(config) or not any(root.glob(f"*/{POINT}")):
            return
        try:
            text, Table.failed = write_tables(root)
            print(text)
            job = submit_table(root, [point.where for point in points_of(root)])
        except (RuntimeError, ValueError, OSError) as error:  # else Hydra would make a warning of it
            print(f"upcycle: the sweep's table: {error}; `upcycle sweep {root}` writes it", file=sys.stderr)
            Table.failed = True
            return
        if job is not None:
            print(
                f"{job:16} writes it again when all jobs of all points have ended; `upcycle status {root}` follows them"
            )
