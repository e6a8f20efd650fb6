"""A run as jobs of Slurm: which stages make a job, the script of each, and their submission.

A job runs `python -m launch.pipeline <the same settings> stage=NAME`, from a copy of this package that is kept with the run, so any scheduler that
runs a command can do the same.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from launch.running import SlurmConfig
from upcycle.store import Artifact

TEMPLATE = Path(__file__).resolve().parent / "slurm" / "job.sh"
INSIDE = "UPCYCLE_JOB"  # in a job's environment: host:port of its first node
TABLE = "table"  # what the job that writes a sweep's table is called
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


def plan_jobs(stages: Sequence[Artifact], queued: Mapping[str, str] = MappingProxyType({})) -> list[Job]:
    """The jobs that make what is missing of `stages` (each after its parents), in an order in which they can be submitted.

    Stages of one kind that need the same others are one array; each depends on just those that it needs, so that a stage that fails takes only
    its own dependants with it. queued: of stages that a job in the queue will make, that job.
    """
    missing = [stage for stage in stages if not stage.finished and stage.name not in queued]
    data = [stage for stage in missing if kind_of(stage.name) == "data"]
    one_of: dict[str, str] = {}  # of the stages that one job makes, one stands for all
    stands_for = {stage: one_of.setdefault(job, stage) for stage, job in queued.items()}
    stands_for |= {stage.name: data[0].name for stage in data}
    grouped: dict[tuple[str, bool, tuple[str, ...]], list[Artifact]] = {}
    needs = {stage.name: [parent.name for parent in stage.parents() if not parent.finished] for stage in missing}
    names = {stage.name for stage in data}
    of_data = [name for stage in data for name in needs[stage.name] if name not in names]
    for stage in missing:
        needed = of_data if stage in data else needs[stage.name]
        after = dict.fromkeys(stands_for.get(name, name) for name in needed)
        grouped.setdefault((kind_of(stage.name), stage.together, tuple(after)), []).append(stage)
    jobs = [Job(kind, tuple(members), after) for (kind, _, after), members in grouped.items()]
    return _in_order(jobs)


def _in_order(jobs: list[Job]) -> list[Job]:
    """Each after those that make what it needs: a seed that is brought along has no data before it, and may come late."""
    placed: list[Job] = []
    made: set[str] = set()
    makers = {stage.name for job in jobs for stage in job.stages}
    while len(placed) < len(jobs):
        ready = [
            job for job in jobs if job not in placed and all(name in made or name not in makers for name in job.after)
        ]
        placed += ready
        made |= {stage.name for job in ready for stage in job.stages}
        assert ready, "stages need one another in a circle"
    return placed


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
    together = all(stage.together for stage in job.stages)
    return _filled(own, {
        "options": _options(job.name, own, run, together, len(job.stages) if job.array else 0),
        "what": ", ".join(stage.name for stage in job.stages),
        "stages": " ".join(map(shlex.quote, stages)),
        "command": f'{shlex.quote(sys.executable)} -m launch.pipeline {shlex.join(settings)} "stage=$stage"',
        "code": shlex.quote(str(code)),
        "run": shlex.quote(str(run.absolute())),
    })  # fmt: skip


def table_script(sweep: Path, launch: SlurmConfig, code: Path) -> str:
    """The text of the job that writes a sweep's table. It is as jobs of the kind `report`. sweep: its directory.

    Raises ValueError: see `script`.
    """
    own = launch.of("report")
    return _filled(own, {
        "options": _options(TABLE, own, sweep, False, 0),
        "what": f"the table of the sweep {sweep.name}",
        "stages": TABLE,
        "command": shlex.join([sys.executable, "-m", "launch.cli", "sweep", str(sweep.absolute())]),
        "code": shlex.quote(str(code)),
        "run": shlex.quote(str(sweep.absolute())),
    })  # fmt: skip


def _filled(own: SlurmConfig, places: Mapping[str, str]) -> str:
    """The template with everything filled in. own: the settings of this kind of job."""
    filled = {
        **places,
        "setup": "\n".join(own.setup),
        "here": shlex.quote(str(Path.cwd())),
        "patience": str(own.stop_seconds // 2),
        "restarts": str(own.restarts),
    }
    template = Path(own.template).expanduser() if own.template else TEMPLATE
    if not template.is_file():
        raise ValueError(f"launch.template={own.template}: no such file; copy launch/slurm/job.sh and edit that")
    text = template.read_text()
    if unknown := set(re.findall(r"\{\{(.*?)\}\}", text)) - filled.keys():
        raise ValueError(f"{template}: {{{{{min(unknown)}}}}} is unknown, expected {', '.join(filled)}")
    return re.sub(r"\{\{(.*?)\}\}", lambda found: filled[found[1]], text)


def _options(name: str, own: SlurmConfig, run: Path, together: bool, tasks: int) -> str:
    """Lines of options of sbatch. together: a group of processes makes it, if there is to be one; others get one node. tasks: of an array, or 0."""
    together = own.config is not None and together
    log = run.absolute() / "slurm" / "logs" / f"{name}-{'%A_%a' if tasks else '%j'}.log"
    given = {
        "job-name": f"{run.name}:{name}",
        "output": f'"{str(log.parent).replace("%", "%%")}/{log.name}"',
        "nodes": own.nodes if together else 1,
        "ntasks-per-node": 1,
        "cpus-per-task": own.cpus,
        "gpus-per-node": own.gpus if together or own.config is None or own.gpus is None else 1,
        "mem": own.memory,
        "time": own.time,
        "partition": own.partition,
        "account": own.account,
        "qos": own.qos,
        "constraint": own.constraint,
        "signal": f"B:USR1@{own.stop_seconds}",
    }
    if tasks:
        given["array"] = f"0-{tasks - 1}" + (f"%{own.parallel}" if own.parallel else "")
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", *own.options]
    return "\n".join(f"#SBATCH {option}" for option in options)
