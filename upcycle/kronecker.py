"""The sizes of a Kronecker-factored map on a matrix, and what applying it costs. No torch.

This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

from math import prod

FACTORS = ("out1", "out2", "in1", "in2")
LARGEST_FACTOR = 512
OF_A_MERGE = "write merge=camex's curvature=fisher, or another method for its role (merge.roles)"
OTHERWISE = "use curvature=none, or a model whose sizes have nearer divisors"


def factor_pair(size: int, otherwise: str = OTHERWISE) -> tuple[int, int]:
    """(a, b), a · b = size, nearest the square root, a ≤ b: 768 is 24 · 32. Raises ValueError: b is above LARGEST_FACTOR; otherwise: what to do
    then."""
    small = next(one for one in range(int(size**0.5), 0, -1) if size % one == 0)
    if size // small > LARGEST_FACTOR:
        raise ValueError(
            f"curvature: a dimension of {size} splits into {small} × {size // small} at best, expected factors of at most {LARGEST_FACTOR}; {otherwise}"
        )
    return small, size // small


def map_shapes(
    kind: str, rank: int, experts: int, matrices: int, rows: int, columns: int, otherwise: str = OTHERWISE
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of M for (E, P·rows, columns), by name. kind: "kronecker"; "linear", the control; "none"."""
    if kind == "none":
        return {}
    if kind == "linear":
        return {"linear": (experts, matrices, columns, columns)}
    sizes = (*factor_pair(rows, otherwise), *factor_pair(columns, otherwise))
    return {name: (experts, matrices, rank, size, size) for name, size in zip(FACTORS, sizes, strict=True)}


def map_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def map_flops(shapes: dict[str, tuple[int, ...]], rows: int, columns: int) -> int:
    """Of M τ for all experts and matrices: every factor is one pass over the matrix, for each term."""
    return sum(2 * prod(shape[:-1]) * rows * columns for shape in shapes.values())
