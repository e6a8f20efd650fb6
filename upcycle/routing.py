"""Routers: logits -> (gates, experts). Pure functions in one table, a small module, and the trace of one forward.

Shapes: B batch, S sequence, T tokens (B·S), D hidden, E experts, K experts per token.
This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """One router's decision for T tokens: `logits` (T, E) in fp32, `gates` (T, K) in fp32, `experts` (T, K) int64."""

    logits: Tensor
    gates: Tensor
    experts: Tensor


class RoutingTrace:
    """What the routers of ONE forward saw and decided; it travels as a keyword through the decoder layers.

    It is never kept on a shared object: with gradient checkpointing a layer runs again during backward, and must then
    find the trace of its own forward. `forced` sends every token to that expert with gate 1, in every router.
    No dataclass: FSDP2 copies those on their way into a layer, and what the layer records would be lost.
    """

    def __init__(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, forced: int | None = None
    ):
        self.input_ids, self.attention_mask, self.forced = input_ids, attention_mask, forced
        self.routings: dict[str, Routing] = {}

    def record(self, name: str, routing: Routing) -> Routing:
        """Keep the first decision under `name`; a recomputation gets that one back and routes exactly the same."""
        return self.routings.setdefault(name, routing)

    def of(self, part: str) -> list[Routing]:
        """The decisions of `part` ("ffn" or "attention"), in layer order."""
        return [routing for name, routing in self.routings.items() if name.startswith(part + ".")]

    def valid_tokens(self) -> Tensor | None:
        """(B, S) bool: False on padding; None when nothing is padded or the ids are not known."""
        if self.attention_mask is None or self.attention_mask.dim() != 2 or self.input_ids is None:
            return None
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()  # with a cache the mask also covers the past


def topk_softmax(logits_TE: Tensor, top_k: int, gate_scale: str = "none") -> Routing:
    """`gates = softmax(topk(W x))`: the K largest logits, then a softmax over them (BTX, arXiv:2403.07816, eq. 3).

    Gates sum to 1. At K = 1 the gate is the constant 1 and carries no gradient to the router.
    """
    top, experts = logits_TE.topk(top_k, dim=-1)
    return Routing(logits_TE, top.softmax(-1), experts)


def softmax_topk(logits_TE: Tensor, top_k: int, gate_scale: str = "none") -> Routing:
    """`gates = topk(softmax(W x))` (BAM, arXiv:2408.08274, and Switch, arXiv:2101.03961), then `gate_scale`:

    none              the probabilities as they are; with a fresh router they sum to about K/E
    sum_to_one        g / Σ g; at K = 1 the constant 1
    straight_through  g / stop_gradient(Σ g): the value of sum_to_one, the gradient of g
    compensate        g · E/K
    """
    gates, experts = logits_TE.softmax(-1).topk(top_k, dim=-1)
    return Routing(logits_TE, GATE_SCALES[gate_scale](gates, logits_TE.shape[-1]), experts)


def soft(logits_TE: Tensor, top_k: int | None = None, gate_scale: str = "none") -> Routing:
    """Every expert, weighted by `softmax(W x)`; gates sum to 1 (BTX's "soft" variant; BAM's attention)."""
    experts = torch.arange(logits_TE.shape[-1], device=logits_TE.device).expand(logits_TE.shape)
    return Routing(logits_TE, logits_TE.softmax(-1), experts)


def forced(logits_TE: Tensor, top_k: int, expert: int) -> Routing:
    """One-hot: `expert` with gate 1, the other K − 1 places with gate 0."""
    tokens, num_experts = logits_TE.shape
    places = torch.arange(top_k, device=logits_TE.device)
    gates = (places == 0).to(logits_TE.dtype).expand(tokens, top_k)
    return Routing(logits_TE, gates, ((expert + places) % num_experts).expand(tokens, top_k))


GATE_SCALES = {
    "none": lambda gates, num_experts: gates,
    "sum_to_one": lambda gates, num_experts: gates / gates.sum(-1, keepdim=True),
    "straight_through": lambda gates, num_experts: gates / gates.sum(-1, keepdim=True).detach(),
    "compensate": lambda gates, num_experts: gates * (num_experts / gates.shape[-1]),
}

ROUTERS = {"topk_softmax": topk_softmax, "softmax_topk": softmax_topk, "soft": soft}


class Router(nn.Module):
    """`W x` of one layer, always in fp32: bf16 logits flip near-ties and differ between recomputations.

    kind: a name in ROUTERS. name: its place in the trace, "ffn.3" or "attention.3".
    """

    def __init__(self, hidden_size: int, num_experts: int, name: str, kind: str, top_k: int, gate_scale: str = "none"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.name, self.kind, self.top_k, self.gate_scale = name, kind, top_k, gate_scale

    def forward(self, hidden_TD: Tensor, trace: RoutingTrace | None) -> Routing:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.float(), self.weight.float())
            if trace is not None and trace.forced is not None:
                routing = forced(logits_TE, self.top_k, trace.forced)
            else:
                routing = ROUTERS[self.kind](logits_TE, self.top_k, self.gate_scale)
        return routing if trace is None else trace.record(self.name, routing)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.kind}, experts={self.weight.shape[0]}, top_k={self.top_k}, {self.gate_scale}"
