"""Curvature-aware merging of experts (CAMEx, arXiv:2502.18821) as a layer: soft merging of experts that a learned map has bent.

    τ_e = E_e − B,    Ê = B + α Σ_e s_e M_e τ_e                                                        CA-merge, eq. (3)
    B' = B + α/E Σ_e M_e τ_e                                                                  the base's update, eq. (4)

for E routed experts and a base B. M = Σ_r (O₁ ⊗ O₂)_r ⊗ (I₁ ⊗ I₂)_r of each expert and matrix, the identity at first. As M is linear, M_e τ_e is
computed once a forward and merged by soft_merging.py for each decision. docs/camex.md derives the gradients.
Shapes: E experts, P matrices side by side in one tensor (gate and up), R rank, O = o₁ o₂ rows, I = i₁ i₂ columns of a matrix.
This file travels inside checkpoints as remote code: it imports other such files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kronecker import map_shapes
from .kronecker_map import apply_map, parts_of_name
from .routing import Routing
from .soft_merging import Runs, SoftMergedExperts, Weights, merged


def without(tensor: Tensor, expert: int | None, dim: int) -> Tensor:
    """The same with zeros in one expert's place, so that sums over experts do not know it."""
    if expert is None:
        return tensor
    return tensor.index_fill(dim, torch.tensor([expert], device=tensor.device), 0)


def elected(tau: Tensor) -> Tensor:
    """τ_e where its sign is that of Σ_e τ_e, else 0 (TIES' election without its trimming). tau (..., E, ·, ·)."""
    return tau * (tau * tau.sum(-3, keepdim=True) > 0)


