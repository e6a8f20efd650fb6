"""Merges that weigh each model by its curvature: θ* = (Σ C_i)⁻¹ Σ C_i θ_i, and gradient matching.

C_i = w_i I is the average, w_i diag F_i Fisher merging, w_i G_i RegMean, w_i A_i ⊗ B_i with K-FAC's factors MaTS. All are computed as
a step away from a tensor that lies among the θ_i: then models that are equal come back bit for bit, singular C or not.
fp32 where C is diagonal; float64 where a system is solved. A linear's weight W is turned to (in, out) first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from upcycle.merging import SEED, Member, Merging, average
from upcycle.task_vectors import Scale, task_arithmetic

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Curvature = Literal["identity", "fisher", "gram", "kfac"]


def fisher(merging: Merging, *, floor: Positive = 1e-6, normalise: bool = True) -> Tensor:
    """θ* = Σ_i c_i θ_i / Σ_i c_i, c_i = w_i max(F_i, floor) / ‖F_i‖, entry by entry (arXiv:2111.09832). Returns fp32.

    normalise: divide by ‖F_i‖, the L2 norm over the whole model (`fisher_norm`), as the authors' code does; without it c_i is
    w_i max(F_i, floor). Where no model has curvature the result is the average with the weights w_i / ‖F_i‖.
    Differs: the authors' code by default floors the Fisher of the first model alone; here no model is first.
    Raises ValueError: see `Merging.statistic`; a model whose Fisher is 0 everywhere, among others whose is not.
    """
    first = merging.present[0][1].tensor.float()
    moved, total = torch.zeros_like(first), torch.zeros_like(first)
    for (_, member), weight in zip(merging.present, _fisher_weights(merging, normalise, floor), strict=True):
        total.add_(weight)
        moved.add_(weight.mul_(member.tensor.float() - first))
    return moved.div_(total).add_(first)


def _fisher_weights(merging: Merging, normalise: bool, floor: float) -> Iterator[Tensor]:
    """c_i of each member that is present, one after the other, the caller's own."""
    norms = dict.fromkeys(merging.members, 1.0)
    if normalise:
        norms = {name: merging.statistic("fisher_norm", name, member).item() for name, member in merging.present}
        silent = [name for name, norm in norms.items() if norm <= 0]
        if len(silent) == len(norms):  # nobody says anything: the floor, and so the average
            norms = dict.fromkeys(norms, 1.0)
        elif silent:
            raise ValueError(
                f"merge of {merging.name}: the Fisher of {', '.join(silent)} has the norm {norms[silent[0]]:g} over the whole "
                "model, expected above 0; collect it again, or write normalise=false"
            )
    for name, member in merging.present:
        yield merging.statistic("fisher", name, member).float().clamp(min=floor).mul_(member.weight / norms[name])


def regmean(merging: Merging, *, off_diagonal: Share = 0.9, ridge: NotNegative = 0.0) -> Tensor:
    """W* = (Σ_i w_i G_i + r I)⁻¹ (Σ_i w_i G_i W_i + r I W̄), W (in, out), W̄ the average (arXiv:2212.09849). Returns fp32.

    G = XᵀX with its off-diagonals times `off_diagonal`; r = ridge · mean diagonal of Σ w G. Tensors that are no linear's
    weight are averaged. Inputs that were 0 in all models, whose weights no Gram matrix says anything about, are averaged.
    Differs: the ridge pulls towards W̄ where a plain one would pull towards 0, away from models that are all equal.
    Raises ValueError: see `Merging.statistic`; a sum of Gram matrices that is singular.
    """
    mean = average(merging)
    if merging.in_axis is None:
        return mean
    turned = _inputs_first(mean, merging)
    total, right = None, torch.zeros_like(turned)
    for name, member in merging.present:
        gram = _shrunk(merging.statistic("gram", name, member), off_diagonal).mul_(member.weight)
        right.addmm_(gram, _inputs_first(member.tensor.float(), merging) - turned)
        total = gram if total is None else total.add_(gram)
    assert total is not None
    seen = (total.diagonal() > 0).nonzero().flatten()  # a positive semi-definite matrix is 0 beside a 0 of its diagonal
    if len(seen) == 0:
        return mean
    if len(seen) < len(total):
        total, right = total[seen][:, seen], right[seen]
    total.diagonal().add_(ridge * total.diagonal().mean())
    turned[seen] += _solved(total, right, merging)
    return _as_stored(turned, merging)


