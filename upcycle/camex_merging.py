"""CAMEx (arXiv:2502.18821) as a merge: θ* = θ_m + α Σ_i M_i (s_i τ_i), τ_i = θ_i − θ_m, with M from Fisher, K-FAC, or learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from upcycle.curvature_merging import NotNegative, Positive, Share, Solved, fisher, mats_solved
from upcycle.kronecker import FACTORS
from upcycle.kronecker_map import apply_map
from upcycle.merging import Merging, average

# The statistics that learning leaves (camex_learning.py).
KEYS = ("camex_score", *(f"camex_{name}" for name in FACTORS))
Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=256)]  # as a layer's (combine_config.LARGEST_RANK)
BASES = ("seed", "mean", "zeros")  # or a member


def camex_solved(
    merging: Merging,
    *,
    curvature: Literal["learned", "fisher", "kfac", "identity"] = "learned",
    base: str = "seed",
    alpha: Positive = 1.0,
    rank: Rank = 1,
    steps: Count = 300,
    lr: Positive = 1e-2,
    batch_sequences: Count = 4,
    floor: Positive = 1e-6,
    normalise: bool = True,
    off_diagonal: Share = 1.0,
    iterations: Count = 100,
    tolerance: Positive = 1e-5,
    decay: NotNegative = 0.0,
) -> Solved:
    """θ* = θ_m + α Σ_i M_i (s_i (θ_i − θ_m)) (arXiv:2502.18821, eq. 3, without a router), fp32; and whether K-FAC's system was solved.

    base: θ_m, "seed", "mean" of the members, "zeros", or a member. curvature: M_i and s_i,
        learned   Kronecker factors of `rank` and Σ s = 1, as `camex_learning.learn` leaves them after `steps` of `batch_sequences`
                  a model at `lr`, pulled to I by `decay`; what has no factors (biases, norms) has M = I
        fisher    s_i M_i = c_i / Σ c, with `floor` and `normalise` as in `fisher`; what α = 1 gives is Fisher merging
        kfac      s_i M_i = (Σ C)⁻¹ C_i; what α = 1 gives is `mats`, with `off_diagonal`, `iterations` and `tolerance` as there
        identity  s_i = w_i / Σ w; what α = 1 gives is the average
    For the last three Σ s M = I, so θ* = θ_m + α (θ_C − θ_m) with what that curvature merges to, and θ_m matters with α ≠ 1 only.
    Raises ValueError: a base that is no member; statistics that are missing (`Merging.statistic`).
    """
    if curvature == "learned":
        return Solved(_learned(merging, base, alpha), 0, 0.0, True)
    if curvature == "kfac":
        found = mats_solved(
            merging, curvature="kfac", off_diagonal=off_diagonal, iterations=iterations, tolerance=tolerance
        )
    elif curvature == "fisher":
        found = Solved(fisher(merging, floor=floor, normalise=normalise), 0, 0.0, True)
    else:
        found = Solved(average(merging), 0, 0.0, True)
    if alpha == 1:
        return found
    start = base_of(merging, base)
    return found._replace(tensor=start + alpha * (found.tensor - start))


@wraps(camex_solved, assigned=("__annotations__", "__doc__"))
def camex(merging: Merging, **options: Any) -> Tensor:
    return camex_solved(merging, **options).tensor


def base_of(merging: Merging, base: str) -> Tensor:
    """θ_m in fp32. Raises ValueError: it is no member."""
    if base == "seed":
        return merging.base()
    if base == "mean":
        return average(merging)
    if base == "zeros":
        return torch.zeros_like(next(iter(merging.members.values())).tensor.float())
    if base not in merging.members:
        raise ValueError(
            f"merge of {merging.name}: base={base!r} is not known, expected seed, mean, zeros or one of {', '.join(merging.members)}"
        )
    return merging.members[base].tensor.float()


def _learned(merging: Merging, base: str, alpha: float) -> Tensor:
    thetas, scores, factors = [], [], []
    for name, member in merging.present:
        thetas.append(member.tensor.float())
        scores.append(merging.statistic("camex_score", name, member).float())
        held = {one: member.statistics.get(f"camex_{one}") for one in FACTORS}
        if len(merging.shape) == 2 and all(factor is None for factor in held.values()):
            raise ValueError(
                f"merge of {merging.name}: no curvature of {name} was learned for it; learn it for this very merge"
            )
        factors.append({one: factor.float() for one, factor in held.items() if factor is not None})
    return combined(base_of(merging, base), thetas, scores, factors, alpha)


def combined(
    base: Tensor,
    thetas: Sequence[Tensor],
    scores: Sequence[Tensor],
    factors: Sequence[Mapping[str, Tensor]],
    alpha: float,
) -> Tensor:
    """θ_m + α Σ_i s_i M_i (θ_i − θ_m). factors: of each model, (R, n, n) by name; none where M = I."""
    moved: Any = 0.0
    for theta, score, own in zip(thetas, scores, factors, strict=True):
        tau = theta - base
        if own:
            tau = apply_map({name: one[None, None] for name, one in own.items()}, tau[None])[0]
        moved = moved + score * tau
    return base + alpha * moved
