"""N tensors -> 1. Pure functions of tensors in one table; arithmetic in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """θ* = Σ_i w_i θ_i with Σ w = 1; uniform by default. Returns fp32.

    Differs: nothing; this is the soup of arXiv:2203.05482 and what BTX does to all non-expert parameters.
    """
    weights = [1 / len(tensors)] * len(tensors) if weights is None else [w / sum(weights) for w in weights]
    total = torch.zeros(tensors[0].shape, dtype=torch.float32)
    for weight, tensor in zip(weights, tensors, strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


METHODS = {"average": average}
