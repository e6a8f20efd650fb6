"""Settings of how a run is computed and watched, none of which changes a result."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from launch.hardware import check_name
from upcycle.config import STRICT

TIME = r"^\d+$|^(\d+-)?\d+(:\d+){1,2}$"  # as sbatch reads it
FOR_ALL = {
    "kinds",
    "scheduler",
    "machines",
    "machine_rank",
    "main_address",
    "parallel_branches",
}  # what jobs of a kind cannot have of their own


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How stages are run. Nothing here changes a result, so nothing here is part of an artifact's key.

    Training writes a checkpoint every checkpoint_steps steps, checkpoint_seconds seconds and keep_every steps; the newest keep_checkpoints are kept, and
    those of multiples of keep_every for good. config: the launch file of the stages that several processes make together, a name in launch/accelerate or a path; None
    runs every stage in this process. processes: of all machines together (None: one for each GPU of this machine).
    main_address: host:port of the first machine. offload: where ZeRO keeps what the step itself does not need.
    parallel_branches: so many branches are trained side by side, on equal shares of this machine. For plans only: gpu, a device of
    launch/hardware.py; utilisation, the share of its peak that a step reaches; interconnect, Gbit/s of a process to other machines.
    """

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = Field(default=1, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    config: str | None = None
    processes: int | None = Field(default=None, ge=1)
    machines: int = Field(default=1, ge=1)
    machine_rank: int = Field(default=0, ge=0)
    main_address: str | None = Field(default=None, pattern=r"^[^:]+:\d+$")
    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    parallel_branches: int = Field(default=1, ge=1)
    gpu: str | None = None
    utilisation: float = Field(default=0.4, gt=0, le=1)
    interconnect: float = Field(default=400.0, gt=0)
    scheduler: Literal["none"] = "none"

    @model_validator(mode="after")
    def _means_something(self):
        if self.gpu is not None:
            check_name(self.gpu)
        if self.machine_rank >= self.machines:
            raise ValueError(
                f"machine_rank={self.machine_rank} is not below machines={self.machines}; machines are numbered from 0"
            )
        if self.machines > 1 and (self.main_address is None or self.processes is None):
            raise ValueError(
                f"machines={self.machines} need main_address=HOST:PORT, of the first one, and processes, of all together"
            )
        if self.processes is not None and self.processes % self.machines:
            raise ValueError(f"processes={self.processes} is not a multiple of machines={self.machines}; make it one")
        if self.config is None:
            for name, unset in (("processes", None), ("machines", 1), ("offload", "none")):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect without a group of processes; add launch=accelerate "
                        "and launch.config, such as zero2"
                    )
        if self.machines > 1 and self.parallel_branches > 1:
            raise ValueError(
                f"parallel_branches={self.parallel_branches} divides one machine, and machines={self.machines} join theirs; "
                "set one of them to 1"
            )
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError(f"offload={self.offload} and nvme_path={self.nvme_path}: each needs the other; give both")
        return self


def _as_text(value: Any) -> Any:
    """Minutes as sbatch takes them. Raises ValueError: more than a day of them, which is how YAML reads HH:MM:SS without quotes."""
    if isinstance(value, int) and value > 1440:
        raise ValueError(
            f"{value} minutes are more than a day, and YAML reads 8:00:00 as 28800; write it in quotes, days as '2-00:00:00'"
        )
    return str(value) if isinstance(value, int) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SlurmConfig(LaunchConfig):
    """Stages as jobs of Slurm. `config` and `processes` are those of a stage that a group makes, on `nodes` nodes.

    time: minutes, or HH:MM:SS. cpus, gpus, memory: of a node. stop_seconds: so long before the time limit training writes a checkpoint and
    the job is queued again, at most `restarts` times. parallel: tasks of an array that run at a time. setup: lines of the script before all
    else, such as `module load`. options: more of sbatch's, such as `--exclusive`. kinds: other values of these for jobs of a kind
    (`data`, `seed`, `branch`, `mix`, `eval`, ...). template: an edited copy of launch/slurm/job.sh.
    """

    scheduler: Literal["slurm"] = "slurm"  # pyright: ignore[reportIncompatibleVariableOverride]
    nodes: int = Field(default=1, ge=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Annotated[str, BeforeValidator(_as_text), Field(pattern=TIME)] | None = None
    cpus: int | None = Field(default=None, ge=1)
    gpus: int | None = Field(default=None, ge=1)
    memory: str | None = Field(default=None, pattern=r"^\d+[KMGT]?$")
    parallel: int | None = Field(default=None, ge=1)
    stop_seconds: int = Field(default=120, ge=10)
    restarts: int = Field(default=20, ge=0)
    setup: list[str] = Field(default_factory=list)
    options: list[str] = Field(default_factory=list)
    kinds: dict[str, dict[str, Any]] = Field(default_factory=dict)
    template: str | None = None

    @model_validator(mode="after")
    def _fits_slurm(self):
        if (self.machines, self.machine_rank, self.main_address) != (1, 0, None):
            raise ValueError("machines, machine_rank and main_address are Slurm's to say; give launch.nodes instead")
        if self.parallel_branches > 1:
            raise ValueError(
                f"parallel_branches={self.parallel_branches} divides one machine; under Slurm branches are an array of jobs, of which "
                "launch.parallel run at a time"
            )
        if self.nodes > 1 and self.config is None:
            raise ValueError(
                f"nodes={self.nodes} has no effect without a group of processes; add launch.config, such as zero2"
            )
        if self.config is not None and self.processes is None and self.gpus is None:
            raise ValueError(
                f"config={self.config}: Slurm's nodes are not this one, so say how many processes: launch.gpus (of a node, one process each) or "
                "launch.processes"
            )
        if self.processes is not None and self.processes % self.nodes:
            raise ValueError(f"processes={self.processes} is not a multiple of nodes={self.nodes}; make it one")
        for kind in self.kinds:
            self.of(kind)
        return self

    def of(self, kind: str) -> SlurmConfig:
        """The settings of jobs of a kind. Raises ValueError: `kinds` has an unknown setting for it, or one of a wrong type."""
        own = self.kinds.get(kind, {})
        known = {one.name for one in fields(self)} - FOR_ALL
        if unknown := sorted(own.keys() - known):
            raise ValueError(
                f"kinds.{kind}.{unknown[0]}: no setting of a job; expected one of {', '.join(sorted(known))}"
            )
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        values |= {"kinds": {}} | own
        return SlurmConfig(**values)

    def within(self, kind: str, rank: int, address: str) -> LaunchConfig:
        """The settings inside such a job, on its node number `rank`; address: host:port of its first one."""
        own = self.of(kind)
        values: dict[str, Any] = {
            one.name: getattr(own, one.name) for one in fields(LaunchConfig) if one.name != "scheduler"
        }
        if own.config is not None and own.processes is None:
            values["processes"] = own.nodes * (own.gpus or 1)
        if own.config is not None and own.nodes > 1:
            values |= {"machines": own.nodes, "machine_rank": rank, "main_address": address}
        return LaunchConfig(**values)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where progress goes: the terminal, Weights & Biases (`offline` needs no account), and TensorBoard's event files."""

    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "upcycle"
    tensorboard: bool = False
