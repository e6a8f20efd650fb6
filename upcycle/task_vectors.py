"""Merges of task vectors τ_i = θ_i − θ_0: what a branch learnt, as a difference from the seed. Arithmetic in fp32.

A seed among the members has τ = 0: it says nothing, except that it is one more to average over in `dare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from upcycle.batches import random_words, run_key
from upcycle.merging import Merging

Scale = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1)]
Drop = Annotated[float, Field(ge=0, lt=1)]
RngSeed = Annotated[int, Field(ge=0)]

BLOCK = 2**20  # entries that are looked at together
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
    base = merging.base()

    def taus() -> Iterator[tuple[float, Tensor]]:
        for _, member in merging.present:
            yield member.weight, trimmed(member.tensor.float() - base, density)

    return base.add(elected_mean(taus), alpha=scale)


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
    base = merging.base()

    def taus() -> Iterator[tuple[float, Tensor]]:
        for name, member in merging.present:
            yield member.weight, dropped(member.tensor.float() - base, drop, name, merging.name, rng_seed)

    return base.add(elected_mean(taus), alpha=scale)


def trimmed(tau: Tensor, density: float) -> Tensor:
    """τ with all but its k = max(1, ⌊density · entries⌋) largest entries set to 0; of equal ones the first in memory stay.

    Exactly k, whatever the values: a threshold alone keeps all that equal it, and topk may take any of them. In place, if τ
    is contiguous, and with the memory of one block.
    """
    keep = max(1, int(Fraction(str(density)) * tau.numel()))  # 0.29 of 100 is 29, which floats make 28.999…
    if keep >= tau.numel():
        return tau
    flat = tau.contiguous().view(-1)
    threshold = largest(flat, keep)
    equal_ones = keep - sum(int((block.abs() > threshold).sum()) for block in flat.split(BLOCK))
    for block in flat.split(BLOCK):
        sizes = block.abs()
        equal = (sizes == threshold).nonzero().flatten()[:equal_ones]
        equal_ones -= len(equal)
        stays = sizes > threshold
        stays[equal] = True
        block.masked_fill_(~stays, 0)
    return flat.view(tau.shape)


def largest(flat: Tensor, place: int) -> float:
    """The size of the entry of an fp32 vector that is the `place`-th largest in size, 1 the largest.

    By counting, the upper halves of the numbers' bits first, which order sizes as the numbers do: torch.kthvalue would take
    three more vectors of memory.
    """
    found = 0
    for shift, mask in ((16, 0x7FFF), (0, 0xFFFF)):
        counts = torch.zeros(mask + 1, dtype=torch.int64)
        for block in flat.split(BLOCK):
            bits = block.abs().cpu().view(torch.int32)
            if shift == 0:
                bits = bits[(bits >> 16) == found >> 16]
            counts += torch.bincount((bits >> shift) & mask, minlength=mask + 1)
        from_above = counts.flip(0).cumsum(0)
        above = int((from_above < place).sum())
        found |= (mask - above) << shift
        place -= int(from_above[above - 1]) if above else 0
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).item()


def dropped(tau: Tensor, drop: float, branch: str, tensor: str, rng_seed: int) -> Tensor:
    """τ̃ = m ⊙ τ / (1 − p), each entry of the mask m 0 with probability p = drop, so that E[τ̃] = τ. In place."""
    if drop == 0:
        return tau
    stays = stays_mask(tau.numel(), drop, branch, tensor, rng_seed).view(tau.shape).to(tau.device)
    return tau.div_(1 - drop).masked_fill_(stays.logical_not_(), 0)


def stays_mask(count: int, drop: float, branch: str, tensor: str, rng_seed: int) -> Tensor:
    """(count,) bool, True with probability 1 − drop. Depends on (branch, tensor, rng_seed) and the entry's place alone, so
    neither the order of models nor the shards of checkpoints matter."""
    key, limit = run_key("dare", rng_seed, branch, tensor), int(drop * 2.0**64)
    pieces = [
        torch.from_numpy(random_words(key, start // DRAWN, min(DRAWN, count - start)) >= limit)
        for start in range(0, count, DRAWN)
    ]
    return torch.cat(pieces) if pieces else torch.ones(0, dtype=torch.bool)


def elected_mean(taus: Callable[[], Iterable[tuple[float, Tensor]]]) -> Tensor:
    """Mean of those (weight, τ) whose sign is that of Σ w τ, entry by entry; 0 where nobody agrees. An entry that is 0 has no
    sign, so it neither votes nor counts. taus: gives them one by one, and is asked twice, so that they need not lie in memory."""
    total = None
    for weight, tau in taus():
        total = torch.zeros_like(tau) if total is None else total
        total.add_(tau, alpha=weight)
        del tau  # before the next one is made
    assert total is not None
    elected = total.sign().to(torch.int8)
    total.zero_()
    counted = torch.zeros_like(total)
    for weight, tau in taus():
        parts = (one.reshape(-1).split(BLOCK) for one in (tau, elected))
        sums = (one.view(-1).split(BLOCK) for one in (total, counted))
        for values, sign, sum_, count in zip(*parts, *sums, strict=True):
            agrees = values.sign() == sign
            sum_.add_(values * agrees, alpha=weight)
            count.add_(agrees, alpha=weight)
        del tau, values, parts
    return total.div_(counted.masked_fill_(counted == 0, 1))
