"""Branches side by side on one machine: each has a process of its own, an equal share of the devices or cores, and a log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.config import LaunchConfig
from launch.follow import last_line, progress
from launch.groups import child_environment, command, end, launch_file, processes_of, strategy_of, visible_gpus
from upcycle import stopping
from upcycle.stopping import AGAIN, TERMINATED, Stopped
from upcycle.store import Artifact

POLL_SECONDS, PLAIN_SECONDS = 0.5, 30.0


@dataclass
class _Job:
    """One branch in training."""

    stage: Artifact
    process: subprocess.Popen
    log: Path
    share: int


def waiting_branches(stage: Artifact, stages: list[Artifact]) -> list[Artifact]:
    """All branches that are still to be trained, if `stage` is one of them."""
    waiting = [one for one in stages if one.together and one.name.startswith("branch/") and not one.finished]
    return waiting if stage in waiting else []


def shares(launch: LaunchConfig) -> list[dict]:
    """Equal shares of this machine, one for each branch at a time: their `gpus` (None without any), `cores`, `processes`.

    Raises ValueError: fewer devices or processes than branches at a time.
    """
    parts = launch.parallel_branches
    gpus, cores = visible_gpus(), sorted(os.sched_getaffinity(0))
    have, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if len(have) < parts:
        raise ValueError(
            f"launch.parallel_branches={parts} exceeds the {len(have)} {what} of this machine; lower it to {len(have)}"
        )
    grouped = launch.config is not None and strategy_of(launch_file(launch)) != "single"
    processes = processes_of(launch) if grouped else parts
    if processes % parts:
        raise ValueError(
            f"launch.processes={processes} cannot be divided among launch.parallel_branches={parts}; make it a multiple"
        )

    def share(items: list, number: int) -> list:
        each = len(items) // parts
        return items[number * each : (number + 1) * each]

    return [
        {
            "gpus": share(gpus, number) if gpus else None,
            "cores": share(cores, number) if len(cores) >= parts else cores,
            "processes": processes // parts,
        }
        for number in range(parts)
    ]


def make_side_by_side(
    launch: LaunchConfig, arguments: list[str], waiting: list[Artifact], logs: Path, console: Console
) -> None:
    """Train the branches in `waiting`, at most launch.parallel_branches at a time. One that fails leaves the others be.

    Raises RuntimeError: some failed, after the others have ended. Stopped: they were asked to. SystemExit: likewise, and nothing was saved.
    """
    with stopping.passing_on() as stop:
        stopped, failed = _train_all(launch, arguments, waiting, logs, console, stop)
    if stopped and not failed:
        raise Stopped
    if failed and stopping.signalled():  # before they could look
        sys.exit(TERMINATED)
    if failed:
        why = "; ".join(f"{job.stage.name}: {last_line(job.log)} (log: {job.log})" for job in failed)
        raise RuntimeError(
            f"{len(failed)} of {len(waiting)} branches failed, the others are done; the same command trains only what is "
            f"missing. {why}"
        )


def _train_all(
    launch: LaunchConfig, arguments: list[str], waiting: list[Artifact], logs: Path, console: Console, stop: Path
) -> tuple[bool, list[_Job]]:
    """Whether branches were asked to stop, and those that failed. SIGTERM to this process makes the file `stop`."""
    free = shares(launch)
    slots, left, running, failed, stopped = dict(enumerate(free)), list(waiting), [], [], False
    logs.mkdir(parents=True, exist_ok=True)
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    printed = time.monotonic()
    try:
        if live:
            live.start()
        while left or running:
            while left and slots:
                number, share = slots.popitem()
                running.append(_start(launch, arguments, left.pop(0), number, share, logs, stop))
            time.sleep(POLL_SECONDS)
            if stopping.signalled():
                stop.touch()
                left = []
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                slots[job.share] = free[job.share]
                if job.process.returncode == AGAIN:
                    stopped, left = True, []
                    stop.touch()  # for the others, where one process alone was signalled
                elif not _ended_well(job, console):
                    failed.append(job)
            if live:
                live.update(_table(waiting, running, failed))
            elif running and time.monotonic() - printed >= PLAIN_SECONDS:
                printed = time.monotonic()
                for job in running:
                    console.print(f"  {job.stage.name}  {_progress(job.stage)}", highlight=False, markup=False)
    except BaseException:
        end([job.process for job in running])
        raise
    finally:
        if live:
            live.stop()
    return stopped, failed


def _start(
    launch: LaunchConfig, arguments: list[str], stage: Artifact, number: int, share: dict, logs: Path, stop: Path
) -> _Job:
    """A process (or a group, with launch.config) that trains one branch on its share of the machine."""
    environment = dict(child_environment(stop=stop))
    environment["OMP_NUM_THREADS"] = str(max(1, len(share["cores"]) // share["processes"]))
    if share["gpus"] is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share["gpus"])
    settings = [one for one in arguments if not one.startswith(("launch.parallel_branches=", "launch.processes="))]
    if launch.config is None:
        words = [sys.executable, "-m", "launch.pipeline", *settings, f"stage={stage.name}"]
    else:
        threads = launch.threads or max(1, len(share["cores"]) // share["processes"])
        own = {"processes": share["processes"], "parallel_branches": 1, "threads": threads}
        part = LaunchConfig(**vars(launch) | own)
        words = command(part, [*settings, f"launch.processes={share['processes']}"], stage.name)
    log = logs / f"{stage.name.replace('/', '-')}.log"
    stream: IO[str] = log.open("a")
    with stream:
        process = subprocess.Popen(
            words, env=environment, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    os.sched_setaffinity(process.pid, share["cores"])
    return _Job(stage, process, log, number)


def _ended_well(job: _Job, console: Console) -> bool:
    name, done = job.stage.name, job.process.returncode == 0 and job.stage.finished
    if done:
        console.print(f"{name:24} made in {job.stage.seconds():7.1f} s  {job.stage.path.name}", highlight=False)
    else:
        console.print(f"{name:24} FAILED: {last_line(job.log)}", highlight=False, markup=False, soft_wrap=True)
    return done


def _progress(stage: Artifact) -> str:
    train = stage.config["train"]
    return progress(stage.partial, train.steps, train.batch_tokens)


def _table(waiting: list[Artifact], running: list[_Job], failed: list[_Job]) -> Table:
    table = Table.grid(padding=(0, 2))
    active, broken = {job.stage.name for job in running}, {job.stage.name for job in failed}
    for stage in waiting:
        if stage.name in active:
            table.add_row(f"  {stage.name}", _progress(stage))
        elif not stage.finished:
            table.add_row(f"  {stage.name}", "failed" if stage.name in broken else "waiting")
    return table
