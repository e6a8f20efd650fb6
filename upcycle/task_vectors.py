"""Merges of task vectors τ_i = θ_i − θ_0: what a branch learnt, as a difference from the seed. Arithmetic in fp32.

A seed among the members has τ = 0: it says nothing, except that it is one more to average over in `dare`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from upcycle.batches import random_words, run_key
from upcycle.merging import Member, Merging, flat
from upcycle.trimming import BLOCK, Tau, cut, places

Scale = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1)]
Drop = Annotated[float, Field(ge=0, lt=1)]
RngSeed = Annotated[int, Field(ge=0)]

DRAWN = 2**22  # words drawn at a time: 32 MiB, whatever the tensor's size; part of what keys a mask, like the names


def task_arithmetic(merging: Merging, *, scale: Scale = 0.4) -> Tensor:
    """θ* = θ_0 + λ Σ_i w_i τ_i, λ = scale (arXiv:2212.04089). Returns fp32."""
    base = merging.base()
    moved = torch.zeros_like(base)
    for _, member in merging.present:
        moved.add_(member.tensor.float() - base, alpha=member.weight)
    return base.add(moved, alpha=scale)


def ties(merging: Merging, *, density: Density = 0.2, scale: Scale = 1.0) -> Tensor:
    """Trim, elect sign, disjoint merge (arXiv:2306.01708). Returns fp32.

        τ̄_i = τ_i where |τ_i| is among its k largest, else 0;  γ = sgn Σ_i w_i τ̄_i
        θ* = θ_0 + λ · Σ_{i: sgn τ̄_i = γ} w_i τ̄_i / Σ_{i: sgn τ̄_i = γ} w_i,  λ = scale

    Differs: k is ⌊density · entries of this tensor⌋, at least 1; the authors' code takes the largest of the whole model. A sum
    that is 0 elects nobody and the entry stays the seed's; theirs takes the sign that most of the model's entries have.
    """
    base, moved = flat(merging.origin()), _moved(merging)
    taus = [Tau(flat(member), base) for _, member in moved]
    return _elected(merging, base, moved, [cut(tau, density).trimmed(tau.blocks()) for tau in taus], scale)


def dare(
    merging: Merging,
    *,
    drop: Drop = 0.9,
    combine: Literal["average", "sum"] = "average",
    scale: Scale = 1.0,
    rng_seed: RngSeed = 1,
) -> Tensor:
    """θ* = θ_0 + λ Σ_i w_i τ̃_i, τ̃ of `dropped`, λ = scale; Σ w = 1 for an average (arXiv:2311.03099). Returns fp32."""
    base = merging.base()
    total_weight = math.fsum(member.weight for _, member in merging.present) if combine == "average" else 1.0
    moved = torch.zeros_like(base)
    for name, member in merging.present:
        kept = dropped(member.tensor.float() - base, drop, name, merging.name, rng_seed)
        moved.add_(kept, alpha=member.weight / total_weight)
    return base.add(moved, alpha=scale)


def dare_ties(merging: Merging, *, drop: Drop = 0.9, scale: Scale = 1.0, rng_seed: RngSeed = 1) -> Tensor:
    """`dare`'s drop and rescale in place of `ties`' trim, then ties' election and disjoint mean. Returns fp32."""
    base, moved = flat(merging.origin()), _moved(merging)
    taus = [_dropped_blocks(Tau(flat(member), base), drop, name, merging.name, rng_seed) for name, member in moved]
    return _elected(merging, base, moved, taus, scale)


def trimmed(tau: Tensor, density: float) -> Tensor:
    """τ with all but its k = max(1, ⌊density · entries⌋) largest entries set to 0; of equal ones the first in memory stay.

    Exactly k, whatever the values: a threshold alone keeps all that equal it, and topk may take any of them.
    """
    whole = Tau(values := tau.reshape(-1), torch.zeros(1, device=tau.device).expand_as(values))
    return torch.cat(list(cut(whole, density).trimmed(whole.blocks()))).view(tau.shape)


def _moved(merging: Merging) -> list[tuple[str, Member]]:
    """The members that are present, without the seed, whose τ of 0 elects nobody."""
    return [(name, member) for name, member in merging.present if member.tensor is not merging.origin().tensor]


def _elected(
    merging: Merging, base: Tensor, members: list[tuple[str, Member]], taus: list[Iterator[Tensor]], scale: float
) -> Tensor:
    """θ_0 + λ times the elected mean, block by block. taus: of the members, in blocks."""
    merged = torch.empty(base.shape, device=base.device)
    for place, *blocks in zip(places(len(base)), *taus, strict=True):
        voices = [(member.weight, tau) for (_, member), tau in zip(members, blocks, strict=True)]
        merged[place] = base[place].float().add(elected_mean(voices) if voices else 0.0, alpha=scale)
    return merged.view(merging.shape)


def _dropped_blocks(tau: Tau, drop: float, branch: str, tensor: str, rng_seed: int) -> Iterator[Tensor]:
    masks = (mask for drawn in stays_masks(len(tau), drop, branch, tensor, rng_seed) for mask in drawn.split(BLOCK))
    for block, mask in zip(tau.blocks(), masks, strict=True):
        yield _drop(block, drop, mask)


def dropped(tau: Tensor, drop: float, branch: str, tensor: str, rng_seed: int) -> Tensor:
    """τ̃ = m ⊙ τ / (1 − p), each entry of the mask m 0 with probability p = drop, so that E[τ̃] = τ. In place."""
    if drop == 0:  # no mask is drawn for nothing
        return tau
    return _drop(tau, drop, stays_mask(tau.numel(), drop, branch, tensor, rng_seed).view(tau.shape))


def _drop(tau: Tensor, drop: float, stays: Tensor) -> Tensor:
    return tau if drop == 0 else tau.div_(1 - drop).masked_fill_(stays.logical_not().to(tau.device), 0)


def stays_mask(count: int, drop: float, branch: str, tensor: str, rng_seed: int) -> Tensor:
    """(count,) bool, True with probability 1 − drop. Depends on (branch, tensor, rng_seed) and the entry's place alone, so
    neither the order of models nor the shards of checkpoints matter."""
    return torch.cat([torch.ones(0, dtype=torch.bool), *stays_masks(count, drop, branch, tensor, rng_seed)])


def stays_masks(count: int, drop: float, branch: str, tensor: str, rng_seed: int) -> Iterator[Tensor]:
    """That mask in pieces of `DRAWN`."""
    key, limit = run_key("dare", rng_seed, branch, tensor), int(drop * 2.0**64)
    for start in range(0, count, DRAWN):
        yield torch.from_numpy(random_words(key, start // DRAWN, min(DRAWN, count - start)) >= limit)


def elected_mean(taus: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Mean of those (weight, τ) whose sign is that of Σ w τ, entry by entry; 0 where nobody agrees. An entry that is 0 has no
    sign, so it neither votes nor counts."""
    total = torch.zeros_like(taus[0][1])
    for weight, tau in taus:
        total.add_(tau, alpha=weight)
    elected = total.sign()
    total, counted = total.zero_(), torch.zeros_like(total)
    for weight, tau in taus:
        agreeing = (tau * elected).relu_()  # |τ| where it agrees, else 0; no masks, which take four times as long
        total.add_(agreeing, alpha=weight)
        counted.add_(agreeing.sign_(), alpha=weight)
    least = min(weight for weight, _ in taus)  # where nobody agrees 0 is divided by it
    return total.mul_(elected).div_(counted.clamp_min_(least))
