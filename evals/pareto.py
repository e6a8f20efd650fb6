"""Quality against compute: which models no other one beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AXES = ("train_flops", "active_parameters")  # what a model's making took, and what its use takes


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names, cheapest first, of those that no other point dominates: (cost, quality), lower is better in both.

    A point dominates another if it is no worse in both and better in one; so equal points stand or fall together.
    """
    found: list[str] = []
    for name in sorted(points, key=points.__getitem__):
        if not found or points[name][1] < points[found[-1]][1] or points[name] == points[found[-1]]:
            found.append(name)
    return found


def pareto(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """{cost: `front`, and the models whose cost is `unknown`}, by perplexity of the trained average; the oracle is no model."""
    real = {name: model for name, model in models.items() if model["kind"] != "oracle"}
    return {
        cost: {
            "front": front(
                {
                    name: (model[cost], model["average"]["trained"]["perplexity"])
                    for name, model in real.items()
                    if model[cost] is not None
                }
            ),
            "unknown": [name for name, model in real.items() if model[cost] is None],
        }
        for cost in AXES
    }
