"""Whether two sides compute the same: without that, their times are not compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evals.benchmarks.sides import SideFailed

LOGITS = 1e-4  # share of the largest logit, in fp32, as where a mixture is exported
LOSS = 3e-4  # share of the first step's cross-entropy, in bf16
GRADIENTS = 0.05  # of the norms of some rows of the embedding's first gradient, in bf16; of another batch they are off by 0.3 and more


def same_logits(ours: Mapping[str, Any], peer: Mapping[str, Any], who: str) -> None:
    """Raises SideFailed."""
    one, other = ours["probe"], peer["probe"]
    if len(one) != len(other):
        raise SideFailed(f"{who} gives {len(other)} logits where ours gives {len(one)}")
    off = max(abs(a - b) for a, b in zip(one, other, strict=True)) / max(map(abs, one))
    if not off <= LOGITS:
        raise SideFailed(f"{who}: its logits differ from ours by {off:.1e} of the largest, expected at most {LOGITS}")


def same_first_step(ours: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]], who: str) -> None:
    """Loss and gradients of the first step, on one batch, by the code that is timed. Raises SideFailed."""
    one, other = ours[0]["first_loss"][0], peer[0]["first_loss"][0]
    if not abs(one - other) <= LOSS * abs(one):
        raise SideFailed(
            f"{who}: its first step has {other:.4f} nats a token, ours {one:.4f}; they train on something else"
        )
    rows, others = ours[0]["rows"], peer[0]["rows"]
    off = math.dist(rows, others) / math.hypot(*rows)
    if not off <= GRADIENTS:
        raise SideFailed(
            f"{who}: gradients of its first step are off by {off:.1%} of ours, expected at most {GRADIENTS:.0%}"
        )


def same_size(mixture: Mapping[str, Any], dense: Mapping[str, Any]) -> None:
    """The dense model has the mixture's active parameters, routers left out. Raises SideFailed."""
    wanted = mixture["active_parameters"] - mixture["routers"]
    if dense["parameters"] != wanted:
        raise SideFailed(f"the dense model has {dense['parameters']:,} parameters, the mixture {wanted:,} active ones")


def as_planned(side: Mapping[str, Any]) -> None:
    """cost.py counts the parameters that are there, or its FLOPs mean nothing. Raises SideFailed."""
    if side["parameters"] != side["planned_parameters"]:
        raise SideFailed(
            f"cost.py plans {side['planned_parameters']:,} parameters, the model has {side['parameters']:,}"
        )
