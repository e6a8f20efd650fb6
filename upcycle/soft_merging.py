"""Feed-forward experts that are merged in weight space, once for each decision of a router (Lory, arXiv:2405.03133).

    Ê_n = B + Σ_e g_ne (E_e − B),        y_t = Ê_n(t)(x_t)

for the base expert B, which nobody routes to; without one, Ê_n = Σ_e g_ne E_e. A token costs one feed-forward; a decision costs one pass
over the experts' weights, so decisions are shared by the tokens of a segment.
Shapes: T tokens, N decisions, L tokens of the longest, D hidden, F feed-forward, E experts, O × I a matrix.
This file travels inside checkpoints as remote code: it imports `.families` and `.routing` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .families import ACTIVATIONS, Family, family_of, stacked_shapes
from .routing import Routing

CHUNK_BYTES = (
    64 * 2**20
)  # of merged weights that are there at once, forward and backward; one decision's at least. Generation keeps more (KeptWeights)

Weights = dict[str, Tensor]  # of one feed-forward, or with a dimension in front, by the names that StackedExperts has


def _chunks(gates_NE: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Decisions whose merged matrices are built together."""
    size = max(1, CHUNK_BYTES // (matrix.numel() * matrix.element_size()))
    return (slice(start, start + size) for start in range(0, len(gates_NE), size))


def merged(gates_NE: Tensor, base_OI: Tensor | None, delta_EOI: Tensor) -> Tensor:
    """(N, O, I): base + Σ_e g_ne Δ_e."""
    flat = (
        gates_NE @ delta_EOI.flatten(1)
        if base_OI is None
        else torch.addmm(base_OI.flatten(), gates_NE, delta_EOI.flatten(1))
    )
    return flat.view(len(gates_NE), *delta_EOI.shape[1:])


class _MergedLinear(torch.autograd.Function):
    """x_n Ŵ_nᵀ with Ŵ_n = base + Σ_e g_ne Δ_e. Merged matrices are built chunk by chunk and built again in backward:

    dx_n = dy_n Ŵ_n,  dŴ_n = dy_nᵀ x_n,  dΔ_e = Σ_n g_ne dŴ_n,  dbase = Σ_n dŴ_n,  dg_ne = ⟨dŴ_n, Δ_e⟩.
    """

    @staticmethod
    def forward(ctx: Any, x_NLI: Tensor, gates_NE: Tensor, base_OI: Tensor | None, delta_EOI: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x_NLI, gates_NE, base_OI, delta_EOI)
        out_NLO = x_NLI.new_empty(*x_NLI.shape[:2], delta_EOI.shape[1])
        for rows in _chunks(gates_NE, delta_EOI[0]):
            torch.bmm(x_NLI[rows], merged(gates_NE[rows], base_OI, delta_EOI).mT, out=out_NLO[rows])
        return out_NLO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NLO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NLI, gates_NE, base_OI, delta_EOI = ctx.saved_tensors
        of_x, of_gates, of_base, of_delta = ctx.needs_input_grad
        dx = torch.empty_like(x_NLI) if of_x else None
        dgates = torch.empty_like(gates_NE) if of_gates else None
        wide = torch.promote_types(delta_EOI.dtype, torch.float32)  # sums over chunks lose nothing
        dbase = torch.zeros_like(base_OI, dtype=wide) if of_base else None
        ddelta = torch.zeros_like(delta_EOI, dtype=wide) if of_delta else None
        for rows in _chunks(gates_NE, delta_EOI[0]):
            dy, gates = dy_NLO[rows], gates_NE[rows]
            if dx is not None:
                dx[rows] = dy @ merged(gates, base_OI, delta_EOI)
            if not (of_gates or of_base or of_delta):
                continue
            dmerged = (dy.mT @ x_NLI[rows]).flatten(1)
            if dgates is not None:
                dgates[rows] = dmerged @ delta_EOI.flatten(1).T
            if dbase is not None:
                dbase += dmerged.sum(0).view_as(dbase)
            if ddelta is not None:
                ddelta += (gates.T @ dmerged).view_as(ddelta)
        return (
            dx,
            dgates,
            None if dbase is None else dbase.to(base_OI.dtype),
            None if ddelta is None else ddelta.to(delta_EOI.dtype),
        )


def merged_linear(
    x_NLI: Tensor, gates_NE: Tensor, base: Tensor | None, delta: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(N, L, O): each decision's tokens through its own merged linear. base (O, I), delta (E, O, I); bias (N, O).

    Memory: CHUNK_BYTES of merged matrices at once. Under autocast in its dtype, as any linear.
    """
    kind = x_NLI.device.type
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
        x_NLI, gates_NE, delta = x_NLI.to(wanted), gates_NE.to(wanted), delta.to(wanted)
        base = None if base is None else base.to(wanted)
    out_NLO: Any = _MergedLinear.apply(x_NLI, gates_NE.to(delta.dtype), base, delta)  # pyright: ignore[reportOptionalMemberAccess]
    return out_NLO if bias is None else out_NLO + bias.unsqueeze(1).to(out_NLO.dtype)


class KeptWeights(NamedTuple):
    """What was merged for the last token of each sequence of a generation: rows of `weights` by the gates that merged them. tokens: in the cache."""

    tokens: int
    gates_BE: Tensor
    weights: Weights

    def rows(self, index_B: Tensor) -> KeptWeights:
        """For sequences that moved in the batch: beam search."""
        moved = {name: one.index_select(0, index_B.to(one.device)) for name, one in self.weights.items()}
        return KeptWeights(self.tokens, self.gates_BE.index_select(0, index_B.to(self.gates_BE.device)), moved)


class Runs:
    """Tokens that share a decision lie side by side; as one block (N, L, ·), the shorter runs filled up with zeros."""

    def __init__(self, run_T: Tensor):
        """run_T: the number of each token's decision; a decision's tokens follow one another."""
        _, self.row_T, self.counts_N = torch.unique_consecutive(run_T, return_inverse=True, return_counts=True)
        self.start_N = self.counts_N.cumsum(0) - self.counts_N
        self.place_T = torch.arange(len(run_T), device=run_T.device) - self.start_N[self.row_T]
        self.longest = int(self.counts_N.max())
        self.whole = len(self.counts_N) * self.longest == len(run_T)

    def block(self, x_TD: Tensor) -> Tensor:
        shape = (len(self.counts_N), self.longest, x_TD.shape[-1])
        return x_TD.view(shape) if self.whole else x_TD.new_zeros(shape).index_put((self.row_T, self.place_T), x_TD)

    def tokens(self, y_NLD: Tensor) -> Tensor:
        return y_NLD.flatten(0, 1) if self.whole else y_NLD[self.row_T, self.place_T]

    def gates(self, routing: Routing, num_experts: int) -> Tensor:
        """(N, E): each decision's gate of every expert."""
        chosen_NK, gates_NK = routing.experts[self.start_N], routing.gates[self.start_N]
        return gates_NK.new_zeros(len(self.counts_N), num_experts).scatter_add(1, chosen_NK, gates_NK)


class SoftMergedExperts(nn.Module):
    """The MLPs of all experts, as StackedExperts has them, and the base expert's: base_gate_up_proj (2F, D), base_down_proj
    (D, F), ... A base that is not trained is a buffer: no phase, optimizer or adapter can train it.

    mlp: the family's own, used for its activation and shapes only.
    """

    def __init__(self, config: Any, mlp: nn.Module, layer: int):
        super().__init__()
        family: Family = family_of(config.seed)
        self.num_experts, self.has_gate = config.num_experts, family.gated
        self.kept_as, self.chained = f"merged.{layer}", config.combine["update"] in ("travel", "previous_merged")
        self.act_fn = next(getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name))
        self.shapes = stacked_shapes(mlp, family, config.num_experts, 1)
        self.has_base = config.has_base(layer)
        self.base_first = (
            config.rule("ffn", layer).first == "base"
        )  # tokens that nothing is decided about take the base alone
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            if self.has_base and config.combine["train_base"]:
                self.register_parameter(f"base_{name}", nn.Parameter(torch.empty(shape[1:])))
            elif self.has_base:
                self.register_buffer(f"base_{name}", torch.empty(shape[1:]))

    def stored(self) -> tuple[Weights | None, Weights]:
        """(the base expert's weights, if it has its own; those of all experts)."""
        base = {name: getattr(self, f"base_{name}") for name in self.shapes} if self.has_base else None
        return base, {name: getattr(self, name) for name in self.shapes}

    def weights(self, trace: Any) -> tuple[Weights | None, Weights]:
        """(B, Δ): what is merged is B + Σ_e g_e Δ_e. Without a base B is None and Δ the experts."""
        base, experts = self.stored()
        return base, experts if base is None else {name: one - base[name] for name, one in experts.items()}

    def forward(self, hidden_TD: Tensor, routing: Routing, trace: Any) -> Tensor:
        if self.generates(hidden_TD, trace):
            return self.next_token(hidden_TD, routing, trace)
        with torch.autocast(
            hidden_TD.device.type, enabled=False
        ):  # differences are small beside the weights they are of
            base, delta = self.weights(trace)
        decided_T = routing.decided
        if base is None or decided_T is None or not self.base_first or decided_T.all():
            return self.decided(hidden_TD, routing, base, delta, trace)
        first_TD = self.feed_forward(
            lambda name, x: F.linear(x, base[name], base.get(f"{name}_bias")), hidden_TD[~decided_T]
        )
        out_TD = first_TD.new_zeros(hidden_TD.shape).index_put((~decided_T,), first_TD)
        if not decided_T.any():
            return out_TD
        parts: Any = Routing(*(None if part is None else part[decided_T] for part in routing))  # pyright: ignore[reportArgumentType]
        return out_TD.index_put((decided_T,), self.decided(hidden_TD[decided_T], parts, base, delta, trace))

    def generates(self, hidden_TD: Tensor, trace: Any) -> bool:
        """Whether this is a step of cached generation whose merged weights can be kept for the next one: a token of each sequence, no more sequences
        than experts (so what is kept is no larger than they are), and no base that other layers need to hear of."""
        if not trace.earlier or not trace.kept or torch.is_grad_enabled() or self.chained or trace.removed:
            return False
        sequences = len(next(iter(trace.kept.values())).count_B)  # of the first router that remembers
        return len(hidden_TD) == sequences <= self.num_experts

    def next_token(self, hidden_BD: Tensor, routing: Routing, trace: Any) -> Tensor:
        """One token of each sequence, through weights that are merged only for those whose decision is a new one."""
        gates_BE = routing.gates.new_zeros(len(hidden_BD), self.num_experts).scatter_add(
            1, routing.experts, routing.gates
        )
        if self.base_first and routing.decided is not None:
            gates_BE = gates_BE * routing.decided.unsqueeze(1)  # the base alone
        before, tokens = trace.earlier.get(self.kept_as), next(iter(trace.kept.values())).tokens
        if before is None or next(iter(before.weights.values())).dtype != self.merges_in(hidden_BD):
            weights = self.merge(gates_BE, trace)
        elif (new_B := (before.gates_BE != gates_BE).any(1)).any():
            found = self.merge(gates_BE[new_B], trace)
            rows_B = new_B.nonzero().squeeze(1)
            weights = {name: one.index_copy(0, rows_B, found[name]) for name, one in before.weights.items()}
        else:
            weights = before.weights
        trace.kept[self.kept_as] = KeptWeights(tokens, gates_BE, weights)

        def linear(name: str, x_B1I: Tensor) -> Tensor:
            out_B1O = torch.bmm(x_B1I, weights[name].mT)
            bias = weights.get(f"{name}_bias")
            return out_B1O if bias is None else out_B1O + bias.unsqueeze(1).to(out_B1O.dtype)

        return self.feed_forward(linear, hidden_BD.unsqueeze(1)).squeeze(1)

    def merges_in(self, hidden: Tensor) -> torch.dtype:
        """The dtype of merged matrices: autocast's, where it is on, as `merged_linear` has it."""
        kind = hidden.device.type
        own = next(iter(self.stored()[1].values())).dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own

    def merge(self, gates_NE: Tensor, trace: Any) -> Weights:
        """B + Σ_e g_ne Δ_e for each of N sequences."""
        wanted = self.merges_in(gates_NE)
        with torch.autocast(gates_NE.device.type, enabled=False):
            base, delta = self.weights(trace)
            delta = {name: one if name.endswith("bias") else one.to(wanted) for name, one in delta.items()}
            base = None if base is None else {name: one.to(delta[name].dtype) for name, one in base.items()}
            return {
                name: merged(gates_NE.to(one.dtype), None if base is None else base[name], one)
                for name, one in delta.items()
            }

    def decided(self, hidden_TD: Tensor, routing: Routing, base: Weights | None, delta: Weights, trace: Any) -> Tensor:
        """Tokens through the merged feed-forwards of their decisions."""
        assert routing.run is not None
        runs = Runs(routing.run)
        gates_NE = runs.gates(routing, self.num_experts)

        def linear(name: str, x_NLI: Tensor) -> Tensor:
            bias = None
            if (of_experts := delta.get(f"{name}_bias")) is not None:
                bias = merged(gates_NE.to(of_experts.dtype), None if base is None else base[f"{name}_bias"], of_experts)
            return merged_linear(x_NLI, gates_NE, None if base is None else base[name], delta[name], bias)

        return runs.tokens(self.feed_forward(linear, runs.block(hidden_TD)))

    def feed_forward(self, linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """The family's feed-forward with `linear(name, x)` in place of its linears."""
        hidden = linear("gate_up_proj" if self.has_gate else "up_proj", x)
        if self.has_gate:
            gate, up = hidden.chunk(2, -1)
            hidden = self.act_fn(gate) * up
        else:
            hidden = self.act_fn(hidden)
        return linear("down_proj", hidden)
