"""Learning rates and AdamW's parameter groups: all plain functions of the config and the step."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from upcycle.config import GROUPS, GroupConfig, PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.phases import Phase, phase_at
from upcycle.phases import plan_phases as plan_phases

ATTENTION_NAMES = re.compile(r"\.(self_attn|attention|attn)\.")


def schedule_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Share of the peak rate at `step` of `steps`: linear warm-up (step 0 already moves), then the decay of its kind."""
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    floor, left = schedule.final_fraction, max(steps - warmup, 1)
    progress = (step - warmup) / left
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "linear":
        return 1 - (1 - floor) * progress
    if schedule.kind == "wsd":
        return 1 - (1 - floor) * max(0.0, (progress - (1 - schedule.decay_fraction)) / schedule.decay_fraction)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config: TrainConfig, phases: list[Phase], step: int) -> float:
    """The rate at `step`. Every phase runs the whole schedule, warm-up included, over its own steps."""
    phase = phase_at(phases, step)
    return phase.lr * schedule_factor(config.schedule, step - phase.start, phase.stop - phase.start)


def group_of(name: str) -> str:
    """The optimizer group of a parameter, from its name."""
    if ".router." in name:
        return "router"
    if ".curvature_" in name:
        return "curvature"
    if ".experts." in name:
        return "experts"
    return "attention" if ATTENTION_NAMES.search(name) else "rest"


def decays(name: str, parameter: torch.Tensor) -> bool:
    return decays_by_name(
        name, getattr(parameter, "ds_shape", parameter.shape)
    )  # ZeRO-3's partition itself has one dimension


def decays_by_name(name: str, shape: Sequence[int]) -> bool:
    """Weight decay is for matrices; stacked biases are 2-D too, hence the look at the name. A curvature would decay to 0, not to
    the identity that it starts from."""
    return len(shape) >= 2 and "bias" not in name and "curvature_" not in name


def parameter_groups(model: nn.Module, config: TrainConfig, updates: Mapping[str, float] | None = None) -> list[dict]:
    """AdamW groups: (group, decays or not), each with its `lr_multiplier`. Every parameter is in exactly one.

    updates: how often each parameter that is to be trained has been updated; those with different counts are kept apart,
    and parameters that are not in it are left out.
    """
    members: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if updates is None or name in updates:
            count = updates[name] if updates else 0.0
            members.setdefault((group_of(name), decays(name, parameter), count), []).append(parameter)
    groups = []
    settings: Mapping[str, GroupConfig] = {**config.optimizer.groups}
    for (group, decay, _), parameters in sorted(members.items(), key=lambda member: member[0]):
        own = settings.get(group)
        weight_decay = config.optimizer.weight_decay
        if own is not None and own.weight_decay is not None:
            weight_decay = own.weight_decay
        groups.append(
            {
                "params": parameters,
                "weight_decay": weight_decay if decay else 0.0,
                "lr_multiplier": own.lr_multiplier if own else 1.0,
            }
        )
    return groups


def build_optimizer(
    model: nn.Module, config: TrainConfig, updates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """updates: see `parameter_groups`."""
    options, groups = config.optimizer, parameter_groups(model, config, updates)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def _matches(pattern: str, name: str) -> bool:
    return group_of(name) == pattern if pattern in GROUPS else re.search(pattern, name) is not None


def trainable_names(names: Iterable[str], phase: PhaseConfig) -> set[str]:
    """The parameters that `phase` trains: those that match `trainable` and not `frozen`.

    Raises ValueError: a pattern that matches nothing, or nothing left to train.
    """
    names = list(names)
    for pattern in (*phase.trainable, *phase.frozen):
        if not any(_matches(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, [*GROUPS, *names], n=3, cutoff=0.3)
            raise ValueError(
                f"phases: {pattern!r} matches no parameter of this model; nearest: {', '.join(near) or 'none'}"
            )
    chosen = {name for name in names if any(_matches(p, name) for p in phase.trainable)}
    chosen -= {name for name in names if any(_matches(p, name) for p in phase.frozen)}
    if not chosen:
        raise ValueError(f"phases: trainable={phase.trainable} without frozen={phase.frozen} leaves nothing to train")
    return chosen


def set_trainable(model: nn.Module, phase: PhaseConfig) -> None:
    """Freeze what `phase` does not train. AdamW skips parameters without gradients: frozen ones don't decay either."""
    chosen = trainable_names([name for name, _ in model.named_parameters()], phase)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
        parameter.grad = None
