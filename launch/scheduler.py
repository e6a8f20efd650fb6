"""Talking to Slurm: jobs handed over, found in the queue, taken out of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.jobs import Job
from upcycle.durable import write_json
from upcycle.store import Artifact

JOBS = "slurm/jobs.json"  # in the run's directory
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


def submit(jobs: Sequence[Job], scripts: Sequence[str], run: Path, queued: dict[str, str]) -> dict[str, str]:
    """Hand the jobs to Slurm, each after those that it needs; each stage's job, which is kept in the run's directory too.

    queued: the jobs of stages that are in the queue already. Raises RuntimeError: sbatch refused one; those before it are taken back.
    """
    found: dict[str, str] = {}
    before, record = submitted_stages(run), submitted_stages(run)
    shared = {
        stage: job for stage, job in queued.items() if record.get(stage, {}).get("job") != job
    }  # not this run's own
    record |= {stage: {"job": job, "shared": True} for stage, job in shared.items()}
    (run / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
    for job, text in zip(jobs, scripts, strict=True):
        needed = dict.fromkeys((queued | found)[name] for name in job.after)
        dependency = [f"--dependency=afterok:{':'.join(needed)}"] if needed else []
        try:
            number = slurm("sbatch", "--parsable", *dependency, stdin=text).strip().split(";")[0]
        except RuntimeError:
            if found:
                slurm("scancel", *sorted({one.split("_")[0] for one in found.values()}))
                write_json(run / JOBS, before, sort_keys=False)
            raise
        for index, stage in enumerate(job.stages):
            found[stage.name] = f"{number}_{index}" if job.array else number
            note = _note(stage)
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"job": found[stage.name]})
            record[stage.name] = {"job": found[stage.name], "after": job.after, **_length(stage)}
        write_json(run / JOBS, record, sort_keys=False)  # after each, so that `cancel` knows of it whatever comes next
    return found


def _note(stage: Artifact) -> Path:
    """Where the store keeps which job is to make an artifact, for other runs that need it."""
    return stage.path.parent / ".jobs" / f"{stage.path.name}.json"


def queued_stages(stages: Iterable[Artifact]) -> dict[str, str]:
    """The jobs in the queue that will make some of `stages`, whichever run submitted them. Raises RuntimeError: Slurm does not answer."""
    noted = {
        stage.name: json.loads(note.read_text())["job"]
        for stage in stages
        if not stage.finished and (note := _note(stage)).is_file()
    }
    waiting = {job for job, (state, _, reason) in queue(noted.values()).items() if state in ALIVE and reason != NEVER}
    return {stage: job for stage, job in noted.items() if job in waiting}


def _length(stage: Artifact) -> dict[str, int]:
    """How many steps a stage trains, of how many tokens."""
    from launch.plan import train_of

    train = train_of(stage)
    return {} if train is None else {"steps": train.steps, "batch_tokens": train.batch_tokens}


def submitted_stages(run: Path) -> dict[str, dict]:
    """Of each stage the `job` that makes it (`shared`: another run's), the stages of other jobs that it comes `after` and, of those that train, `steps` and
    `batch_tokens`; empty for a run that Slurm has not seen."""
    path = run / JOBS
    return json.loads(path.read_text()) if path.is_file() else {}


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
