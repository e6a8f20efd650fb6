"""Sweeps (`upcycle -m`): a point that fails leaves the others be, and one table of all is written at the end.

Hydra expands the sweep and names its points' directories, runs/NAME/0, 1, ...
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from launch.follow import stage_states
from launch.scheduler import JOBS
from upcycle.durable import read_object, write_json

POINT = "point.json"


def only_shows(config: DictConfig) -> bool:
    """Whether a run of these settings makes nothing."""
    return bool(config.plan or config.dry_run or OmegaConf.select(config, "assemble.dry_run"))


def note_point(where: Path, overrides: Sequence[str], error: str | None, ended: bool) -> None:
    """Keep beside a point's results what it is and how it went."""
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / POINT, {"overrides": list(overrides), "error": error, "ended": ended})


def read_points(root: Path) -> list[dict[str, Any]]:
    """The points under a sweep's directory, by number, as `evals.sweeps.summarise` wants them.

    Raises ValueError: none are there, or a file is damaged.
    """
    paths = sorted(
        (path for path in root.glob(f"*/{POINT}")), key=lambda path: (len(path.parent.name), path.parent.name)
    )
    if not paths:
        raise ValueError(f"{root}: no point of a sweep is there (no {root}/0/{POINT}); `upcycle -m KEY=A,B` makes some")
    notes = [read_object(path, "overrides", "error", "ended", fix="start the sweep again") for path in paths]
    settings = [dict(override.split("=", 1) for override in note["overrides"] if "=" in override) for note in notes]
    keys = [
        key
        for key in dict.fromkeys(key for one in settings for key in one)
        if len({one.get(key) for one in settings}) > 1
    ]
    points = []
    for path, note, own in zip(paths, notes, settings, strict=True):
        report, state, error = _how_it_went(path.parent, note)
        points.append({
            "point": path.parent.name,
            "settings": {key: own[key] for key in keys if key in own},
            "state": state,
            "error": error,
            "report": report,
        })  # fmt: skip
    return points


def _how_it_went(where: Path, note: dict[str, Any]) -> tuple[dict | None, str, str | None]:
    """A point's report, if the run that its manifest names has one, its state, and why it failed. A report.json of an earlier sweep is none."""
    from launch.status import read_manifest, read_settings

    if note["error"]:
        return None, "failed", note["error"]
    if not (where / "manifest.json").is_file():
        return None, "done" if note["ended"] else "ended without a word", None
    manifest, store = read_manifest(where), Path(read_settings(where)["artifacts"])
    report = store / manifest.get("report", "none") / "report.json"
    if report.is_file():
        return json.loads(report.read_text()), "done", None
    if not (where / JOBS).is_file():
        return None, "done" if note["ended"] else "ended without a word", None
    rows = stage_states(where, manifest, store)
    bad = [f"{stage}: {said}" for stage, _, said in rows if said.startswith(("FAILED", "ended", "not started"))]
    return None, "failed" if bad else "submitted", bad[0] if bad else None


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
        text, Table.failed = write_tables(root)
        print(text)
