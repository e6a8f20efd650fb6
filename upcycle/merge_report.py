"""What the merge of one tensor is about to do: how large and how alike the task vectors are, and where TIES sees conflict.

Pure functions; figures of tensors add up to those of a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from upcycle.merge_config import ROLES
from upcycle.merging import SEED, Member, Merging, flat
from upcycle.trimming import Tau, count, cut, places

Pair = tuple[str, str]
BLOCK = 2**20  # entries that are multiplied together


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
    dots = dict.fromkeys([*pairs, *((a, a) for a in taus)], 0.0)
    alike, both = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
    entries = math.prod(merging.shape)
    for place in places(entries, BLOCK):
        found = {name: tau.of(place) for name, tau in taus.items()}
        for a, b in dots:  # widened two at a time, whatever the number of branches
            wide = found[a].double()
            dots[a, b] += (wide @ (wide if a == b else found[b].double())).item()
        signs = {name: tau.sign_() for name, tau in found.items()}
        less = {
            pair: int(signs[pair[0]] @ signs[pair[1]]) for pair in pairs
        }  # alike - unlike, whole numbers below 2^24
        moved = {name: sign.abs_() for name, sign in signs.items()}
        for a, b in pairs:
            together = int(moved[a] @ moved[b])
            alike[a, b] += (together + less[a, b]) // 2
            both[a, b] += together
    return TaskVectors(dots, alike, both, entries)


def ties_entries(merging: Merging, density: float = 0.2) -> dict[str, int]:
    """How many entries TIES leaves to whom: `trimmed`, no branch keeps a value there, so it stays the seed's; `agreed`, all
    kept values have one sign; `conflict`, they have both. Sums to the tensor's entries. Raises ValueError: there is no seed."""
    conflict, left, entries = 0, 0, math.prod(merging.shape)
    for blocks in zip(*(cut(tau, density).trimmed(tau.blocks()) for tau in _taus(merging).values()), strict=True):
        kept = [block.cpu().numpy() for block in blocks]
        positive, negative = (reduce(np.logical_or, signs) for signs in ([k > 0 for k in kept], [k < 0 for k in kept]))
        conflict += count(positive & negative)
        left += count(positive | negative)
    return {"trimmed": entries - left, "agreed": left - conflict, "conflict": conflict}


def _taus(merging: Merging) -> dict[str, Tau]:
    """Of the branches that are present. Raises ValueError: there is no seed."""
    base = flat(merging.origin())
    return {name: Tau(flat(member), base) for name, member in merging.present if name != SEED}


class Figures(NamedTuple):
    """Of one tensor."""

    vectors: TaskVectors
    ties: Mapping[str, int]


class Facts(Protocol):
    """What a tensor is (roles.TensorFacts)."""

    @property
    def layer(self) -> int | None: ...

    @property
    def role(self) -> str: ...


class MergeReport:
    """Figures of a whole merge, added up by layer and role of its tensors."""

    def __init__(self, density: float = 0.2):
        self.density = density
        self._vectors: dict[tuple[int | None, str], TaskVectors] = {}
        self._ties: dict[tuple[int | None, str], Counter[str]] = {}

    def measured(self, members: Mapping[str, Member], seed: Member) -> Figures | None:
        """Of one tensor of the branches; None, if all of them have the weight 0. Several threads may call it."""
        if not any(member.weight > 0 for member in members.values()):
            return None
        merging = Merging("report", members, seed)
        return Figures(task_vectors(merging), ties_entries(merging, self.density))

    def add(self, facts: Facts, found: Figures | None) -> None:
        if found is None:
            return
        place = (facts.layer, facts.role)
        self._vectors[place] = self._vectors[place] + found.vectors if place in self._vectors else found.vectors
        self._ties.setdefault(place, Counter()).update(found.ties)

    def rows(self) -> list[dict[str, Any]]:
        """For each layer and role: entries, ‖τ‖ of each branch, cosines and sign agreement of each two ("a, b"), TIES' entries."""
        return [
            {"layer": layer, "role": role} | self._row([(layer, role)])
            for layer, role in sorted(self._vectors, key=_order)
        ]

    def of_roles(self) -> dict[str, dict[str, Any]]:
        """The same over all layers, by role; and "all"."""
        places = {
            role: [place for place in self._vectors if place[1] == role]
            for _, role in sorted(self._vectors, key=_order)
        }
        return {name: self._row(some) for name, some in (places | {"all": list(self._vectors)}).items()}

    def _row(self, places: list[tuple[int | None, str]]) -> dict[str, Any]:
        first, *others = [self._vectors[place] for place in places]
        total = sum(others, start=first)
        ties = sum((self._ties[place] for place in places), start=Counter())
        return {
            "entries": total.entries,
            "norms": total.norms,
            "cosines": {", ".join(pair): value for pair, value in total.cosines.items()},
            "sign_agreement": {", ".join(pair): value for pair, value in total.sign_agreement.items()},
            "ties": {"density": self.density} | {name: ties[name] for name in ("trimmed", "agreed", "conflict")},
        }


def _order(place: tuple[int | None, str]) -> tuple[int, int]:
    layer, role = place
    return (-1 if layer is None else layer, ROLES.index(role))


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
