"""Which limit of the machine binds: matrix products, or memory; both measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from evals.benchmarks.sides import Bench

# Of a training step, bytes a parameter that must move at least: AdamW reads weight, gradient and two moments and writes all but
# the gradient, fp32; autocast reads it again and writes 2.
STEP_BYTES = 4 * 7 + 6
BINDS = 0.7  # the share of a limit below which it is not said to bind


def measure(config: Mapping[str, Any]) -> dict[str, float]:
    """FLOP/s of bf16 matrix products, bytes/s read and written by copying what no cache holds. config: `bytes`."""
    import torch

    from upcycle.machine import matmul_peak_flops

    source = torch.ones(config["bytes"], dtype=torch.uint8)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return {"matmul": matmul_peak_flops("bf16"), "memory": 2 * config["bytes"] / best}


def of_machine(bench: Bench) -> dict[str, float]:
    """`measure`, once a run."""
    if "limits" not in bench.known:
        size = 2**22 if bench.quick else 2**29
        bench.known["limits"] = bench.once("limits:measure", {"bytes": size})
    return bench.known["limits"]


def of_training(bench: Bench, about: Mapping[str, Any], *answers: Mapping[str, Any]) -> str:
    """Of a training step: its share of the matmul peak, measured just after it, and of what its weights alone must move.

    answers: of one round or several, whose medians count.
    """
    reached = median(about["flops_per_token"] * one["tokens_per_second"] / one["peak"] for one in answers)
    seconds, peak = (median(one[what] for one in answers) for what in ("seconds", "peak"))
    moved = STEP_BYTES * about["parameters"] / of_machine(bench)["memory"] / seconds
    return nearest(reached, moved) + f"; the matmul peak is {peak / 1e9:.0f} GFLOP/s"


def nearest(reached: float, moved: float) -> str:
    """Which of the two limits a step is near, in words. reached, moved: its shares of them."""
    told = {f"compute, {reached:.0%} of the matmul peak": reached}
    told[f"memory, whose copies of weights and moments take {moved:.0%} of the step"] = moved
    if max(told.values()) < BINDS:
        return f"neither of compute ({reached:.0%}) and memory ({moved:.0%}) binds"
    return f"nearest: {max(told, key=lambda one: told[one])}"


def of_memory(bench: Bench, bytes_per_second: float) -> str:
    memory = of_machine(bench)["memory"]
    return f"reads memory at {bytes_per_second / memory:.0%} of the {memory / 1e9:.1f} GB/s of a copy"
