"""The phases of a run laid over its steps: arithmetic only, no torch, so that a config can be refused before it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from upcycle.config import GROUPS, PhaseConfig, TrainConfig, nearest


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) of a run, with one set of trainable parameters and one peak rate."""

    start: int
    stop: int
    lr: float
    config: PhaseConfig


def plan_phases(config: TrainConfig, where: str = "train") -> list[Phase]:
    """The phases laid over the run's steps; the last one takes what is left. `where` is the config's key path.

    Raises ValueError: phases longer than the run, a last phase whose length is not what is left, or a pattern that is a
    plain word but no group.
    """
    phases, start = [], 0
    for number, phase in enumerate(config.phases):
        _check_words(phase, f"{where}.phases[{number}]")
        left = config.steps - start
        length = phase.steps if phase.steps is not None else left
        if phase.tokens is not None:
            length = -(-phase.tokens // config.batch_tokens)
        last = number == len(config.phases) - 1
        if length < 1 or length > left or (last and length != left):
            raise ValueError(
                f"{where}.phases[{number}] takes {length} steps, but {left} of {config.steps} are left for it; "
                "leave out steps and tokens in the last phase to give it the rest"
            )
        lr = phase.lr if phase.lr is not None else config.lr
        phases.append(Phase(start, start + length, lr, phase))
        start += length
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    return next(phase for phase in phases if phase.start <= step < phase.stop)


def _check_words(phase: PhaseConfig, where: str) -> None:
    for key, patterns in (("trainable", phase.trainable), ("frozen", phase.frozen)):
        for pattern in patterns:
            if re.fullmatch("[A-Za-z_]+", pattern) and pattern not in GROUPS:
                raise ValueError(
                    f"{where}.{key}: {pattern!r} is no parameter group, expected one of {', '.join(GROUPS)}{nearest(pattern, GROUPS)} "
                    f"For parameters by name write a regular expression, such as '.*{pattern}'"
                )


def check_ranks(config: TrainConfig, ranks: int, where: str = "train") -> None:
    """Raises ValueError: the ranks cannot share the batch evenly."""
    if config.batch_sequences % (ranks * config.micro_batch_sequences):
        raise ValueError(
            f"{where}.batch_sequences={config.batch_sequences} must be a multiple of ranks × "
            f"micro_batch_sequences = {ranks} × {config.micro_batch_sequences}; lower micro_batch_sequences, or take another "
            "number of processes"
        )


def check_strategy(config: TrainConfig, strategy: str, where: str = "train") -> None:
    """Raises ValueError: a phase that a strategy of team.STRATEGIES cannot train."""
    for number, phase in enumerate(config.phases):
        if phase.experts and strategy.startswith("zero"):
            raise ValueError(
                f"{where}.phases[{number}].experts={list(phase.experts)} does not work under {strategy}: DeepSpeed updates "
                "whole flat buffers, so weight decay and old moments would move the other experts too; use single, ddp or fsdp2"
            )


def check_experts(config: TrainConfig, experts: Sequence[str] | None, where: str = "train") -> None:
    """experts: of the model; [] for a dense one, None where nobody knows yet. Raises ValueError: a phase names another."""
    if experts is None:
        return
    for number, phase in enumerate(config.phases):
        for name in phase.experts:
            if name not in experts:
                known = (
                    f"one of {', '.join(experts)}{nearest(name, experts)}"
                    if experts
                    else "none: a dense model has no experts"
                )
                raise ValueError(f"{where}.phases[{number}].experts names {name!r}, expected {known}")