def _solved(matrix: Tensor, right: Tensor, merging: Merging) -> Tensor:
    """matrix⁻¹ right by Cholesky. Raises ValueError: an input that is, to float64, a combination of the others."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    left = (
        factor.diagonal().square() / matrix.diagonal()
    )  # of each input, the share that those before it do not explain
    if failed or left.min() < len(matrix) * torch.finfo(matrix.dtype).eps:
        raise ValueError(
            f"merge of {merging.name}: the {len(merging.present)} Gram matrices of {len(matrix)} inputs add up to a singular "
            "one, expected one of full rank; collect them from more tokens than inputs, or write off_diagonal=0.9 or ridge=1e-6"
        )
    return torch.cholesky_solve(right, factor)


def gradient_matching(
    merging: Merging,
    *,
    curvature: Literal["fisher", "hessian"] = "fisher",
    alpha: Positive = 1.0,
    damping: Positive = 1e-12,
) -> Tensor:
    """θ* = θ_0 + Σ_i α_i H̄⁻¹ (H_0 + H_i) τ_i, H̄ = H_0 + Σ_i α_i H_i, diagonal (arXiv:2310.12808). Returns fp32.

    α_i = alpha · w_i; the damping is part of H_0, so that entries without curvature get task arithmetic with λ = alpha. The
    sums are over branches: the seed is in H_0, whether or not it is a member. curvature: H is the Fisher's diagonal, as in the
    paper's own experiments and never below 0, or an estimate of the Hessian's, which for a network can be.
    Raises ValueError: see `Merging.statistic`; H̄ not above 0 somewhere.
    """
    base = merging.base()
    assert merging.seed is not None
    start = merging.statistic(curvature, "the seed", merging.seed).float() + damping
    moved, total = torch.zeros_like(base), start.clone()
    for name, member in merging.present:
        if name != SEED:
            own = merging.statistic(curvature, name, member).float()
            total.add_(own, alpha=alpha * member.weight)
            moved.add_((start + own) * (member.tensor.float() - base), alpha=alpha * member.weight)
    if not (total > 0).all():
        raise ValueError(
            f"merge of {merging.name}: H_0 + Σ α H is {total.min():.4g} somewhere, expected above 0: no minimum there; write "
            "curvature=fisher, or raise damping"
        )
    return moved.div_(total).add_(base)


class Solved(NamedTuple):
    """tensor: fp32. residual: ‖Σ C_i (θ_i − θ*)‖ / ‖Σ C_i θ_i‖. converged: whether that is at most the tolerance."""

    tensor: Tensor
    iterations: int
    residual: float
    converged: bool


def mats_solved(
    merging: Merging,
    *,
    curvature: Curvature = "kfac",
    iterations: Annotated[int, Field(ge=1)] = 100,
    init_scale: Scale = 0.3,
    tolerance: Positive = 1e-5,
    off_diagonal: Share = 1.0,
    floor: Positive = 1e-6,
    normalise: bool = True,
) -> Solved:
    """`mats` and what it took. A tensor that is averaged took no iterations."""
    if curvature in ("gram", "kfac") and merging.in_axis is None:
        return Solved(average(merging), 0, 0.0, True)
    start = _inputs_first(task_arithmetic(merging, scale=init_scale), merging)
    each = _operators(merging, curvature, off_diagonal, floor, normalise)
    right, whole = torch.zeros_like(start), torch.zeros_like(start)
    for apply, (_, member) in zip(each, merging.present, strict=True):
        theta = _inputs_first(member.tensor.float(), merging)
        right += apply(theta - start)
        whole += apply(theta)

    def total(flat: np.ndarray) -> np.ndarray:
        step, result = torch.from_numpy(flat).view(start.shape).to(start.device), torch.zeros_like(start)
        for apply in each:
            result += apply(step)
        return result.flatten().cpu().numpy()

    taken: list[None] = []
    wanted, size = right.flatten().cpu().numpy(), whole.norm().item() or right.norm().item() or 1.0
    linear: Any = LinearOperator  # its stub knows no matvec
    operator = linear((wanted.size, wanted.size), matvec=total, dtype=wanted.dtype)
    found, unfinished = cg(
        operator, wanted, rtol=0.0, atol=tolerance * size, maxiter=iterations, callback=lambda _: taken.append(None)
    )
    residual = float(np.linalg.norm(wanted - total(found))) / size
    moved = start + torch.from_numpy(found).view(start.shape).to(start.device)
    return Solved(_as_stored(moved, merging), len(taken), residual, unfinished == 0)


@wraps(mats_solved, assigned=("__annotations__",))
def mats(merging: Merging, **options: Any) -> Tensor:
    """(Σ_i C_i) θ* = Σ_i C_i θ_i by conjugate gradient, started from task arithmetic (arXiv:2312.04339). Returns fp32.

    curvature: C_i = w_i · identity | fisher, diagonal (floor and normalise as in `fisher`) | gram, G_i W | kfac, A_i W B_i, both
    factors' off-diagonals times `off_diagonal`. The last two average what is no linear's weight. init_scale: λ of the start.
    Stops after `iterations` or when the residual is at most tolerance · ‖Σ C_i θ_i‖ (scipy's rule, which the authors use);
    stopping early, or a singular Σ C, leaves the start where C says nothing. `mats_solved` also returns how far it came.
    Raises ValueError: no seed; see `Merging.statistic` and `fisher`.
    """
    return mats_solved(merging, **options).tensor


def _operators(
    merging: Merging, curvature: Curvature, off_diagonal: float, floor: float, normalise: bool
) -> list[Callable[[Tensor], Tensor]]:
    """x → C_i x of each member that is present, x (in, out) and float64."""

    def factor(key: str, name: str, member: Member) -> Tensor:
        return _shrunk(merging.statistic(key, name, member), off_diagonal)

    if curvature == "identity":
        return [partial(torch.mul, torch.tensor(member.weight).double()) for _, member in merging.present]
    if curvature == "fisher":
        weights = _fisher_weights(merging, normalise, floor)
        return [partial(torch.mul, _inputs_first(weight, merging)) for weight in weights]
    if curvature == "gram":
        return [partial(torch.matmul, m.weight * factor("gram", name, m)) for name, m in merging.present]
    sides = [(m.weight * factor("kfac_in", name, m), factor("kfac_out", name, m)) for name, m in merging.present]
    return [partial(_between, *pair) for pair in sides]


def _between(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    return left @ x @ right


def _shrunk(matrix: Tensor, off_diagonal: float) -> Tensor:
    """A float64 copy whose entries off the diagonal are `off_diagonal` times as large."""
    shrunk = matrix.to(torch.float64, copy=True).mul_(off_diagonal)
    shrunk.diagonal().copy_(matrix.diagonal())
    return shrunk


def _inputs_first(tensor: Tensor, merging: Merging) -> Tensor:
    """(in, out) of a linear's weight, in float64; any other tensor as it lies."""
    return (tensor.t() if merging.in_axis == 1 else tensor).double()


def _as_stored(tensor: Tensor, merging: Merging) -> Tensor:
    return (tensor.t() if merging.in_axis == 1 else tensor).float().contiguous()
