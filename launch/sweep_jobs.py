"""A sweep whose points are jobs of Slurm: the job that writes its table when all of them have ended, and cancelling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launch.copies import keep_code, new_copy
from launch.jobs import table_script
from launch.running import SlurmConfig
from launch.scheduler import cancel, queue, sbatch, slurm
from launch.sharing import submitted_stages
from launch.status import read_settings
from upcycle.durable import write_json

TABLE_JOB = "slurm/table.json"  # in the sweep's directory


def table_job(sweep: Path) -> str | None:
    """The job that was last to be submitted for the table, in the queue or not."""
    path = sweep / TABLE_JOB
    return json.loads(path.read_text())["job"] if path.is_file() else None


def table_state(sweep: Path) -> str:
    """Where a sweep's table is, or the job that will write it. Raises RuntimeError: Slurm does not answer."""
    job = table_job(sweep)
    for state, _, reason in queue([] if job is None else [job]).values():
        return f"job {job}, {state.lower()}{f'  {reason}' if state == 'PENDING' else ''}"
    written = sweep / "sweep.csv"
    return str(written) if written.is_file() else f"none yet; `upcycle sweep {sweep}` writes one of what is done"


def submit_table(sweep: Path, points: Sequence[Path]) -> str | None:
    """Submit the job that writes the table once the jobs of all points have ended, however they end; its number. None where none is in the queue.

    A job that was submitted for it before and still waits is taken back. Raises RuntimeError: Slurm refused it, or does not answer.
    """
    records = {point: submitted_stages(point) for point in points}
    queued = queue(entry["job"] for record in records.values() for entry in record.values())
    # All of them, not the last ones only: those are cancelled at once where a stage before them fails, while others still run.
    waited = {
        entry["job"]: point for point, record in records.items() for entry in record.values() if entry["job"] in queued
    }
    if not waited:
        return None
    launch, code = SlurmConfig(**read_settings(next(iter(waited.values())))["launch"]), new_copy(sweep)
    keep_code(code)
    (sweep / "slurm" / "logs").mkdir(exist_ok=True)
    before = table_job(sweep)
    job = sbatch(table_script(sweep, launch, code), "afterany", list(waited))
    write_json(sweep / TABLE_JOB, {"job": job})
    if before is not None and queue([before]):
        slurm("scancel", "--state=PENDING", before)
    return job


def cancel_sweep(sweep: Path, points: Sequence[Path]) -> tuple[list[str], list[str]]:
    """`cancel` for all points, and the table's job, which would start when theirs end. Raises RuntimeError: Slurm does not answer."""
    table = [job for job in [table_job(sweep)] if job is not None and queue([job])]
    if table:
        slurm("scancel", *table)
    taken, left = cancel(points)
    return [*table, *taken], left
