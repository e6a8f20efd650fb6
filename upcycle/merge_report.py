"""What the merge of one tensor is about to do: how large and how alike the task vectors are, and where TIES sees conflict.

Pure functions; figures of tensors add up to those of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from upcycle.merging import SEED, Merging
from upcycle.task_vectors import trimmed

Pair = tuple[str, str]


@dataclass(frozen=True)
class TaskVectors:
    """Sums over the entries of one tensor or, added up, of many; pairs are in sorted order of names.

    dots: τ_a · τ_b, a = b included. alike: entries where both are not 0 and have one sign. both: where both are not 0.
    """

    dots: Mapping[Pair, float]
    alike: Mapping[Pair, int]
    both: Mapping[Pair, int]
    entries: int

    def __add__(self, other: TaskVectors) -> TaskVectors:
        """Raises ValueError: figures of other branches."""
        if set(self.dots) != set(other.dots):
            mine, theirs = (", ".join(sorted({name for name, _ in one.dots})) for one in (self, other))
            raise ValueError(f"task vectors of {mine} and of {theirs} do not add up; give figures of the same branches")
        return TaskVectors(
            {pair: value + other.dots[pair] for pair, value in self.dots.items()},
            {pair: value + other.alike[pair] for pair, value in self.alike.items()},
            {pair: value + other.both[pair] for pair, value in self.both.items()},
            self.entries + other.entries,
        )

    @property
    def norms(self) -> dict[str, float]:
        """‖τ‖ of each branch."""
        return {a: math.sqrt(value) for (a, b), value in self.dots.items() if a == b}

    @property
    def cosines(self) -> dict[Pair, float | None]:
        """Cosine of each two branches' τ; None where one of them is 0."""
        norms = self.norms
        sizes = {(a, b): norms[a] * norms[b] for a, b in self.dots if a != b}
        return {pair: self.dots[pair] / size if size else None for pair, size in sizes.items()}

    @property
    def sign_agreement(self) -> dict[Pair, float | None]:
        """Of the entries that both branches moved, the share that they moved the same way; None where there are none."""
        return {pair: self.alike[pair] / count if count else None for pair, count in self.both.items()}


def task_vectors(merging: Merging) -> TaskVectors:
    """Figures of the branches that are present (the seed's own τ is 0). Raises ValueError: there is no seed."""
    taus = _taus(merging)
    pairs = list(combinations(taus, 2))
    return TaskVectors(
        {(a, b): (taus[a].double() * taus[b].double()).sum().item() for a, b in [*pairs, *((a, a) for a in taus)]},
        {(a, b): int((taus[a].sign() * taus[b].sign() > 0).sum()) for a, b in pairs},
        {(a, b): int(((taus[a] != 0) & (taus[b] != 0)).sum()) for a, b in pairs},
        merging.base().numel(),
    )


def ties_entries(merging: Merging, density: float = 0.2) -> dict[str, int]:
    """How many entries TIES leaves to whom: `trimmed`, no branch keeps a value there, so it stays the seed's; `agreed`, all
    kept values have one sign; `conflict`, they have both. Sums to the tensor's entries. Raises ValueError: there is no seed."""
    positive = torch.zeros(merging.shape, dtype=torch.bool, device=merging.base().device)
    negative = positive.clone()
    for tau in _taus(merging).values():
        kept = trimmed(tau, density)
        positive |= kept > 0
        negative |= kept < 0
    conflict, kept = int((positive & negative).sum()), int((positive | negative).sum())
    return {"trimmed": positive.numel() - kept, "agreed": kept - conflict, "conflict": conflict}


def _taus(merging: Merging) -> dict[str, Tensor]:
    base = merging.base()
    return {name: member.tensor.float() - base for name, member in merging.present if name != SEED}


def task_arithmetic_error(
    seed_hessian: Tensor,
    gradients: Mapping[str, tuple[Tensor, Tensor]],
    alphas: Mapping[str, float],
    damping: float = 1e-12,
) -> Tensor:
    """θ* − θ_TA = −Σ_i α_i H_0⁻¹ [∇ℓ_i(θ*) − ∇ℓ_i(θ_i)]: what task arithmetic with λ w_i = α_i misses (arXiv:2310.12808).

    seed_hessian: H_0, diagonal, of the tensor's shape. gradients: of each branch's loss at the target θ* and at the branch's
    own θ_i, without the pull towards the seed. damping: added to H_0, as `gradient_matching` does. Returns fp32.
    Raises ValueError: gradients and alphas of different branches.
    """
    if set(gradients) != set(alphas):
        raise ValueError(
            f"gradients of {', '.join(sorted(gradients))} but alphas of {', '.join(sorted(alphas))}; give both of each branch"
        )
    mismatch = torch.zeros_like(seed_hessian, dtype=torch.float32)
    for name in sorted(gradients):
        at_target, at_own = gradients[name]
        mismatch.add_(at_target.float() - at_own.float(), alpha=alphas[name])
    return -mismatch / (seed_hessian.float() + damping)
