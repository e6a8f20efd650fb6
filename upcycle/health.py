"""What a training step records of its routers: load, entropy, size of logits, and how much an expert tells of the domain.

Shapes: B batch, S sequence, T tokens (B·S), E experts, L layers, M domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle.kinds import FACTS
from upcycle.router import RoutingTrace
from upcycle.routing import DEAD_SHARE, Routing, places_taken

PARTS = {"ffn": "", "attention": "attention_"}  # what the names of a sublayer's loads begin with


def by_gates(config: Any, part: str) -> bool:
    """Whether gates say how much of a token an expert has: of attention routers, and of those that give a token every expert."""
    return part == "attention" or FACTS[config.router].every


def expert_weights(routing: Routing, by_gates: bool) -> Tensor:
    """(T, E), rows summing to 1 (0 where a token has no expert): its gates as shares of their sum, or equal shares of the
    experts that it has."""
    weights_TE = gates_of(routing) if by_gates else places_taken(routing)
    return weights_TE / weights_TE.sum(1, keepdim=True).clamp_min(1e-20)


def gates_of(routing: Routing) -> Tensor:
    """(T, E) the gates as applied; 0 where a token does not have the expert."""
    return torch.zeros_like(routing.logits).scatter_add(1, routing.experts, routing.gates)


def information(table: np.ndarray) -> float:
    """I(x; expert) in nats of a (values of x, experts) table of weights, each value counting as much as it occurs.

    I = Σ_xe p(x, e) log( p(x, e) / (p(x) p(e)) )
    """
    if not table.sum():
        return 0.0
    joint = table / table.sum()
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    return max(0.0, float((joint[positive] * np.log(joint[positive] / outer[positive])).sum()))


def mutual_information(counts: np.ndarray) -> float:
    """I(domain; expert) in nats of a (domains, experts) table of weights, with every domain given equal weight.

    I = Σ_de p(d, e) log( p(d, e) / (p(d) p(e)) ),   p(d) = 1 / number of domains
    """
    counts = counts[counts.sum(1) > 0]  # a domain of texts too short for a router that waits for their first tokens
    return information(counts / counts.sum(1, keepdims=True))


@torch.no_grad()
def router_health(
    trace: RoutingTrace, config: Any, share: Tensor, domains_2B: Tensor, domains: int
) -> dict[str, Tensor]:
    """Of a micro-batch, to be summed over those of a step and over ranks.

    Of both sublayers: load (L, E), the share of each expert in all places taken, where the logits decided; mean squares of
    the logits' logsumexp (L,), what z-loss holds down; and domains (2, L, M, E), the experts' weights by the domain of their
    sequence, and by one that was drawn for it. Of feed-forward routers the mean entropy of their softmax in nats (L,) and the
    mean sum of a token's gates (L,), of attention routers the mean entropy of their gates (L,). All but the domains are times
    `share`, the micro-batch's part of the step.
    """
    health = {}
    for part, prefix in PARTS.items():
        if not (routings := trace.of(part)):
            continue
        taken_LE = torch.stack([places_taken(routing).sum(0) for routing in routings])
        health[f"{prefix}load"] = taken_LE / taken_LE.sum(1, keepdim=True).clamp_min(1) * share
        squares = [routing.logits.logsumexp(-1).square().mean() for routing in routings]
        health[f"{part}_logits"] = torch.stack(squares) * share
        if domains > 1:
            by_domain = [
                [_by_domain(r, by_gates(config, part), which_B, domains) for r in routings] for which_B in domains_2B
            ]
            health[f"{part}_domains"] = torch.stack([torch.stack(layers) for layers in by_domain])
    log_probs = [routing.logits.log_softmax(-1) for routing in trace.of("ffn")]
    health["ffn_entropy"] = torch.stack([-(logs.exp() * logs).sum(-1).mean() for logs in log_probs]) * share
    health["gate_sum"] = torch.stack([routing.gates.sum(-1).mean() for routing in trace.of("ffn")]) * share
    if attention := trace.of("attention"):
        gates = [routing.gates for routing in attention]
        entropies = torch.stack([-(g * g.clamp_min(1e-20).log()).sum(-1).mean() for g in gates])
        health["attention_entropy"] = entropies * share
    return health


def _by_domain(routing: Routing, by_gates: bool, which_B: Tensor, domains: int) -> Tensor:
    """(M, E) sums of the weights of each domain's tokens, where the logits decided."""
    weights_TE = expert_weights(routing, by_gates)
    if routing.decided is not None:
        weights_TE = weights_TE * routing.decided.unsqueeze(1)
    weights_BE = weights_TE.unflatten(0, (len(which_B), -1)).sum(1)
    return weights_BE.new_zeros(domains, weights_BE.shape[1]).index_add_(0, which_B, weights_BE)


def health_row(totals: dict[str, Tensor]) -> dict[str, Any]:
    """What metrics.jsonl holds of a step's sums. `dead_experts` and `largest_load` over all layers; `ffn_logits` and
    `attention_logits`, root mean squares of logsumexp, of the layer where they are largest; `ffn_information` and
    `attention_information` of each layer, `mutual_information` of expert and domain in nats, and beside them `_shuffled`, the same
    of domains that were dealt anew to the step's sequences."""
    row: dict[str, Any] = {}
    for part, prefix in PARTS.items():
        if f"{prefix}load" not in totals:
            continue
        row[f"{prefix}load"] = _rounded(totals[f"{prefix}load"])
        row[f"{part}_entropy"] = totals[f"{part}_entropy"].mean().item()
        row[f"{part}_logits"] = totals[f"{part}_logits"].max().sqrt().item()
        if f"{part}_domains" in totals:
            measured, shuffled = totals[f"{part}_domains"].double().cpu().numpy()
            for name, tables in (("information", measured), ("information_shuffled", shuffled)):
                row[f"{part}_{name}"] = [round(mutual_information(table), 6) for table in tables]
    if "load" in totals:
        load_LE = totals["load"]
        row["largest_load"] = load_LE.max().item()
        row["dead_experts"] = int((load_LE < DEAD_SHARE / load_LE.shape[1]).sum())
        row["gate_sum"] = totals["gate_sum"].mean().item()
    return row


def _rounded(shares_LE: Tensor) -> list[list[float]]:
    return [[round(share, 4) for share in layer] for layer in shares_LE.tolist()]
