"""A run as jobs of Slurm: which stages make a job, the script of each, and their submission.

A job runs `python -m launch.pipeline <the same settings> stage=NAME`, from a copy of this package that is kept with the run, so any scheduler that
runs a command can do the same.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.overrides import TAKES_A_VALUE
from launch.running import SlurmConfig
from upcycle.durable import write_json
from upcycle.store import COMMIT, Artifact, commit

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "slurm" / "job.sh"
PACKAGES = ("upcycle", "launch", "evals", "conf")
JOBS = "slurm/jobs.json"  # in the run's directory
INSIDE = "UPCYCLE_JOB"  # in a job's environment: host:port of its first node
DATA = ("documents", "tokenizer", "tokens", "questions")  # stages without a model, short: one job for all


@dataclass(frozen=True)
class Job:
    """One submission: a stage, an array of stages with the same needs, or (`data`) stages that follow one another.

    after: unfinished stages of other jobs that all of these need.
    """

    kind: str
    stages: tuple[Artifact, ...]
    after: tuple[str, ...]

    @property
    def array(self) -> bool:
        return self.kind != "data" and len(self.stages) > 1

    @property
    def name(self) -> str:
        (first, *others) = (stage.name for stage in self.stages)
        return self.kind if others or self.kind == "data" else first.replace("/", "-")


def plan_jobs(stages: Sequence[Artifact]) -> list[Job]:
    """The jobs that make what is missing of `stages` (each after its parents), in an order in which they can be submitted.

    Stages of one kind that need the same others are one array; each depends on just those that it needs, so that a stage that fails takes only
    its own dependants with it.
    """
    missing = {stage.name: stage for stage in stages if not stage.finished}
    data = [stage for stage in missing.values() if kind_of(stage.name) == "data"]
    grouped: dict[tuple[str, tuple[str, ...]], list[Artifact]] = {("data", ()): data} if data else {}
    for stage in missing.values():
        if kind_of(stage.name) != "data":
            needed = dict.fromkeys(parent.name for parent in stage.parents() if parent.name in missing)
            others = tuple(name for name in needed if kind_of(name) != "data")
            of_data = len(others) < len(needed)
            grouped.setdefault((kind_of(stage.name), (data[0].name, *others) if of_data else others), []).append(stage)
    return [Job(kind, tuple(members), after) for (kind, after), members in grouped.items()]


def kind_of(stage: str) -> str:
    """What `launch.kinds` calls the jobs of a stage."""
    kind = stage.split("/")[0]
    return "data" if kind in DATA else kind


def script(job: Job, launch: SlurmConfig, settings: Sequence[str], run: Path, code: Path) -> str:
    """The text that sbatch is given. settings: what composes this run's settings; code: the copy of the package.

    Raises ValueError: no such template, or one with an unknown place.
    """
    own = launch.of(job.kind)
    stages = [",".join(stage.name for stage in job.stages)] if job.kind == "data" else [one.name for one in job.stages]
    if len(job.stages) > 1 and job.kind == "data":
        stages = [f"[{stages[0]}]"]
    filled = {
        "options": "\n".join(f"#SBATCH {option}" for option in _options(job, own, run)),
        "what": ", ".join(stage.name for stage in job.stages),
        "setup": "\n".join(own.setup),
        "code": shlex.quote(str(code)),
        "here": shlex.quote(str(Path.cwd())),
        "stages": " ".join(map(shlex.quote, stages)),
        "stop_seconds": str(own.stop_seconds),
        "patience": str(own.stop_seconds * 3 // 4),
        "restarts": str(own.restarts),
        "run": shlex.quote(str(run.absolute())),
        "python": shlex.quote(sys.executable),
        "settings": shlex.join(settings),
    }
    template = Path(own.template).expanduser() if own.template else TEMPLATE
    if not template.is_file():
        raise ValueError(f"launch.template={own.template}: no such file; copy launch/slurm/job.sh and edit that")
    text = template.read_text()
    if unknown := set(re.findall(r"\{\{(.*?)\}\}", text)) - filled.keys():
        raise ValueError(f"{template}: {{{{{min(unknown)}}}}} is unknown, expected {', '.join(filled)}")
    return re.sub(r"\{\{(.*?)\}\}", lambda found: filled[found[1]], text)


def _options(job: Job, own: SlurmConfig, run: Path) -> list[str]:
    """Options of sbatch. A stage that no group makes gets one node."""
    together = own.config is not None and all(stage.together for stage in job.stages)
    log = run.absolute() / "slurm" / "logs" / f"{job.name}-{'%A_%a' if job.array else '%j'}.log"
    given = {
        "job-name": f"{run.name}:{job.name}",
        "output": str(log),
        "nodes": own.nodes if together else 1,
        "ntasks-per-node": 1,
        "cpus-per-task": own.cpus,
        "gpus-per-node": own.gpus if together or own.config is None else None,
        "mem": own.memory,
        "time": own.time,
        "partition": own.partition,
        "account": own.account,
        "qos": own.qos,
        "constraint": own.constraint,
        "signal": f"B:USR1@{own.stop_seconds}",
    }
    if job.array:
        given["array"] = f"0-{len(job.stages) - 1}" + (f"%{own.parallel}" if own.parallel else "")
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*options, "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", *own.options]


def keep_code(run: Path, settings: Sequence[str]) -> tuple[Path, list[str]]:
    """Copy the package, and settings files of the user's, beside the run; its place, and the settings that read the copy.

    The copy is named by the moment: jobs that are still queued keep theirs.
    """
    code = run.absolute() / "slurm" / f"code-{time.strftime('%Y%m%d-%H%M%S')}"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    (code / COMMIT).write_text(commit())
    kept, before = [], ""
    for word in settings:
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd") and value:
            word = f"{name}={_copied(Path(value), code)}"
        elif before in ("--config-dir", "-cd"):
            word = str(_copied(Path(word), code))
        kept.append(word)
        before = word if word in TAKES_A_VALUE else ""
    return code, kept


def _copied(directory: Path, code: Path) -> Path:
    return Path(shutil.copytree(directory, code / "own_conf", dirs_exist_ok=True))


def check_queue(run: Path) -> None:
    """Raises ValueError: jobs of this run are still in the queue. RuntimeError: Slurm does not answer."""
    if queued := queue(entry["job"] for entry in submitted_stages(run).values()):
        first = next(iter(queued))
        raise ValueError(
            f"{run}: {len(queued)} of its jobs are in the queue ({first}, ...), expected none; `upcycle status {run.name}` shows them, "
            f"`upcycle cancel {run.name}` takes them out"
        )


def submit(jobs: Sequence[Job], scripts: Sequence[str], run: Path) -> dict[str, str]:
    """Hand the jobs to Slurm, each after those that it needs; each stage's job, which is kept in the run's directory too.

    Raises RuntimeError: sbatch refused one; those before it are taken back.
    """
    found: dict[str, str] = {}
    (run / "slurm" / "logs").mkdir(parents=True, exist_ok=True)
    for job, text in zip(jobs, scripts, strict=True):
        needed = (
            [f"--dependency=afterok:{':'.join(dict.fromkeys(found[name] for name in job.after))}"] if job.after else []
        )
        try:
            number = slurm("sbatch", "--parsable", *needed, stdin=text).strip().split(";")[0]
        except RuntimeError:
            if found:
                slurm("scancel", *sorted({one.split("_")[0] for one in found.values()}))
            raise
        for index, stage in enumerate(job.stages):
            found[stage.name] = f"{number}_{index}" if job.array else number
    steps = {stage.name: _length(stage) for job in jobs for stage in job.stages}
    record = {stage: {"job": number, **steps[stage]} for stage, number in found.items()}
    write_json(run / JOBS, {**submitted_stages(run), **record}, sort_keys=False)
    return found


def _length(stage: Artifact) -> dict[str, int]:
    """How many steps a stage trains, of how many tokens."""
    from launch.plan import train_of

    train = train_of(stage)
    return {} if train is None else {"steps": train.steps, "batch_tokens": train.batch_tokens}


def submitted_stages(run: Path) -> dict[str, dict]:
    """Of each stage the `job` it was last given to and, of those that train, `steps` and `batch_tokens`; empty for a run that Slurm has not seen."""
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
