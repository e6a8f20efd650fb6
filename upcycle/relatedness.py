"""Do branches come from the seed? Task vectors τ_b = θ_b − θ_seed, layer by layer, in one pass over the files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

from upcycle.ahead import in_order, threads_for
from upcycle.checkpoint import Checkpoint

# Two models that share no training have cos(θ_b, θ_seed) ≈ 0 (by chance about 1/√n for n weights), whatever their scales.
# Continued training keeps it high: in a 4-layer Llama (hidden size 192) that was trained three times as long as its seed
# had been, it was 0.60 to 0.73, and 0.71 to 0.91 in branches. ‖τ‖/‖θ_seed‖ alone cannot tell the two apart: it is √2 for
# an unrelated model of the seed's scale, but was 1.43 in that continuation, whose weights had grown, and 1.13 for a fresh
# model, whose weights had not. It gets a bound of its own only for weights that dwarf the seed's.
UNRELATED_COSINE = 0.2
FAR = 2.0
SAMPLE_ABOVE_BYTES = 10_000_000_000  # of all checkpoints together; a CPU core reads about 0.2 GB of bfloat16 a second
CHUNK = (
    1 << 15
)  # weights at a time, in float64: they stay in the cache (four times larger ones took half as long again)
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class LayerFigures:
    """One layer's figures over its matrices (vectors are left out: norms are alike in unrelated models too).

    distance: branch -> ‖τ‖/‖θ_seed‖; seed_cosine: branch -> cos(θ_b, θ_seed). Of every pair of branches "a/b", cosine:
    cos(τ_a, τ_b); sign_agreement: the share of equal signs where both moved; equal: bit for bit. None: 0/0.
    """

    layer: str
    weights: int
    distance: dict[str, float | None]
    seed_cosine: dict[str, float | None]
    cosine: dict[str, float | None]
    sign_agreement: dict[str, float | None]
    equal: dict[str, bool]


@dataclass(frozen=True)
class Relatedness:
    """Figures of every layer that was read, in order, and a line for each branch that does not look like one."""

    layers: tuple[LayerFigures, ...]
    sampled: bool
    warnings: list[str] = field(default_factory=list)

    def figures(self) -> list[str]:
        """A line a branch and a line a pair of branches: medians over the layers that were read."""
        first = self.layers[0]
        lines = [
            f"{name}: ‖τ‖/‖θ_seed‖ {self._median('distance', name)}, cos(θ, θ_seed) {self._median('seed_cosine', name)}"
            for name in first.distance
        ]
        return lines + [
            f"{pair}: cosine of τ {self._median('cosine', pair)}, equal signs {self._median('sign_agreement', pair)}"
            for pair in first.cosine
        ]

    def _median(self, kind: str, name: str) -> str:
        found = [value for one in self.layers if (value := getattr(one, kind)[name]) is not None]
        return f"{median(found):.3g}" if found else "undefined"


def check_related(
    seed: Checkpoint,
    branches: dict[str, Checkpoint],
    sample: bool | None = None,
) -> Relatedness:
    """How far each branch moved from the seed, and how alike the branches moved, with warnings for strangers.

    Averaging weights of models that do not share a start gives a model that is like none of them; this says so before it
    happens. Strangers also show in the pairs: both τ hold −θ_seed, so at one scale their cosine is 1/2 and their signs
    agree in 2/3 of the weights (three branches of the Llama above: 0.16 to 0.31 and 0.56 to 0.61).
    sample: read the first, the middle and the last layer only. A model that does not come from the seed differs in all of
    them, and three layers of a large model hold hundreds of millions of weights. None: only if the files are large.
    Memory: one tensor of every checkpoint and a chunk in float64. The checkpoints must be
    alike (preflight.check_alike).
    """
    if sample is None:
        sample = sum(one.size_bytes() for one in (seed, *branches.values())) > SAMPLE_ABOVE_BYTES
    groups = _layers(seed, sample)
    layers = tuple(
        in_order(lambda layer: _figures(layer, groups[layer], seed, branches), groups, threads_for(1 + len(branches)))
    )
    found = [text for name in branches if (text := _stranger(name, layers, branches[name], seed))]
    found += _copies(layers, seed, branches)
    return Relatedness(layers, sample, found)


def _layers(seed: Checkpoint, sample: bool) -> dict[str, list[str]]:
    """Layer -> its matrices. A layer is the first number in a tensor's name."""
    numbered: dict[int, list[str]] = {}
    outside: list[str] = []
    for name in seed.names:
        if len(seed.shape(name)) < 2:
            continue
        number = re.search(r"\.(\d+)\.", name)
        (numbered.setdefault(int(number[1]), []) if number else outside).append(name)
    order = sorted(numbered)
    if sample and order:
        order = sorted({order[0], order[len(order) // 2], order[-1]})
        outside = []
    groups = {f"layer {number}": numbered[number] for number in order}
    return ({OUTSIDE: outside} if outside else {}) | groups


def _figures(layer: str, names: list[str], seed: Checkpoint, branches: dict[str, Checkpoint]) -> LayerFigures:
    count, weights = len(branches), 0
    pairs = {f"{a}/{b}": (i, j) for (i, a), (j, b) in combinations(enumerate(branches), 2)}
    equal = dict.fromkeys(pairs, True)
    values = torch.zeros(count + 1, count + 1, dtype=torch.float64)  # θ·θ of seed and branches
    moves = torch.zeros(count, count, dtype=torch.float64)  # τ·τ
    signs, both = torch.zeros_like(moves), torch.zeros_like(moves)  # equal minus unequal signs; where both moved
    for name in names:
        tensors = [one.get(name).flatten() for one in (seed, *branches.values())]
        weights += tensors[0].numel()
        for start in range(0, tensors[0].numel(), CHUNK):
            chunks = [tensor[start : start + CHUNK] for tensor in tensors]
            theta = torch.empty(count + 1, len(chunks[0]), dtype=torch.float64)
            for row, chunk in zip(theta, chunks, strict=True):
                row.copy_(chunk)
            values += theta @ theta.T
            tau = theta[1:].sub_(theta[0])
            moves += tau @ tau.T
            sign = tau.sign().float()  # whole numbers, whose sums over a chunk are exact in fp32
            signs += sign @ sign.T
            both += sign.abs_() @ sign.T
            for pair, (i, j) in pairs.items():
                equal[pair] = equal[pair] and torch.equal(tau[i], tau[j])
    norms, tau_norms = values.diagonal().sqrt(), moves.diagonal().sqrt()
    return LayerFigures(
        layer,
        weights,
        {name: _ratio(tau_norms[i], norms[0]) for i, name in enumerate(branches)},
        {name: _ratio(values[0, i + 1], norms[0] * norms[i + 1]) for i, name in enumerate(branches)},
        {pair: _ratio(moves[i, j], tau_norms[i] * tau_norms[j]) for pair, (i, j) in pairs.items()},
        {pair: _ratio((signs[i, j] + both[i, j]) / 2, both[i, j]) for pair, (i, j) in pairs.items()},
        equal,
    )


def _ratio(above: Tensor, below: Tensor) -> float | None:
    return float(above / below) if below != 0 else None


def _stranger(name: str, layers: tuple[LayerFigures, ...], branch: Checkpoint, seed: Checkpoint) -> str | None:
    """The warning for a branch that cannot be a continuation of the seed; None where it can."""
    defined = [
        (one.layer, d, c) for one in layers if (d := one.distance[name]) and (c := one.seed_cosine[name]) is not None
    ]
    odd = [figures for figures in defined if figures[1] > FAR or figures[2] < UNRELATED_COSINE]
    if not odd:
        return None
    distance, cosine = median(d for _, d, _ in odd), median(c for _, _, c in odd)
    return (
        f"branch {name!r} ({branch.directory}) does not look like a continuation of the seed ({seed.directory}): in "
        f"{len(odd)} of {len(layers)} layers read ({odd[0][0]} first) ‖τ‖/‖θ_seed‖ is {distance:.2f} and cos(θ, θ_seed) "
        f"{cosine:.2f} (medians; an unrelated model of the same scale has 1.41 and 0.00). Averages with it will be poor; "
        "bring a branch that was trained from this seed"
    )


def _copies(layers: tuple[LayerFigures, ...], seed: Checkpoint, branches: dict[str, Checkpoint]) -> list[str]:
    """Warnings for branches that hold the seed's very weights, or one another's, in the layers that were read."""
    same = [name for name in branches if not any(one.distance[name] for one in layers)]
    found = [
        f"branch {name!r} ({branches[name].directory}) has the weights of the seed ({seed.directory}); was another meant?"
        for name in same
    ]
    for a, b in combinations([name for name in branches if name not in same], 2):
        if all(one.equal[f"{a}/{b}"] for one in layers):
            found.append(
                f"branches {a!r} ({branches[a].directory}) and {b!r} ({branches[b].directory}) have the same weights; was "
                "another meant?"
            )
    return found
