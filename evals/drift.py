"""How far training moved each expert from what it was assembled as, its branch's own tensors.

        d = ‖trained − assembled‖ / ‖assembled‖          over all of an expert's tensors in a layer

Tensor by tensor: two of them are in memory at a time. Shapes: L layers, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.families import family_of
from upcycle.pieces import Piece, dense_names, plan_pieces


def drift(assembled: Path, trained: Path) -> dict[str, Any]:
    """Of each routed sublayer `experts`, `layers` and `distance`, [layer][expert]; "router", the same of the rows of its
    router; and "rest", one number for all that experts share. None where there was nothing: routers that began at 0.

    Raises ValueError: the two are not of one mixture.
    """
    config, before, after = UpcycledConfig.from_pretrained(trained), Checkpoint(assembled), Checkpoint(trained)
    moved, size = defaultdict(float), defaultdict(float)
    for piece in plan_pieces(config, dense_names(config)):
        if piece.origin == "fresh" and piece.target.endswith(".bias"):  # balance, not what is learned
            continue
        for name, checkpoint in (("assembled", before), ("trained", after)):
            if piece.target not in checkpoint.files or checkpoint.shape(piece.target) != before.shape(piece.target):
                raise ValueError(
                    f"{checkpoint.directory}: the {name} mixture has no {piece.target} of the other's shape; give the mixture "
                    "that the trained one started from"
                )
        old, new = before.get(piece.target).double(), after.get(piece.target).double()
        for key, first, second in _parts(piece, config, old, new):
            moved[key] += (second - first).square().sum().item()
            size[key] += first.square().sum().item()

    def distance(*key: Any) -> float | None:
        return math.sqrt(moved[key] / size[key]) if size[key] else None

    found: dict[str, Any] = {"rest": distance("rest")}
    found |= {name: distance(name) for name in ("base", "curvature") if size[(name,)]}
    for part in config.parts:
        experts = range(len(config.names_of(part)))
        found[part] = {
            "experts": list(config.names_of(part)),
            "layers": config.routed,
            "distance": [[distance(part, layer, expert) for expert in experts] for layer in config.routed],
            "router": [[distance(f"{part} router", layer, expert) for expert in experts] for layer in config.routed],
        }
    return found


def _parts(piece: Piece, config: UpcycledConfig, old: Tensor, new: Tensor) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """What of a tensor belongs to whom: ((sublayer, layer, expert), or a word for what all have, as assembled, as trained)."""
    family = family_of(config.seed)
    inside = piece.target.removeprefix(f"model.decoder.{family.layers}.")
    layer, _, name = inside.partition(".")
    part = "attention" if name.startswith(f"{family.attention}.") else "ffn"
    if piece.sublayer == "base" or ".curvature_" in piece.target:
        yield ("base" if piece.sublayer == "base" else "curvature",), old, new
    elif piece.origin == "mean":
        yield ("base",), old, new
    elif piece.origin == "stacked" and piece.unstack is not None:
        for expert in range(len(config.names_of(piece.sublayer))):
            for first, second in zip(piece.unstack(old, expert), piece.unstack(new, expert), strict=True):
                yield (piece.sublayer, int(layer), expert), first, second
    elif piece.origin == "fresh":
        for expert, (first, second) in enumerate(zip(old, new, strict=True)):
            yield (f"{part} router", int(layer), expert), first, second
    elif piece.expert is not None:
        yield (part, int(layer), piece.expert), old, new
    else:
        yield ("rest",), old, new
