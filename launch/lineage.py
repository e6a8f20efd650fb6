"""What a model is and what it took, known from the settings before anything runs: tokens by domain, FLOPs, stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from upcycle.batches import consumed_tokens
from upcycle.config import TrainConfig
from upcycle.cost import Shape


@dataclass(frozen=True)
class Lineage:
    """One model: its shape, how many `copies` of it stand side by side (an ensemble's members; else 1), and what it took.

    domains: training tokens of each domain. domains and flops are None for what is made of a branch that was brought along:
    nobody here knows what it cost. A seed that was brought along counts nothing: all models have it in common.
    """

    shape: Shape
    domains: Mapping[str, int] | None = field(default_factory=dict)
    flops: float | None = 0.0
    stages: list[list[str]] = field(default_factory=list)
    copies: int = 1

    @property
    def tokens(self) -> int | None:
        return None if self.domains is None else sum(self.domains.values())

    @property
    def parameters(self) -> int:
        return self.copies * self.shape.parameters

    @property
    def active_parameters(self) -> int:
        return self.copies * self.shape.active_parameters

    def read(self, domains: Mapping[str, int], flops: float) -> Lineage:
        """This lineage after something else has learned from so many tokens of each domain, with so many FLOPs."""
        if self.domains is None or self.flops is None:
            return self
        return replace(self, domains=add(self.domains, domains), flops=self.flops + flops)

    def trained(self, config: TrainConfig, stages: list[str]) -> Lineage:
        """This lineage after one more training run of `config.steps` steps."""
        domains = None if self.domains is None else add(self.domains, consumed(config))
        flops = None if self.flops is None else self.flops + train_flops(self.shape, config)
        return replace(self, domains=domains, flops=flops, stages=[*self.stages, stages])


def train_flops(shape: Shape, config: TrainConfig) -> float:
    """FLOPs of a whole training run of a model of this shape."""
    each = shape.step_flops_per_token(config.sequence_length, config.micro_batch_sequences)
    return config.steps * config.batch_tokens * each


def consumed(train: TrainConfig) -> dict[str, int]:
    """Tokens of each domain that a run takes."""
    sequences = train.steps * train.batch_sequences
    return consumed_tokens(train.proportions, train.rng_seed, train.sequence_length, sequences)


def add(used: Mapping[str, int], more: Mapping[str, int], sign: int = 1) -> dict[str, int]:
    """used + sign · more, domain by domain."""
    return {domain: used.get(domain, 0) + sign * more.get(domain, 0) for domain in sorted({*used, *more})}


def together(seed: Lineage, branches: Mapping[str, Lineage]) -> Lineage:
    """Branches as one: their tokens and FLOPs add up, the seed's counted once; they can run side by side."""
    names = [[f"branch/{name}" for name in branches]] if branches else []
    stages, known = [*seed.stages, *names], list(branches.values())
    if any(branch.domains is None for branch in known):
        return Lineage(seed.shape, None, None, stages)
    return Lineage(seed.shape, _added(seed, known), _summed(seed, known), stages)


def _added(seed: Lineage, branches: Iterable[Lineage]) -> dict[str, int]:
    total = dict(seed.domains or {})
    for branch in branches:
        total = add(total, add(branch.domains or {}, seed.domains or {}, sign=-1))
    return total


def _summed(seed: Lineage, branches: Iterable[Lineage]) -> float:
    return (seed.flops or 0.0) + sum((branch.flops or 0.0) - (seed.flops or 0.0) for branch in branches)
