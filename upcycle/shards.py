"""The tensors of one expert's feed-forward from those of its sources: cut, drawn anew in part, scaled. Pure functions.

Shapes: D hidden, F hidden units. Matrices are (out, in): gate and up (F, D), down (D, F).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upcycle.experts import Chunk, dropped_count


def matrices(stored: Sequence[Tensor], gated: bool) -> list[Tensor]:
    """[gate, up], or [up], also where a family keeps both in one tensor, gate rows first."""
    return list(stored[0].chunk(2)) if gated and len(stored) == 1 else list(stored)


def chosen_units(tensor_of: Mapping[str, Tensor], chunks: Sequence[Chunk], axis: int) -> Tensor:
    """The hidden units of `chunks`, one after the other, of one matrix (or bias) of every source."""
    return torch.cat([tensor_of[one.source].chunk(one.of, axis)[one.number] for one in chunks], axis)


def shared_out(bias_of: Mapping[str, Tensor], chunks: Sequence[Chunk]) -> Tensor:
    """The bias of down, of which each of G shards has 1/G."""
    parts = [bias_of[one.source].double() / one.of for one in chunks]
    return torch.stack(parts).sum(0).to(bias_of[chunks[0].source].dtype)


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little"))


def dropped_units(width: int, fraction: float, key: str) -> Tensor:
    """floor(r · F) of the F hidden units, all sets equally likely, in order."""
    return torch.randperm(width, generator=_generator(key))[: dropped_count(width, fraction)].sort().values


def redrawn(tensor: Tensor, axis: int, units: Tensor, key: str) -> Tensor:
    """The same with `units` drawn anew along `axis` (Drop-Upcycling, arXiv:2502.19261, section 3.2).

        w ~ N(μ, σ²),   μ and σ: mean and standard deviation of the values that are replaced, of this matrix alone

    Differs: biases of the hidden units are drawn likewise (the paper's model has none); the authors' code draws which units
    for gate, up and down apart, and here as in the paper they are the same.
    """
    old = tensor.index_select(axis, units).double()
    drawn = torch.randn(old.shape, generator=_generator(key), dtype=torch.float64)
    new = old.mean() + old.std(correction=0) * drawn
    return tensor.index_copy(axis, units, new.to(tensor.dtype))


def scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.double() * factor).to(tensor.dtype)
