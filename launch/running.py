"""Settings of how a run is computed and watched, none of which changes a result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How stages are run. Nothing here changes a result, so nothing here is part of an artifact's key.

    config: the launch file of the stages that several processes make together, a name in launch/accelerate or a path; None
    runs every stage in this process. processes: of all machines together (None: one for each GPU of this machine).
    main_address: host:port of the first machine. offload: where ZeRO keeps what the step itself does not need.
    parallel_branches: so many branches are trained side by side, on equal shares of this machine.
    """

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    config: str | None = None
    processes: int | None = Field(default=None, ge=1)
    machines: int = Field(default=1, ge=1)
    machine_rank: int = Field(default=0, ge=0)
    main_address: str | None = Field(default=None, pattern=r"^[^:]+:\d+$")
    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    parallel_branches: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _means_something(self):
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where progress goes: the terminal, Weights & Biases (`offline` needs no account), and TensorBoard's event files."""

    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "upcycle"
    tensorboard: bool = False
