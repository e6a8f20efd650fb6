"""What routers go by, token by token: the token's id, its place in the window, its part of a word; how sure they are; and
whether they agree. Counts only, so memory does not grow with the text.

Weights and gates are counted in whole units of 2^-20. Sums of integers are the same in any order, so the figures are
the same for any number of ranks.
Shapes: B batch, S window, T tokens (B·S), L layers, E experts, N ids that occur in the text, R rotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals.statistics import generator
from evals.windows import cut, window_starts
from evals.words import parts_of_words
from upcycle.config import EvalConfig
from upcycle.configuration import UpcycledConfig
from upcycle.health import information
from upcycle.team import Team

UNIT = 2**20
BINS = 20  # of [0, 1]
EDGE = 1e-6  # a value this close below the edge of a bin is rounding: 1/E of an indifferent router
ROTATIONS = 19  # a measured value above all of its controls is chance once in 20
EXAMPLES, LEAST_TOKENS = 5, 20  # tokens shown for an expert, and how often each must have occurred
TRAITS = ("token", "position", "word")


class Decided(NamedTuple):
    """What the routers of one sublayer made of B windows.

    weights (L, B, S, E): `routing.expert_weights`; gates (L, B, S, E) as applied; entropy (L, B, S) in nats.
    counted (B, S): tokens about which the logits decided; the same in all layers, which pool alike.
    """

    weights: Tensor
    gates: Tensor
    entropy: Tensor
    counted: Tensor


class Vocabulary(NamedTuple):
    """The N ids that occur, in order, and if there is a tokenizer their texts, and which of these are signs, not text."""

    ids: np.ndarray
    texts: list[str] | None = None
    special: list[bool] | None = None


@dataclass
class Counts:
    """The sums of one sublayer. tables: of each trait, (1 + R, values, L, E) weights, the first as they are."""

    tables: dict[str, Tensor]
    occurrences_N: Tensor
    favoured_LE: Tensor
    alike: Tensor  # (L - 1,) tokens whose largest gate goes to the same expert in the next layer
    gate_L: Tensor
    bins: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        own = [self.occurrences_N, self.favoured_LE, self.alike, self.gate_L]
        return [*self.tables.values(), *own, *self.bins.values()]


def rotated(counted_BS: Tensor, draw_B: Tensor) -> Tensor:
    """(B, S) of each counted token, the one whose experts it gets when its window's are rotated among the counted ones.

    draw_B in [0, 1) picks the number of places, from 1 to n - 1 of a window's n counted tokens, all alike.
    """
    S, n_B1 = counted_BS.shape[1], counted_BS.sum(1, keepdim=True)
    place_1S = torch.arange(S).unsqueeze(0)
    order_BS = counted_BS.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # counted ones first, in order
    shift_B1 = 1 + (draw_B.unsqueeze(1) * (n_B1 - 1).clamp_min(0)).long()
    other_BS = order_BS.gather(1, (place_1S + shift_B1) % n_B1.clamp_min(1))
    return torch.zeros_like(order_BS).scatter(1, order_BS, torch.where(place_1S < n_B1, other_BS, order_BS))


def binned(values_LT: Tensor) -> Tensor:
    """(L, BINS) how many values fall into each of the equal bins of [0, 1]; those above 1 into the last."""
    bins_LT = ((values_LT + EDGE) * BINS).long().clamp(0, BINS - 1)
    return torch.stack([torch.bincount(bins_T, minlength=BINS) for bins_T in bins_LT])


class Microscope:
    """Counts, domain by domain, what the routers of a mixture did."""

    def __init__(self, config: UpcycledConfig, vocabulary: Vocabulary, settings: EvalConfig):
        self.layers, self.parts = config.routed, list(config.parts)
        self.names = {part: list(config.names_of(part)) for part in self.parts}
        self.sources = {part: list(config.sources_of(part)) for part in self.parts}
        self.vocabulary, self.settings = vocabulary, settings
        self.traits = [trait for trait in TRAITS if trait != "word" or vocabulary.texts is not None]
        self.counts = {part: self._empty(len(self.names[part])) for part in self.parts}
        self.sides_alike_L = torch.zeros(len(self.layers), dtype=torch.int64)
        self.sides_favour = {part: torch.zeros_like(self.counts[part].favoured_LE) for part in self.parts}

    def _empty(self, experts: int) -> Counts:
        layers = len(self.layers)
        values = {"token": len(self.vocabulary.ids), "position": self.settings.sequence_length, "word": 3}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return Counts(
            tables={trait: zeros(1 + ROTATIONS, values[trait], layers, experts) for trait in self.traits},
            occurrences_N=zeros(values["token"]),
            favoured_LE=zeros(layers, experts),
            alike=zeros(layers - 1),
            gate_L=zeros(layers),
            bins={name: zeros(layers, BINS) for name in ("largest_gate", "entropy")},
        )

    def start(self, domain: str, tokens: np.ndarray) -> None:
        """From now on windows are of this stream of tokens."""
        S = self.settings.sequence_length
        rows_T = np.searchsorted(self.vocabulary.ids, tokens[:-1])
        starts_W = window_starts(len(rows_T), S, self.settings.tokens_apart)
        found = {"token": cut(rows_T, starts_W, S), "position": np.tile(np.arange(S), (len(starts_W), 1))}
        if self.vocabulary.texts is not None and self.vocabulary.special is not None:
            found["word"] = cut(parts_of_words(rows_T, self.vocabulary.texts, self.vocabulary.special), starts_W, S)
        self.values_WS = {trait: torch.from_numpy(values) for trait, values in found.items()}
        draws_WR = generator(self.settings.rng_seed, domain).random((len(starts_W), ROTATIONS))
        self.draws_WR = torch.from_numpy(draws_WR)

    def add(self, decided: dict[str, Decided], first: int) -> None:
        """Count windows `first` and following."""
        favoured = {}
        for part, found in decided.items():
            favoured[part] = self._add_part(self.counts[part], found, first)
        if len(decided) == 2:
            self._compare_sides(favoured, decided["ffn"].counted & decided["attention"].counted)

    def _add_part(self, counts: Counts, found: Decided, first: int) -> Tensor:
        """Returns (L, B, S) the expert of the largest gate, of equals the first."""
        windows = slice(first, first + len(found.counted))
        weights_BSLE = (found.weights.double() * found.counted.unsqueeze(-1) * UNIT).round().long().permute(1, 2, 0, 3)
        rows_BSX = weights_BSLE.flatten(2)
        for turn in range(1 + ROTATIONS):
            turned_BSX = rows_BSX
            if turn:
                index_BS = rotated(found.counted, self.draws_WR[windows, turn - 1])
                turned_BSX = rows_BSX.gather(1, index_BS.unsqueeze(-1).expand_as(rows_BSX))
            for trait, table in counts.tables.items():
                values_T = self.values_WS[trait][windows].flatten()
                table[turn].flatten(1).index_add_(0, values_T, turned_BSX.flatten(0, 1))
        counts.occurrences_N.index_add_(0, self.values_WS["token"][windows].flatten(), found.counted.flatten().long())
        largest_LBS, favoured_LBS = found.gates.max(-1)
        favoured_LT, experts = favoured_LBS[:, found.counted], found.gates.shape[-1]
        counts.favoured_LE += torch.stack([torch.bincount(one, minlength=experts) for one in favoured_LT])
        counts.alike += (favoured_LT[1:] == favoured_LT[:-1]).sum(1)
        largest_LT = largest_LBS[:, found.counted].double()
        counts.gate_L += (largest_LT * UNIT).round().long().sum(1)
        counts.bins["largest_gate"] += binned(largest_LT)
        counts.bins["entropy"] += binned(found.entropy[:, found.counted].double() / math.log(max(experts, 2)))
        return favoured_LBS

    def _compare_sides(self, favoured: dict[str, Tensor], counted_BS: Tensor) -> None:
        labels = self._labels()
        sides = {part: favoured[part][:, counted_BS] for part in self.parts}
        ffn, attention = (labels[part][sides[part]] for part in ("ffn", "attention"))
        self.sides_alike_L += (ffn == attention).sum(1)
        for part, chosen_LT in sides.items():
            experts = len(self.names[part])
            self.sides_favour[part] += torch.stack([torch.bincount(one, minlength=experts) for one in chosen_LT])

    def _labels(self) -> dict[str, Tensor]:
        """Of each expert of each sublayer a number, the same for those with the same name, else source."""
        known = self.names if self._by_name else self.sources
        every = list(dict.fromkeys(name for part in self.parts for name in known[part]))
        return {part: torch.tensor([every.index(name) for name in known[part]]) for part in self.parts}

    @property
    def _by_name(self) -> bool:
        return len({tuple(names) for names in self.names.values()}) == 1

    def combine(self, team: Team) -> None:
        """Add up what the ranks counted."""
        for tensor in [t for counts in self.counts.values() for t in counts.tensors()]:
            team.add(tensor)
        for tensor in (self.sides_alike_L, *self.sides_favour.values()):
            team.add(tensor)

    def agreement_of_sides(self) -> dict | None:
        """Share of tokens whose largest gate goes to the same expert in a layer's attention and feed-forward."""
        if len(self.parts) < 2:
            return None
        labels, shares = self._labels(), []
        for part in self.parts:
            shares_LE = _shares(self.sides_favour[part].double())
            total = torch.zeros(
                len(self.layers), 1 + int(max(one.max() for one in labels.values())), dtype=torch.float64
            )
            shares.append(total.index_add_(1, labels[part], shares_LE))
        tokens_L = self.sides_favour["ffn"].sum(1).clamp_min(1).double()
        return {
            "by": "expert" if self._by_name else "source",
            "share": (self.sides_alike_L / tokens_L).tolist(),
            "independent": (shares[0] * shares[1]).sum(1).tolist(),
        }

    def summary(self, part: str) -> dict:
        """What evaluation.json's "routing" holds of a sublayer, layer by layer, beside what RoutingCounter adds."""
        counts, names = self.counts[part], self.names[part]
        tokens_L = counts.favoured_LE.sum(1).clamp_min(1).double()
        favoured_LE = _shares(counts.favoured_LE.double())
        alike = (favoured_LE[1:] * favoured_LE[:-1]).sum(1)
        measured = {trait: _measured(table.numpy()) for trait, table in counts.tables.items()}
        tokens = counts.tables["token"][0].numpy()
        return {
            "largest_gate": (counts.gate_L / (UNIT * tokens_L)).tolist(),
            "histograms": {"edges": [edge / BINS for edge in range(BINS + 1)]}
            | {name: (bins_LB / tokens_L.unsqueeze(1)).tolist() for name, bins_LB in counts.bins.items()},
            "favoured": favoured_LE.tolist(),
            "agreement": {"share": (counts.alike / tokens_L[1:]).tolist(), "independent": alike.tolist()},
            "information": dict.fromkeys(TRAITS) | measured,
            "examples": [
                {name: self._examples(tokens[:, layer], expert, counts) for expert, name in enumerate(names)}
                for layer in range(len(self.layers))
            ],
        }

    def _examples(self, weights_NE: np.ndarray, expert: int, counts: Counts) -> list[dict]:
        """The ids of which an expert has the most beyond its share of all: largest p(e | id) / p(e), at least
        LEAST_TOKENS occurrences; among equals the more frequent."""
        occurrences_N, share_E = counts.occurrences_N.numpy(), weights_NE.sum(0) / max(weights_NE.sum(), 1)
        if not share_E[expert]:
            return []
        own_N = weights_NE[:, expert] / np.maximum(weights_NE.sum(1), 1)
        ids, texts = self.vocabulary.ids, self.vocabulary.texts
        order = np.lexsort((ids, -occurrences_N, -own_N))
        rows = [row for row in order if occurrences_N[row] >= LEAST_TOKENS and own_N[row] > share_E[expert]][:EXAMPLES]
        return [
            {
                "id": int(ids[row]),
                "text": None if texts is None else texts[row],
                "count": int(occurrences_N[row]),
                "share": float(own_N[row]),
                "lift": float(own_N[row] / share_E[expert]),
            }
            for row in rows
        ]


def _shares(counts_LE: Tensor) -> Tensor:
    return counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1e-20)


def _measured(table: np.ndarray) -> dict[str, Sequence]:
    """`information` of every layer of a (1 + R, values, L, E) table: as measured, and with experts rotated."""
    layers = range(table.shape[2])
    return {
        "measured": [information(table[0, :, layer].astype(np.float64)) for layer in layers],
        "control": [[information(turned[:, layer].astype(np.float64)) for turned in table[1:]] for layer in layers],
    }
