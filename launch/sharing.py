"""Jobs that several runs need. Beside the artifacts, the store notes which job is to make one and which runs count on it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from upcycle.durable import write_json
from upcycle.store import Artifact

JOBS = "slurm/jobs.json"  # in the run's directory


def submitted_stages(run: Path) -> dict[str, dict]:
    """What a run knows of its stages' jobs, by stage; empty for a run that Slurm has not seen.

    `job` makes the `artifact` (its directory) and comes `after` stages of other jobs; `shared`: the run that submitted it, where that is another; `steps` and `batch_tokens` of stages that train; `cancelled`: this run counts on it no more.
    """
    path = run / JOBS
    return json.loads(path.read_text()) if path.is_file() else {}


def note_job(stage: Artifact, job: str, run: Path) -> None:
    """A job of this run is to make the artifact; what was noted of an earlier job is over."""
    with _noting(stage.path) as note:
        write_json(note, {"job": job, "runs": [str(run.absolute())]})


def noted_jobs(stages: Iterable[Artifact]) -> dict[str, str]:
    """Of unfinished stages the job that was last to make each, whichever run submitted it, in the queue or not."""
    found = {stage.name: _note_of(stage.path) for stage in stages if not stage.finished}
    return {name: json.loads(note.read_text())["job"] for name, note in found.items() if note.is_file()}


def count_on(stages: Sequence[Artifact], jobs: Mapping[str, str], run: Path) -> dict[str, dict]:
    """Note that this run needs what jobs in the queue are to make; what its record says of these stages. jobs: by stage."""
    record, entries = submitted_stages(run), {}
    for stage in stages:
        job, known = jobs[stage.name], record.get(stage.name, {})
        with _noting(stage.path) as note:
            noted = json.loads(note.read_text())
            job, runs = noted["job"], noted["runs"]  # another submission may have made a new one since
            write_json(note, {"job": job, "runs": list(dict.fromkeys([*runs, str(run.absolute())]))})
        if known.get("job") != job:
            after = submitted_stages(Path(runs[0])).get(stage.name, {}).get("after", [])
            known = {"job": job, "artifact": str(stage.path), "shared": runs[0], "after": after, **length_of(stage)}
        entries[stage.name] = {key: value for key, value in known.items() if key != "cancelled"}
    return entries


def length_of(stage: Artifact) -> dict[str, int]:
    """How many steps a stage trains, of how many tokens; empty for one that does not."""
    from launch.plan import train_of

    train = train_of(stage)
    return {} if train is None else {"steps": train.steps, "batch_tokens": train.batch_tokens}


def needed_elsewhere(entry: Mapping[str, Any], runs: Collection[Path]) -> bool:
    """Whether a run that is none of `runs` counts on this entry's job. A run whose directory was removed counts on nothing."""
    note = _note_of(Path(entry["artifact"]))
    noted = json.loads(note.read_text())["runs"] if note.is_file() else []
    others = [Path(run) for run in noted if Path(run) not in {one.absolute() for one in runs}]
    return any(
        other["job"] == entry["job"] and not other.get("cancelled")
        for run in others
        for other in submitted_stages(run).values()
    )


def _note_of(artifact: Path) -> Path:
    return artifact.parent / ".jobs" / f"{artifact.name}.json"


@contextmanager
def _noting(artifact: Path) -> Iterator[Path]:
    """The note of an artifact, while no other submission changes one."""
    note = _note_of(artifact)
    note.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(note.parent / ".lock"):
        yield note
