"""What the routers did, by domain and layer: expert shares, gate entropy, and how much an expert tells of the domain.

Shapes: L layers, E experts, W windows (one sequence of evaluation text), T tokens.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from evals.microscope import Decided, Microscope, Vocabulary
from evals.windows import first_counted, window_starts
from upcycle.config import EvalConfig
from upcycle.configuration import UpcycledConfig
from upcycle.health import by_gates, expert_weights, gates_of, mutual_information
from upcycle.router import RoutingTrace
from upcycle.routing import DEAD_SHARE, Routing
from upcycle.team import Team

CONTROL_DRAWS = 100


def gate_entropy(routing: Routing) -> Tensor:
    """(T,) entropy in nats of the softmax over all experts; log E when the router is indifferent."""
    log_probs = routing.logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _counted(routing: Routing, valid_BS: Tensor) -> Tensor:
    """(B, S): tokens that are no padding and about which the logits decided."""
    return valid_BS if routing.decided is None else valid_BS & routing.decided.view(valid_BS.shape)


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
    """Adds up the routing of evaluated tokens, domain by domain; padding is left out, and first segments, where no router
    decides."""

    def __init__(self, config: UpcycledConfig, vocabulary: Vocabulary, settings: EvalConfig):
        self.experts, self.layers, self.parts = list(config.experts), config.routed, list(config.parts)
        self.names = {part: list(config.names_of(part)) for part in self.parts}
        self.by_gates = {part: by_gates(config, part) for part in self.parts}
        self.settings, self.microscope = settings, Microscope(config, vocabulary, settings)
        self.windows: dict[str, dict[str, list[np.ndarray]]] = {part: {} for part in self.parts}
        self.entropy: dict[str, dict[str, list[np.ndarray]]] = {part: {} for part in self.parts}
        self.documents: list[np.ndarray] = []
        self.domain = ""

    def start(self, domain: str, tokens: np.ndarray, offsets: np.ndarray) -> None:
        """From now on windows are of `domain`, a stream of tokens in documents that begin at `offsets`."""
        self.domain = domain
        S, stride = self.settings.sequence_length, self.settings.tokens_apart
        first_W = first_counted(window_starts(len(tokens) - 1, S, stride), S, stride, self.settings.skip_first)
        seen = self.documents[-1].max() + 1 if self.documents else 0
        self.documents.append(np.searchsorted(offsets, first_W, side="right") - 1 + seen)
        self.microscope.start(domain, tokens)
        for part in self.parts:
            self.windows[part][domain], self.entropy[part][domain] = [], []

    def add(self, trace: RoutingTrace, valid_BS: Tensor, first: int) -> None:
        """Count a batch: window number `first` of the domain, and those after it. valid_BS: tokens that are predicted from."""
        decided = {}
        for part in self.parts:
            routings, shape = trace.of(part), valid_BS.shape
            counted = torch.stack([_counted(r, valid_BS) for r in routings])
            weights = torch.stack([expert_weights(r, self.by_gates[part]).view(*shape, -1) for r in routings])
            entropies = torch.stack([gate_entropy(r).view(shape) for r in routings])
            windows_LWE = (weights * counted.unsqueeze(-1)).sum(2)
            self.windows[part][self.domain].append(windows_LWE.transpose(0, 1).double().cpu().numpy())
            total = torch.stack([(entropies * counted).sum((1, 2)), counted.sum((1, 2))])
            self.entropy[part][self.domain].append(total.double().cpu().numpy())
            gates = torch.stack([gates_of(r).view(*shape, -1) for r in routings])
            decided[part] = Decided(weights.cpu(), gates.cpu(), entropies.cpu(), counted[0].cpu())
        self.microscope.add(decided, first)

    def combine(self, team: Team) -> None:
        """Put this domain's batches together again, which the ranks took in turn."""
        for found in (*self.windows.values(), *self.entropy.values()):
            found[self.domain] = in_turn(team.gather(found[self.domain]))

    def summary(self, team: Team) -> dict:
        """As stored under "routing" in evaluation.json, of what all ranks counted."""
        self.microscope.combine(team)
        parts = {part: self._part(part) | self.microscope.summary(part) for part in self.parts}
        between = {"agreement": self.microscope.agreement_of_sides()}
        return {"experts": self.experts, "attention": None} | parts | between

    def _part(self, part: str) -> dict:
        windows_WLE = {domain: np.concatenate(found) for domain, found in self.windows[part].items()}
        entropies = {domain: sum(found) for domain, found in self.entropy[part].items()}
        every = np.concatenate(list(windows_WLE.values()))
        labels = np.repeat(np.arange(len(windows_WLE)), [len(counts) for counts in windows_WLE.values()])
        documents = np.concatenate(self.documents)
        layers, load_LE = range(every.shape[1]), _shares(every)
        return {
            "experts": self.names[part],
            "layers": self.layers,
            "share": {domain: _shares(counts).tolist() for domain, counts in windows_WLE.items()},
            "entropy": {domain: _mean(found).tolist() for domain, found in entropies.items()},
            "mutual_information": [_information_of_windows(every[:, layer], labels) for layer in layers],
            "shuffled": [
                shuffled_information(every[:, layer], labels, documents, CONTROL_DRAWS, self.settings.rng_seed)
                for layer in layers
            ],
            "load": load_LE.tolist(),
            "dead": [
                [name for name, load in zip(self.names[part], load_E, strict=True) if load < DEAD_SHARE / len(load_E)]
                for load_E in load_LE
            ],
            "mean_entropy": _mean(sum(entropies.values())).tolist(),
        }


def _shares(windows_WLE: np.ndarray) -> np.ndarray:
    """(L, E) of all that the windows have, each expert's share; 0 where there is nothing."""
    total_LE = windows_WLE.sum(0)
    return total_LE / np.maximum(total_LE.sum(1, keepdims=True), 1e-20)


def _mean(sums_and_counts: np.ndarray) -> np.ndarray:
    sums, counts = sums_and_counts
    return sums / np.maximum(counts, 1)
