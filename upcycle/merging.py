"""One tensor of all the models that are merged, and their average. Checked data and pure functions; arithmetic in fp32.

N models; θ_i the tensor in model i, w_i that model's weight, θ_0 the tensor in the seed, τ_i = θ_i − θ_0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

SEED = "seed"  # the name of the seed among the members, where it is one
DIAGONALS = ("fisher", "hessian")
OF_MODELS = ("fisher_norm", "camex_score")  # one number for all tensors


class Readable(Protocol):
    """A tensor, or what reads one anew each time that its values are asked for (checkpoint.Stored)."""

    @property
    def shape(self) -> torch.Size: ...

    def float(self) -> Tensor: ...

    def mapped(self) -> Tensor: ...


@dataclass(frozen=True)
class Member:
    """One model's share in the merge of one tensor. Methods ask for the values of one member after another, some twice.

    weight: as the user gives it, ≥ 0, relative where a formula says Σ w = 1; 0 is as if the model were not there.
    statistics: what methods ask for, of any dtype that floats, by name:
        fisher       the tensor's shape: diagonal of the Fisher, ≥ 0
        fisher_norm  (): L2 norm of that diagonal over all tensors of the model
        hessian      the tensor's shape: diagonal of the Hessian of the model's loss
        gram         (in, in): XᵀX of what the linear saw as input. Its scale weighs the model, so take the same number of
                     tokens of each, or means
        kfac_in      (in, in): E[x xᵀ] of the linear's inputs
        kfac_out     (out, out): E[g gᵀ] of the gradients with respect to its outputs
        camex_score  (): s of the model; camex_out1, ..., camex_in2 (R, n, n): the factors of its M (camex_learning.py)
    """

    tensor: Tensor | Readable
    weight: float = 1.0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def flat(member: Member) -> Tensor:
    """As stored; of a checkpoint's tensor the mapped pages, which are read where they are looked at."""
    tensor = member.tensor
    return (tensor if isinstance(tensor, Tensor) else tensor.mapped()).reshape(-1)


@dataclass(frozen=True)
class Merging:
    """One tensor of all models. Results do not depend on the order of `members`: everything goes by their sorted names.

    name: the tensor's; it keys random masks. members: by branch name, with "seed" among them where it has a share.
    seed: what τ and H_0 are taken from; its weight says nothing. in_axis: the axis of a linear's weight along which its
    inputs lie, 1 for nn.Linear (out, in), 0 for GPT-2's Conv1D (in, out); None where the tensor is no linear's weight.
    Raises ValueError: no members, or all of weight 0; shapes that differ; a weight below 0; an axis that is not there.
    """

    name: str
    members: Mapping[str, Member]
    seed: Member | None = None
    in_axis: int | None = None

    def __post_init__(self):
        everyone = dict(self.members) | ({} if self.seed is None else {"the seed": self.seed})
        shapes = {who: tuple(member.tensor.shape) for who, member in everyone.items()}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{who} {shape}" for who, shape in list(shapes.items())[:5])
            raise ValueError(f"merge of {self.name}: {said}; expected one shape; merge models of one architecture")
        for who, member in self.members.items():
            if not (math.isfinite(member.weight) and member.weight >= 0):
                raise ValueError(
                    f"merge of {self.name}: {who} has the weight {member.weight}; give it a number from 0 on"
                )
        if not any(member.weight > 0 for member in self.members.values()):
            raise ValueError(f"merge of {self.name}: no member of {len(self.members)} has a weight above 0; give one")
        if self.in_axis is not None and (self.in_axis not in (0, 1) or len(self.shape) != 2):
            raise ValueError(
                f"merge of {self.name}: in_axis={self.in_axis} of a tensor of shape {tuple(self.shape)}; expected 0 or 1 of a "
                "matrix; write in_axis=None where it is no linear's weight"
            )

    @property
    def shape(self) -> torch.Size:
        return next(iter(self.members.values())).tensor.shape

    @cached_property
    def present(self) -> tuple[tuple[str, Member], ...]:
        """The members of a weight above 0, in sorted order of names."""
        return tuple((name, self.members[name]) for name in sorted(self.members) if self.members[name].weight > 0)

    def base(self) -> Tensor:
        """θ_0 in fp32. Raises ValueError: there is no seed."""
        return self.origin().tensor.float()

    def origin(self) -> Member:
        """The seed. Raises ValueError: there is none."""
        if self.seed is None:
            raise ValueError(
                f"merge of {self.name}: this method takes differences from the seed; give Merging its seed"
            )
        return self.seed

    def statistic(self, key: str, name: str, member: Member) -> Tensor:
        """member.statistics[key]. Raises ValueError: it is missing, of another shape, not finite, or a Fisher below 0."""
        where = f"merge of {self.name}: the statistic {key!r} of {name}"
        if key not in member.statistics:
            has = ", ".join(sorted(member.statistics)) or "none"
            raise ValueError(f"{where} is missing (there: {has}); collect it from text before this merge")
        found, expected = member.statistics[key], self._expected(key)
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{where} has the shape {tuple(found.shape)}, expected {expected}; collect it from this model"
            )
        if not torch.isfinite(found).all():
            raise ValueError(f"{where} holds NaN or infinite values; expected finite ones; collect it again")
        if key == "fisher" and (found < 0).any():
            raise ValueError(f"{where} holds {found.min():.4g}, expected squares, 0 or more; collect it again")
        return found

    def _expected(self, key: str) -> tuple[int, ...]:
        if key in DIAGONALS:
            return tuple(self.shape)
        if key in OF_MODELS:
            return ()
        assert self.in_axis is not None
        width = self.shape[self.in_axis if key in ("gram", "kfac_in") else 1 - self.in_axis]
        return (width, width)


def average(merging: Merging) -> Tensor:
    """θ* = Σ_i w_i θ_i with Σ w = 1; uniform where the weights are equal. Returns fp32.

    The soup of arXiv:2203.05482, and what BTX does to all non-expert parameters.
    Summed as θ_1 + Σ_i w_i (θ_i − θ_1), so that the average of equal tensors is that tensor, bit for bit.
    """
    total_weight = math.fsum(member.weight for _, member in merging.present)
    first = merging.present[0][1].tensor.float()
    moved = torch.zeros_like(first)
    for _, member in merging.present[1:]:
        moved.add_(member.tensor.float() - first, alpha=member.weight / total_weight)
    return first + moved
