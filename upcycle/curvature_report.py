"""What theory says of a model's curvature against what is measured: two estimates of one diagonal, and task arithmetic's error.

Where a model predicts its text as it claims to, the expected Hessian is the Fisher matrix, and the two agree (arXiv:1412.1193,
section 9); the Fisher's is never below 0, Hutchinson's can be, by noise or because there is no minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from upcycle.checkpoint import Checkpoint
from upcycle.merge_report import task_arithmetic_error
from upcycle.merger import Statistics
from upcycle.roles import UNKNOWN, TensorFacts

DAMPINGS = (1e-12, 1e-2, 1.0)  # the paper's, and shares of the mean of H_0
RANKED = 100_000  # entries of a role whose ranks are compared, evenly spread over its tensors


def compare_diagonals(
    fisher: Statistics, hessian: Statistics, facts: Mapping[str, TensorFacts]
) -> dict[str, dict[str, Any]]:
    """For each role, and "all": entries; trace of either diagonal; the share of entries of the Hessian's that are below 0; the rank
    correlation of the two (Spearman), None where one of them is constant.

    Raises ValueError: estimates of different tensors.
    """
    names = sorted(fisher.tensors("fisher"))
    if names != sorted(hessian.tensors("hessian")):
        raise ValueError("the two estimates are of different tensors, expected those of one model; measure both again")
    of_role: dict[str, list[str]] = {}
    for name in names:
        of_role.setdefault(facts.get(name, UNKNOWN).role, []).append(name)
    return {role: _compared(fisher, hessian, some) for role, some in [*sorted(of_role.items()), ("all", names)]}


def _compared(fisher: Statistics, hessian: Statistics, names: list[str]) -> dict[str, Any]:
    entries, negative, traces = 0, 0, {"fisher": 0.0, "hessian": 0.0}
    ranked: dict[str, list[Tensor]] = {"fisher": [], "hessian": []}
    sizes = {name: fisher.of(("fisher",), name)["fisher"].numel() for name in names}
    step = max(1, sum(sizes.values()) // RANKED)
    for name in names:
        for kind, statistics in (("fisher", fisher), ("hessian", hessian)):
            flat = statistics.of((kind,), name)[kind].flatten()
            traces[kind] += flat.double().sum().item()
            ranked[kind].append(flat[::step])
            negative += int((flat < 0).sum())
        entries += sizes[name]
    a, b = (torch.cat(parts).double().numpy() for parts in ranked.values())
    ranks: Any = spearmanr
    constant = a.min() == a.max() or b.min() == b.max()
    return {
        "entries": entries,
        "trace": traces,
        "below_0": negative / entries,
        "rank_correlation": None if constant else float(ranks(a, b).statistic),
    }


def in_words(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each role."""
    lines = [f"{'tensors':10} {'trace F':>10} {'trace H':>10} {'H below 0':>10} {'rank corr.':>10}"]
    for role, row in found.items():
        rank = "–" if row["rank_correlation"] is None else f"{row['rank_correlation']:.2f}"
        traces = [f"{row['trace'][kind]:10.3g}" for kind in ("fisher", "hessian")]
        lines.append(f"{role:10} {' '.join(traces)} {row['below_0']:10.0%} {rank:>10}")
    return lines


def compare_error(
    models: Mapping[str, Checkpoint],
    target: Checkpoint,
    fisher: Statistics,
    gradients: Mapping[str, tuple[Statistics, Statistics]],
    scale: float,
    facts: Mapping[str, TensorFacts],
) -> dict[str, dict[str, Any]]:
    """Task arithmetic's error, θ* − θ_TA with θ* = `target`, as measured and as `task_arithmetic_error` predicts it.

    models: the seed ("seed") and the branches. fisher: the seed's, as H_0. gradients: of each branch's loss, at the target and at
    the branch. For each role, and "all": ‖measured‖, and for each damping of H_0 ‖predicted‖ and the cosine of the two.
    """
    mean = fisher_mean(fisher)
    dampings = {f"{one:g}": one if one < 1e-9 else one * mean for one in DAMPINGS}
    sums: dict[str, dict[str, list[float]]] = {}
    for name in sorted(fisher.tensors("fisher")):
        measured = _missed(models, target, scale, name).double()
        for label, damping in dampings.items():
            each = {
                branch: tuple(one.of(("gradient",), name)["gradient"] for one in both)
                for branch, both in gradients.items()
            }
            alphas = dict.fromkeys(gradients, scale)
            predicted = task_arithmetic_error(fisher.of(("fisher",), name)["fisher"], each, alphas, damping).double()  # pyright: ignore
            found = [(measured**2).sum().item(), (predicted**2).sum().item(), (measured * predicted).sum().item()]
            for role in (facts.get(name, UNKNOWN).role, "all"):
                own = sums.setdefault(role, {}).setdefault(label, [0.0, 0.0, 0.0])
                own[:] = [a + b for a, b in zip(own, found, strict=True)]
    order = [*sorted(role for role in sums if role != "all"), "all"]
    return {role: {label: _norms(*sums[role][label]) for label in dampings} for role in order}


def fisher_mean(fisher: Statistics) -> float:
    """Mean entry of a Fisher's diagonal over all tensors."""
    every = [fisher.of(("fisher",), name)["fisher"] for name in fisher.tensors("fisher")]
    return sum(one.double().sum().item() for one in every) / sum(one.numel() for one in every)


def _missed(models: Mapping[str, Checkpoint], target: Checkpoint, scale: float, name: str) -> Tensor:
    seed = models["seed"].get(name).float()
    moved = sum(
        (model.get(name).float() - seed for who, model in models.items() if who != "seed"), start=torch.zeros_like(seed)
    )
    return target.get(name).float() - seed - scale * moved


def _norms(measured: float, predicted: float, product: float) -> dict[str, float | None]:
    size = (measured * predicted) ** 0.5
    return {"measured": measured**0.5, "predicted": predicted**0.5, "cosine": product / size if size else None}


def error_in_words(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each role and damping."""
    lines = [f"{'tensors':10} {'damping':>8} {'measured':>10} {'predicted':>10} {'cosine':>7}"]
    for role, of_damping in found.items():
        for label, row in of_damping.items():
            cosine = "–" if row["cosine"] is None else f"{row['cosine']:.2f}"
            lines.append(f"{role:10} {label:>8} {row['measured']:10.3g} {row['predicted']:10.3g} {cosine:>7}")
    return lines
