"""How far the stages of a run are, and its jobs, if Slurm has them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from launch.scheduler import queue
from launch.sharing import submitted_stages
from upcycle.store import FAILED, RECORD, TIMING

TAIL_BYTES = 65_536  # of metrics.jsonl: more than two rows


def progress(partial: Path, steps: int, batch_tokens: int) -> str:
    """How far a training stage is, from the last whole row of its metrics."""
    path = partial / "metrics.jsonl"
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
            rows = [line for line in stream.read().decode(errors="replace").splitlines() if line.endswith("}")]
            rows = [line for line in rows if line.startswith("{")]  # the first may lack its beginning
    except OSError:  # not there yet, or there no more
        rows = []
    if not rows:
        return f"of {steps} steps"
    row = json.loads(rows[-1])
    left = (steps - row["step"]) * batch_tokens / row["tokens_per_second"]
    return f"{row['step']}/{steps}  loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s  {left:.0f} s left"


class StageState(NamedTuple):
    """What became of a stage so far. job: empty where Slurm has not seen it; state: `done`, `running`, `pending`, `failed`, `cancelled` or
    `missing` (no job was to make it); word, more: the same as one reads it, and how far it is or why it ended."""

    stage: str
    job: str
    state: str
    word: str
    more: str = ""

    @property
    def said(self) -> str:
        return f"{self.word}  {self.more}".rstrip()


def stage_states(
    run: Path, manifest: Mapping[str, str], store: Path, queued: Mapping[str, tuple[str, str, str]] | None = None
) -> list[StageState]:
    """Of each stage how far it is. queued: the jobs in the queue, as `queue` tells them; None asks Slurm.

    Raises RuntimeError: Slurm does not answer.
    """
    jobs = submitted_stages(run)
    done = {stage for stage, artifact in manifest.items() if (store / artifact / RECORD).is_file()}
    if queued is None:
        queued = queue(entry["job"] for stage, entry in jobs.items() if stage not in done)
    rows = []
    for stage, artifact in manifest.items():
        entry, place = jobs.get(stage, {}), store / artifact
        job = entry.get("job", "")
        if stage in done:
            seconds = json.loads((place / TIMING).read_text())["seconds"]
            found = "done", "done", f"{seconds:.1f} s"
        elif job in queued:
            found = _queued(*queued[job], place, entry)
        else:
            found = _unfinished(run, stage, place, entry, _cause(stage, jobs, manifest.keys() - done))
        rows.append(StageState(stage, job, *found))
    return rows


def _cause(stage: str, jobs: Mapping[str, Mapping], missing: Collection[str]) -> str:
    """The first stage behind this one that is missing and lacks nothing itself; this one, if it lacks nothing."""
    lacking = [one for one in jobs.get(stage, {}).get("after", ()) if one in missing]
    return _cause(lacking[0], jobs, missing) if lacking else stage


def _queued(state: str, left: str, reason: str, place: Path, entry: Mapping) -> tuple[str, str, str]:
    """A job's state in lower case, why it waits or how far it is, and how long Slurm lets it run."""
    if state == "PENDING":
        return "pending", "pending", reason
    how_far = f"{_steps(place, entry)}  " if "steps" in entry else ""
    return "running", state.lower(), f"{how_far}time limit in {left}"


def _steps(place: Path, entry: Mapping) -> str:
    return progress(_partial(place), entry["steps"], entry["batch_tokens"])


def _partial(place: Path) -> Path:
    return place.with_name(place.name + ".partial")


def _unfinished(run: Path, stage: str, place: Path, entry: Mapping, cause: str) -> tuple[str, str, str]:
    """Of a stage that no job will make: why its last attempt ended, if there was one. cause: see `_cause`."""
    partial = _partial(place)
    how_far = f"{_steps(place, entry)}  " if "steps" in entry and (partial / "metrics.jsonl").is_file() else ""
    if entry.get("cancelled"):
        return "cancelled", "cancelled", how_far
    if (partial / FAILED).is_file():
        return "failed", "FAILED", f"{how_far}{json.loads((partial / FAILED).read_text())['error']}"
    if not entry:
        return "missing", "partial" if partial.is_dir() else "missing", how_far
    logs = list((Path(entry.get("shared", run)) / "slurm" / "logs").glob(f"*-{entry['job']}.log"))
    if logs:
        return "failed", "ended without finishing it", f"{how_far}{last_line(logs[0])}"
    if cause != stage:
        return "failed", f"not started: {cause} did not finish", ""
    return "cancelled", "not started: cancelled", f"(a job of {entry['shared']})" if "shared" in entry else ""


def last_line(log: Path) -> str:
    """What a process said about its end."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("upcycle:")]
    return (ours or lines or ["it said nothing"])[-1].removeprefix("upcycle: ")
