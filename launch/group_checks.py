"""Before the first stage: can the groups of processes that a run asks for be, and can they share its batches evenly."""

from __future__ import annotations

from collections.abc import Sequence

from launch.branches import shares
from launch.groups import command, drives, launch_file, processes_of, strategy_of
from launch.plan import train_of
from launch.running import LaunchConfig
from upcycle.phases import check_ranks, check_strategy
from upcycle.store import Artifact
from upcycle.team import Team


def check_group(launch: LaunchConfig, team: Team, stages: list[Artifact]) -> None:
    """Raises ValueError: settings of the launch that cannot be, or batches that its processes cannot share evenly."""
    ranks, of_branch, strategy = team.size, team.size, team.strategy
    if drives(launch):
        if launch.config is not None:
            ranks, strategy = processes_of(launch), strategy_of(launch_file(launch))
            command(launch, [], "")  # for what it raises
        of_branch = shares(launch)[0]["processes"] if launch.parallel_branches > 1 else ranks
    _check_batches(stages, ranks, of_branch, strategy)


def _check_batches(stages: Sequence[Artifact], ranks: int, of_branch: int, strategy: str) -> None:
    """Raises ValueError: see `phases.check_ranks` and `check_strategy`."""
    for stage in stages:
        if (train := train_of(stage)) is not None and not stage.finished:
            kind, _, name = stage.name.partition("/")
            where = {"branch": f"branches.{name}.train", "mix": f"mixtures.{name}.train", "seed": "seed.train"}
            check_ranks(train, of_branch if kind == "branch" else ranks, where.get(kind, kind))
            check_strategy(train, strategy, where.get(kind, kind))


def check_job(stages: Sequence[Artifact], launch: LaunchConfig) -> None:
    """`check_group`, for a group that a job on other machines will start."""
    if launch.config is not None:
        command(launch, [], "")  # for what it raises
        ranks = processes_of(launch)
        _check_batches(stages, ranks, ranks, strategy_of(launch_file(launch)))
