"""Which elements of a mixture's parameters belong to one expert; for phases that train some experts only.

A boolean mask has a parameter's shape with size 1 wherever it does not vary. Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.config import PhaseConfig
from upcycle.optim import trainable_names
from upcycle.pieces import Piece, dense_names, plan_pieces


def expert_masks(config: Any, shapes: dict[str, torch.Size], chosen: Sequence[int]) -> dict[str, Tensor]:
    """Of each tensor that holds the experts side by side (or one expert's alone): True where it is a chosen expert's.

    shapes: of all tensors of the mixture, by name. Tensors that all experts share are left out.
    """
    masks = {}
    for piece in plan_pieces(config, dense_names(config)):
        whole = piece.origin in ("merged", "mean") or piece.sublayer == "base"
        shared = whole or (piece.origin == "copied" and piece.expert is None)
        if piece.target not in shapes or shared:
            continue
        shape = shapes[piece.target]
        if piece.origin == "copied":
            masks[piece.target] = torch.full([1] * len(shape), piece.expert in chosen)
        elif piece.origin == "fresh":  # a router's rows
            rows = torch.tensor([expert in chosen for expert in range(config.num_experts)])
            masks[piece.target] = rows.view(-1, *[1] * (len(shape) - 1))
        else:
            masks[piece.target] = small(_stacked_mask(piece, shape, config.num_experts, chosen))
    return masks


def _stacked_mask(piece: Piece, shape: torch.Size, num_experts: int, chosen: Sequence[int]) -> Tensor:
    """Ones stacked for the chosen experts, zeros for the others: right for every layout that `stack` knows."""
    assert piece.stack is not None and piece.unstack is not None
    empty = torch.zeros(shape, dtype=torch.bool)
    parts = [
        [torch.full_like(part, expert in chosen) for part in piece.unstack(empty, expert)]
        for expert in range(num_experts)
    ]
    mask = piece.stack(parts)
    assert mask.shape == shape, f"{piece.target}: stacked masks have shape {tuple(mask.shape)}, expected {tuple(shape)}"
    return mask


def small(mask: Tensor) -> Tensor:
    """The same mask with size 1 in every dimension along which it does not vary."""
    for dim in range(mask.dim()):
        first = mask.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(mask), mask):
            mask = first
    return mask.clone()


def phase_masks(model: nn.Module, phase: PhaseConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Masks of the parameters that `phase` trains in part, or not at all; and those that it trains whole beside them.

    Raises ValueError: `phase.experts` has no effect on what is trained.
    """
    if not phase.experts:
        return {}, []
    config: Any = model.config
    if config.attention_experts is not None:
        raise ValueError(
            f"phases: experts={list(phase.experts)}: the attention has experts of its own here "
            f"({', '.join(config.attention_experts)}), so these names do not say which of those train; train by groups "
            "(trainable, frozen) instead"
        )
    chosen = [config.experts.index(name) for name in phase.experts]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    trained = trainable_names(shapes, phase)
    masks = {name: mask for name, mask in expert_masks(config, shapes, chosen).items() if name in trained}
    if not any(mask.any() for mask in masks.values()):
        raise ValueError(
            f"phases: experts={list(phase.experts)} has no effect with trainable={list(phase.trainable)}, "
            f"frozen={list(phase.frozen)}: nothing of those experts is trained; add router or experts to trainable"
        )
    return masks, sorted(trained - masks.keys())
