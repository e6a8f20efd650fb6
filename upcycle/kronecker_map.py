"""A Kronecker-factored map M of each expert and matrix: its first values, and M τ without writing M out.

Shapes: E experts, P matrices side by side in one tensor (gate and up), R rank, O = o₁ o₂ rows, I = i₁ i₂ columns of a matrix.
This file travels inside checkpoints as remote code: it imports `.kronecker` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kronecker import FACTORS


def parts_of_name(name: str) -> tuple[str, str]:
    """ "...curvature_down_out1" -> ("down", "out1")."""
    side, factor = name.rpartition("curvature_")[2].split("_")
    return side, factor


@torch.no_grad()
def start(name: str, shape: tuple[int, ...], generator: torch.Generator | None = None, leading: str = "out1") -> Tensor:
    """The first values of the factor that a tensor of this name holds, fp32, so that M = I exactly at any rank.

    The first term is I ⊗ I ⊗ I ⊗ I. The others are 0 ⊗ N ⊗ N ⊗ N (the `leading` factor is 0), N drawn with variance 1/size: their product is 0, their gradients
    differ. Differs: R terms of I/R, which also make I, have equal gradients for ever, and a rank of 1.
    """
    _, factor = parts_of_name(name)
    eye = torch.eye(shape[-1]).expand(shape).clone()
    if factor != "linear" and shape[2] > 1:
        eye[:, :, 1:] = torch.randn(eye[:, :, 1:].shape, generator=generator) / shape[-1] ** 0.5
        if factor == leading:
            eye[:, :, 1:] = 0
    return eye


def apply_map(factors: Mapping[str, Tensor], tau: Tensor) -> Tensor:
    """M τ for each expert and matrix; tau (..., E, P·O, I). Nothing of size O·O or I·I is made, but in the linear control, τ Lᵀ.

    Factors of columns alone (in1, in2) leave the rows as they are: of an embedding, these are words. Memory: τ is kept for backward, and
    what lies between is made again there.
    """
    return _Mapped.apply(list(factors), tau, *factors.values())  # pyright: ignore[reportReturnType]


class _Mapped(torch.autograd.Function):
    """`_map`, whose intermediate results, each as large as rank · τ, are not kept."""

    @staticmethod
    def forward(ctx: Any, names: list[str], tau: Tensor, *factors: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.names = names
        ctx.save_for_backward(tau, *factors)
        return _map(dict(zip(names, factors, strict=True)), tau)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[1:]
        inputs = [one.detach().requires_grad_(wanted) for one, wanted in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            out = _map(dict(zip(ctx.names, inputs[1:], strict=True)), inputs[0])
        found = iter(torch.autograd.grad(out, [one for one in inputs if one.requires_grad], gradient))
        return None, *(next(found).contiguous() if wanted else None for wanted in needed)


def _map(factors: Mapping[str, Tensor], tau: Tensor) -> Tensor:
    matrices = next(iter(factors.values())).shape[1]
    shape = tau.shape
    tau = tau.unflatten(-2, (matrices, -1))
    if "linear" in factors:
        return torch.einsum("epij,...epoj->...epoi", factors["linear"], tau).reshape(shape)
    if "out1" not in factors:
        in1, in2 = factors["in1"], factors["in2"]
        bent = torch.einsum("eprcx,...epoxd->...epocdr", in1, tau.unflatten(-1, (in1.shape[-1], in2.shape[-1])))
        return torch.einsum("eprdx,...epocxr->...epocd", in2, bent).reshape(shape)
    out1, out2, in1, in2 = (factors[name] for name in FACTORS)
    tau = tau.unflatten(-1, (in1.shape[-1], in2.shape[-1])).unflatten(-3, (out1.shape[-1], out2.shape[-1]))
    bent = torch.einsum("eprax,...epxbcd->...epabcdr", out1, tau)
    bent = torch.einsum("eprbx,...epaxcdr->...epabcdr", out2, bent)
    bent = torch.einsum("eprcx,...epabxdr->...epabcdr", in1, bent)
    return torch.einsum("eprdx,...epabcxr->...epabcd", in2, bent).reshape(shape)
