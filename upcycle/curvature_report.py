"""Two estimates of one diagonal side by side: the Fisher's, and Hutchinson's of the Hessian.

Where a model predicts its text as it claims to, the expected Hessian is the Fisher matrix, and the two agree (arXiv:1412.1193,
section 9); the Fisher's is never below 0, Hutchinson's can be, by noise or because there is no minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from upcycle.merger import Statistics
from upcycle.roles import UNKNOWN, TensorFacts

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
