"""Talking to Slurm: jobs handed over, found in the queue, taken out of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from launch.jobs import Job
from launch.sharing import JOBS, count_on, length_of, needed_elsewhere, note_job, noted_jobs, submitted_stages
from upcycle.durable import write_json
from upcycle.store import Artifact

ALIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
)
NEVER = "DependencyNeverSatisfied"


def submit(
    jobs: Sequence[Job], scripts: Sequence[str], run: Path, queued: Mapping[str, str], waited: Sequence[Artifact] = ()
) -> dict[str, str]:
    """Hand the jobs to Slurm, each after those that it needs; each stage's job, which is kept in the run's directory too.

    queued: the jobs of stages that are in the queue already; waited: these stages. Raises RuntimeError: sbatch refused one; those before it are
    taken back.
    """
    found: dict[str, str] = {}
    before = submitted_stages(run)
    (run / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
    record = before | count_on(waited, queued, run)
    write_json(run / JOBS, record, sort_keys=False)
    for job, text in zip(jobs, scripts, strict=True):
        needed = dict.fromkeys(found.get(name) or queued[name] for name in job.after)
        try:
            number = sbatch(text, "afterok", needed)
        except RuntimeError:
            if found:
                slurm("scancel", *sorted({one.split("_")[0] for one in found.values()}))
            write_json(run / JOBS, before, sort_keys=False)
            raise
        for index, stage in enumerate(job.stages):
            found[stage.name] = f"{number}_{index}" if job.array else number
            note_job(stage, found[stage.name], run)
            record[stage.name] = {
                "job": found[stage.name],
                "artifact": str(stage.path),
                "after": job.after,
                **length_of(stage),
            }
        write_json(run / JOBS, record, sort_keys=False)  # after each, so that `cancel` knows of it whatever comes next
    return found


def sbatch(text: str, kind: str, needed: Iterable[str]) -> str:
    """Submit a script that waits for the jobs `needed` (kind: afterok, afterany); its job's number. Raises RuntimeError: see `slurm`."""
    numbers = list(needed)
    dependency = [f"--dependency={kind}:{':'.join(numbers)}"] if numbers else []
    return slurm("sbatch", "--parsable", *dependency, stdin=text).strip().split(";")[0]


def queued_stages(stages: Iterable[Artifact]) -> dict[str, str]:
    """The jobs in the queue that will make some of `stages`, whichever run submitted them. Raises RuntimeError: Slurm does not answer."""
    noted = noted_jobs(stages)
    waiting = {job for job, (state, _, reason) in queue(noted.values()).items() if state in ALIVE and reason != NEVER}
    return {stage: job for stage, job in noted.items() if job in waiting}


def cancel(runs: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Take what runs have in Slurm's queue out of it, running jobs too, but for those that other runs count on: the jobs taken out, those left.

    Raises RuntimeError: Slurm does not answer.
    """
    records = {run: submitted_stages(run) for run in runs}
    queued = queue(entry["job"] for record in records.values() for entry in record.values())
    left: set[str] = set()
    for record in records.values():
        left |= _with_needed(
            {one["job"] for one in record.values() if one["job"] in queued and needed_elsewhere(one, runs)}, record
        )
    taken = [job for job in queued if job not in left]
    if taken:
        slurm("scancel", *taken)
    for run, record in records.items():
        if mine := {stage for stage, entry in record.items() if entry["job"] in queued}:
            marked = {stage: entry | {"cancelled": True} if stage in mine else entry for stage, entry in record.items()}
            write_json(run / JOBS, marked, sort_keys=False)
    return taken, [job for job in queued if job in left]


def _with_needed(jobs: set[str], record: Mapping[str, Mapping]) -> set[str]:
    """Jobs of a run and all that they wait for."""
    after = {name for entry in record.values() if entry["job"] in jobs for name in entry.get("after", ())}
    needed = {record[name]["job"] for name in after if name in record}  # of a shared job, not all that it waits for
    return jobs if needed <= jobs else _with_needed(jobs | needed, record)


def queue(numbers: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """State, time left and reason of those jobs that are in the queue, array tasks one by one.

    Raises RuntimeError: Slurm does not answer.
    """
    wanted = set(numbers)
    if not wanted:
        return {}
    text = slurm("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i|%T|%L|%r")
    rows = [line.split("|") for line in text.splitlines()]
    return {job: (state, left, reason) for job, state, left, reason in rows if job in wanted}


def slurm(*words: str, stdin: str | None = None) -> str:
    """What a command of Slurm's prints. Raises RuntimeError: it is not there, or failed."""
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(
            f"{words[0]}: no such program, expected Slurm's on this machine; start this where jobs are submitted"
        ) from None
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout
