"""What the routers did, by domain and layer: expert shares, gate entropy, and how much an expert tells of the domain.

Shapes: L layers, E experts, W windows (one sequence of evaluation text), T tokens.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from upcycle.configuration import UpcycledConfig
from upcycle.routing import Routing, RoutingTrace
from upcycle.team import Team

CONTROL_DRAWS = 100


def expert_weights(routing: Routing, part: str) -> Tensor:
    """(T, E), rows summing to 1: shares of a token's K assignments for FFN routers, gates for attention routers."""
    zeros = torch.zeros_like(routing.logits)
    if part == "ffn":
        return zeros.scatter_add(1, routing.experts, torch.full_like(routing.gates, 1 / routing.experts.shape[1]))
    return zeros.scatter_add(1, routing.experts, routing.gates)


def gate_entropy(routing: Routing) -> Tensor:
    """(T,) entropy in nats of the softmax over all experts; log E when the router is indifferent."""
    log_probs = routing.logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def mutual_information(counts: np.ndarray) -> float:
    """I(domain; expert) in nats of a (domains, experts) table of weights, with every domain given equal weight.

    I = Σ_de p(d, e) log( p(d, e) / (p(d) p(e)) ),   p(d) = 1 / number of domains
    """
    joint = counts / counts.sum(1, keepdims=True) / len(counts)
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    positive = joint > 0
    return float((joint[positive] * np.log(joint[positive] / outer[positive])).sum())


def shuffled_information(
    windows: np.ndarray, domains: np.ndarray, documents: np.ndarray, draws: int, rng_seed: int
) -> list[float]:
    """`mutual_information` with the documents' domain labels shuffled: what chance alone shows.

    windows (W, E), domains (W,), documents (W,): whole documents change label together, because windows of one
    document are alike; shuffling windows would call any router informative.
    """
    rng = np.random.Generator(np.random.Philox(key=rng_seed))
    _, first, document_of_window = np.unique(documents, return_index=True, return_inverse=True)
    labels = domains[first]
    return [_information_of_windows(windows, rng.permutation(labels)[document_of_window]) for _ in range(draws)]


def _information_of_windows(windows: np.ndarray, domains: np.ndarray) -> float:
    table = np.stack([windows[domains == domain].sum(0) for domain in np.unique(domains)])
    return mutual_information(table)


def in_turn(dealt: list[list]) -> list:
    """One list again, of what was dealt to ranks in turn."""
    return [each for turn in zip_longest(*dealt) for each in turn if each is not None]


class RoutingCounter:
    """Adds up the routing of evaluated tokens, domain by domain; padding is left out."""

    def __init__(self, config: UpcycledConfig):
        self.experts = list(config.experts)
        self.parts = ["ffn"] + (["attention"] if config.attention == "mixture" else [])
        self.windows: dict[str, dict[str, list[np.ndarray]]] = {part: {} for part in self.parts}
        self.entropy: dict[str, dict[str, list[np.ndarray]]] = {part: {} for part in self.parts}
        self.documents: list[np.ndarray] = []
        self.domain = ""

    def start(self, domain: str, documents_W: np.ndarray) -> None:
        """From now on windows are of `domain`; documents_W says which document of it each window begins in."""
        self.domain = domain
        seen = self.documents[-1].max() + 1 if self.documents else 0
        self.documents.append(documents_W + seen)
        for part in self.parts:
            self.windows[part][domain], self.entropy[part][domain] = [], []

    def add(self, trace: RoutingTrace, valid_BS: Tensor) -> None:
        mask = valid_BS.unsqueeze(-1).float()
        for part in self.parts:
            routings = trace.of(part)
            weights = torch.stack([expert_weights(r, part).view(*valid_BS.shape, -1) for r in routings])
            entropies = torch.stack([gate_entropy(r).view(valid_BS.shape) for r in routings])
            self.windows[part][self.domain].append((weights * mask).sum(2).transpose(0, 1).double().cpu().numpy())
            total = torch.stack([(entropies * valid_BS).sum((1, 2)), valid_BS.sum().expand(len(routings))])
            self.entropy[part][self.domain].append(total.double().cpu().numpy())

    def combine(self, team: Team) -> None:
        """Put this domain's batches together again, which the ranks took in turn."""
        for found in (*self.windows.values(), *self.entropy.values()):
            found[self.domain] = in_turn(team.gather(found[self.domain]))

    def summary(self, rng_seed: int) -> dict:
        """As stored under "routing" in evaluation.json."""
        return {"experts": self.experts, "attention": None} | {part: self._part(part, rng_seed) for part in self.parts}

    def _part(self, part: str, rng_seed: int) -> dict:
        windows_WLE = {domain: np.concatenate(found) for domain, found in self.windows[part].items()}
        share, entropy = {}, {}
        for domain, counts in windows_WLE.items():
            total_LE = counts.sum(0)
            share[domain] = (total_LE / total_LE.sum(1, keepdims=True)).tolist()
            sums, tokens = sum(self.entropy[part][domain])
            entropy[domain] = (sums / tokens).tolist()
        every = np.concatenate(list(windows_WLE.values()))
        labels = np.repeat(np.arange(len(windows_WLE)), [len(counts) for counts in windows_WLE.values()])
        documents = np.concatenate(self.documents)
        layers = range(every.shape[1])
        return {
            "share": share,
            "entropy": entropy,
            "mutual_information": [_information_of_windows(every[:, layer], labels) for layer in layers],
            "shuffled": [
                shuffled_information(every[:, layer], labels, documents, CONTROL_DRAWS, rng_seed) for layer in layers
            ],
        }