def register_factors(module: nn.Module, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The parameters of M for stacked weights of these shapes: curvature_up_out1, ... They lie on the module whose forward
    reads them, because ZeRO-3 gathers a module's own."""
    if config.combine["curvature"] == "none":
        return
    for name, shape in shapes.items():
        if not name.endswith("bias"):
            matrices = 2 if name == "gate_up_proj" else 1
            experts, rows, columns = shape
            sizes = (config.combine["rank"], experts, matrices, rows // matrices, columns)
            for factor, size in map_shapes(config.combine["curvature"], *sizes).items():
                module.register_parameter(f"curvature_{side_of(name)}_{factor}", nn.Parameter(torch.empty(size)))


def side_of(name: str) -> str:
    return "down" if name.startswith("down") else "up"


class SharedCurvature(nn.Module):
    """One M for all layers (share: all). Its forward hands out copies, which outlive what ZeRO-3 has gathered for it."""

    def __init__(self, config: Any, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        register_factors(self, config, shapes)

    def forward(self) -> dict[str, Tensor]:
        return {name: one.clone() for name, one in self.named_parameters()}


def shared_curvature(decoder: Any) -> SharedCurvature | None:
    """The map of a whole model, if its layers share one. decoder: UpcycledModel."""
    config = decoder.config
    if config.combine["share"] == "layer" or config.combine["curvature"] == "none":
        return None
    shapes = next(module.shapes for module in decoder.modules() if isinstance(module, CamexExperts))
    return SharedCurvature(config, shapes)


class CamexExperts(SoftMergedExperts):
    """Soft merging of B + α M τ. The base is the layer's own, or comes from the layer before (`update`):

    travel            B of the next layer = B + α/E Σ_e M_e τ_e: it travels through the layers, as published
    previous_merged   B of the next layer = this layer's merged expert, decision by decision
    per_layer         each layer updates its own base by that rule before it merges
    """

    def __init__(self, config: Any, mlp: nn.Module, layer: int):
        super().__init__(config, mlp, layer)
        self.combine, self.layer = config.combine, layer
        place = config.routed.index(layer)
        self.following = config.routed[place + 1] if place + 1 < len(config.routed) else -1
        self.receives = place > 0 and config.combine["update"] in ("travel", "previous_merged")
        if config.combine["share"] == "layer":
            register_factors(self, config, self.shapes)

    def bent(self, base: Weights | None, trace: Any) -> Weights:
        """α M_e τ_e of every expert; a base of each decision, (N, O, I), makes it (N, E, O, I). Biases have M = I."""
        of_all = trace.curvature if self.combine["share"] == "all" else dict(self.named_parameters(recurse=False))
        found = {}
        for name in self.shapes:
            tau = getattr(self, name)
            if base is not None:
                tau = tau - (base[name].unsqueeze(1) if base[name].dim() == tau.dim() else base[name])
            if self.training and self.combine["drop"]:
                tau = F.dropout(tau, self.combine["drop"])
            tau = without(tau, trace.removed_expert(f"ffn.{self.layer}"), -2 if name.endswith("bias") else -3)
            if name.endswith("bias"):
                found[name] = self.combine["alpha"] * tau
                continue
            if self.combine["election"] == "sign":
                tau = elected(tau)
            own = {parts_of_name(key)[1]: one for key, one in of_all.items() if f"curvature_{side_of(name)}_" in key}
            found[name] = self.combine["alpha"] * (apply_map(own, tau) if own else tau)
        return found

    def own_base(self) -> Weights | None:
        """The base that is stored here; zeros where there is none and it is to move."""
        base, experts = self.stored()
        if base is None and self.combine["update"] != "none":
            return {name: torch.zeros_like(one[0]) for name, one in experts.items()}
        return base

    def weights(self, trace: Any) -> tuple[Weights | None, Weights]:
        """(B, α M τ) of this layer, and the next one's base where it comes from here."""
        update = self.combine["update"]
        base = trace.bases[self.layer] if self.receives else self.own_base()
        delta = self.bent(base, trace)
        if update in ("travel", "per_layer"):
            assert base is not None
            count = self.num_experts - (trace.removed_expert(f"ffn.{self.layer}") is not None)
            moved = {name: one + delta[name].sum(0) / count for name, one in base.items()}
            if update == "per_layer":
                return moved, self.bent(moved, trace)
            trace.bases.setdefault(self.following, moved)  # a recomputation finds the first one's
        return base, delta


class ChainedExperts(CamexExperts):
    """`update: previous_merged`. Each decision has a base of its own from the second layer on, (N, O, I), and so a map to apply: memory
    and work grow with decisions · experts · matrices, where the other forms need decisions · matrices, in chunks."""

    def decided(self, hidden_TD: Tensor, routing: Routing, base: Weights | None, delta: Weights, trace: Any) -> Tensor:
        assert routing.run is not None and base is not None
        runs = Runs(routing.run)
        gates_NE = runs.gates(routing, self.num_experts)
        with torch.autocast(hidden_TD.device.type, enabled=False):  # a base is handed on in the weights' own dtype
            made = {name: self.merged_of(gates_NE.to(one.dtype), base[name], one) for name, one in delta.items()}
        trace.bases.setdefault(self.following, made)

        def linear(name: str, x_NLI: Tensor) -> Tensor:
            out_NLO = torch.matmul(x_NLI, made[name].mT)
            bias = made.get(f"{name}_bias")
            return out_NLO if bias is None else out_NLO + bias.unsqueeze(1).to(out_NLO.dtype)

        return runs.tokens(self.feed_forward(linear, runs.block(hidden_TD)))

    def merged_of(self, gates_NE: Tensor, base: Tensor, delta: Tensor) -> Tensor:
        """(N, ...): of each decision, from a base that is every decision's own where it comes from the layer before."""
        return (
            base + torch.einsum("ne,ne...->n...", gates_NE, delta) if self.receives else merged(gates_NE, base, delta)
        )


def merging_experts(config: Any, mlp: nn.Module, layer: int) -> SoftMergedExperts | None:
    """The experts of a layer whose weights are merged: plain soft merging unless the config says more. None: outputs are combined."""
    if not config.merges_weights:
        return None
    if not config.bends:
        return SoftMergedExperts(config, mlp, layer)
    return (ChainedExperts if config.combine["update"] == "previous_merged" else CamexExperts)(config, mlp, layer)
