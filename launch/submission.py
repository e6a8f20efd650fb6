"""A run with launch=slurm: what is submitted of it, and what its settings are inside a job."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.config import Config
from launch.copies import copies_of, keep_code, keep_files, keep_settings, new_copy, of_copies, own_files
from launch.group_checks import check_job
from launch.jobs import INSIDE, Job, kind_of, plan_jobs, script
from launch.overrides import own_arguments, quoted
from launch.running import SlurmConfig
from launch.scheduler import queued_stages, submit
from upcycle.config import nearest
from upcycle.durable import read_object
from upcycle.store import Artifact


def within_job(cfg: Config) -> Config:
    """Inside a job of Slurm, the settings of its node; elsewhere the settings as they are."""
    if not isinstance(cfg.launch, SlurmConfig) or INSIDE not in os.environ or cfg.stage is None:
        return cfg
    first = cfg.stage if isinstance(cfg.stage, str) else cfg.stage[0]
    rank = int(os.environ.get("SLURM_NODEID", "0"))
    return replace(cfg, launch=cfg.launch.within(kind_of(first), rank, os.environ[INSIDE]))


def planned_jobs(
    cfg: Config, launch: SlurmConfig, stages: Sequence[Artifact], every: Collection[Artifact], out: Path
) -> tuple[list[Job], dict[str, str]]:
    """The jobs that make what is missing of `stages`, and by stage the jobs in the queue that will make others. every: all stages of the run. With
    dry_run, prints the scripts.

    Raises ValueError: settings that would fail inside a job, or inputs that nobody makes. RuntimeError: Slurm does not answer.
    """
    known = {kind_of(stage.name) for stage in every}
    if unknown := [kind for kind in launch.kinds if kind not in known]:
        raise ValueError(
            f"launch.kinds.{unknown[0]}: no job of this run is of that kind{nearest(unknown[0], known)} Kinds: {', '.join(sorted(known))}"
        )
    queued = {} if cfg.dry_run else queued_stages(with_needed(stages))
    if not cfg.dry_run:
        _check_inputs(stages, queued)
    code, jobs = out.absolute() / "slurm" / "code", plan_jobs(stages, queued)
    settings = _settings(cfg, out) + of_copies(copies_of(own_files(launch), code))
    for job in jobs:
        check_job(job.stages, launch.within(job.kind, 0, "first:1"))
        text = script(job, launch, settings, out, code)
        if cfg.dry_run:
            after = f", after {', '.join(job.after)}" if job.after else ""
            print(f"######## {job.name}{after}\n{text}")
    return jobs, queued


def with_needed(stages: Iterable[Artifact]) -> list[Artifact]:
    """The unfinished ones of `stages`, and the unfinished ones that these need."""
    found: dict[str, Artifact] = {}
    waiting = list(stages)
    while waiting:
        stage = waiting.pop()
        if stage.name not in found and not stage.finished:
            found[stage.name] = stage
            waiting += stage.parents()
    return list(found.values())


def _check_inputs(stages: Sequence[Artifact], queued: Mapping[str, str]) -> None:
    made = {stage.name for stage in stages} | set(queued)
    for stage in stages:
        if stage.finished or stage.name in queued:
            continue
        if lacking := [one.name for one in stage.parents() if not one.finished and one.name not in made]:
            raise ValueError(
                f"stage {stage.name!r} needs {lacking[0]}, which is neither finished, nor in the queue, nor asked for; add it to stage=[...], or leave "
                "stage out"
            )


def _said(out: Path) -> str:
    """A run's directory as the words of the command line take it."""
    here = Path.cwd()
    return str(out.absolute().relative_to(here)) if out.absolute().is_relative_to(here) else str(out.absolute())


def check_submitted(stages: Sequence[Artifact], out: Path) -> None:
    """Inside a job: are these the artifacts that were submitted. Raises ValueError: a text or a checkpoint has changed since."""
    submitted = read_object(out / "manifest.json", fix="submit the run again")
    for stage in stages:
        if (expected := submitted.get(stage.name)) != stage.path.name:
            raise ValueError(
                f"stage {stage.name!r} is {stage.path.name} now and was {expected} when it was submitted: a text or checkpoint that it reads has changed "
                "since; submit the run again"
            )


def _settings(cfg: Config, out: Path) -> list[str]:
    """What composes this run's settings in a job. out: the run's directory, which for a point of a sweep is not that of its name."""
    return [
        *(one for one in own_arguments(cfg.tokens) if not one.startswith("dry_run=")),
        f"hydra.run.dir={quoted(out)}",
    ]


def _scripts(cfg: Config, launch: SlurmConfig, jobs: Sequence[Job], out: Path) -> list[str]:
    """Copy what the jobs will read; the scripts, which read the copy."""
    if not jobs:
        return []
    code, files = new_copy(out), own_files(launch)
    keep_code(code)
    keep_files(files, code)
    settings = keep_settings(_settings(cfg, out), code) + of_copies(copies_of(files, code))
    return [script(job, launch, settings, out, code) for job in jobs]


def hand_over(
    cfg: Config,
    launch: SlurmConfig,
    stages: Sequence[Artifact],
    jobs: list[Job],
    queued: dict[str, str],
    out: Path,
    console: Console,
) -> None:
    """Submit the jobs and return at once. Raises RuntimeError: see `scheduler.submit`."""
    if jobs or queued:
        waited = [stage for stage in with_needed(stages) if stage.name in queued]
        found = submit(jobs, _scripts(cfg, launch, jobs, out), out, queued, waited)
        for job in jobs:
            numbers = found[job.stages[0].name].split("_")[0] + (f"_[0-{len(job.stages) - 1}]" if job.array else "")
            names = ", ".join(one.name for one in job.stages)
            console.print(f"{numbers:16} {names}", highlight=False, markup=False, soft_wrap=True)
    done = sum(stage.finished for stage in stages)
    waiting = (
        f", {len(queued)} were in the queue, with the settings that they were submitted with (`upcycle cancel` takes them back)"
        if queued
        else ""
    )
    console.print(
        f"{len(jobs)} jobs submitted; {done} of {len(stages)} stages were done{waiting}. `upcycle status {_said(out)}` follows them",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
