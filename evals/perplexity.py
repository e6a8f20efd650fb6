"""Perplexity of one model on every domain: cross-entropy alone, per document, at any batch size the same.

A domain's split is one stream of documents, each ended by EOS. It is cut into windows of S tokens that overlap by one,
so every token but the stream's first is predicted exactly once, from what precedes it in its window. Nats are summed
per document; bytes are those of the document's text, so bits per byte compare across tokenizers.
Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evals.routing import RoutingCounter, in_turn
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.families import language_model_head
from upcycle.losses import IGNORED, token_nats
from upcycle.modeling import UpcycledForCausalLM
from upcycle.routing import RoutingTrace
from upcycle.sharded import sharded
from upcycle.team import ALONE, Team


@dataclass
class Scored:
    """Per document: `nats` (float64), predicted `tokens`, text `bytes`."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def summary(self) -> dict:
        return {
            "nats": float(self.nats.sum()),
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.bytes.sum()),
            "documents": len(self.nats),
        }


class Scorer(nn.Module):
    """A model and the cross-entropy of its predictions, token by token."""

    def __init__(self, model: PreTrainedModel, precision: str, device: torch.device):
        super().__init__()
        self.model, self.precision, self.device = model, precision, device

    def forward(self, inputs_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, RoutingTrace | None]:
        """(B, S) nats of every label, 0 where IGNORED; what a mixture's routers decided."""
        inputs_BS, labels_BS = inputs_BS.to(self.device), labels_BS.to(self.device)
        trace = RoutingTrace(inputs_BS) if isinstance(self.model, UpcycledForCausalLM) else None
        extra = {"trace": trace} if trace else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden = self.model.base_model(input_ids=inputs_BS, use_cache=False, **extra).last_hidden_state
            nats = token_nats(hidden.flatten(0, 1), language_model_head(self.model), labels_BS.flatten())
        return nats.view_as(labels_BS), trace


def windows(tokens: np.ndarray, sequence_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, labels) of S tokens each, labels[i] following inputs[i]; the last pair is padded, labels with IGNORED."""
    for start in range(0, len(tokens) - 1, sequence_length):
        piece = tokens[start : start + sequence_length + 1].astype(np.int64)
        inputs, labels = piece[:-1], piece[1:]
        missing = sequence_length - len(inputs)
        yield np.pad(inputs, (0, missing)), np.pad(labels, (0, missing), constant_values=IGNORED)


def whole_documents(array: TokenArray, max_tokens: int | None) -> int:
    """How many documents, from the first, fit in `max_tokens`; at least one."""
    if max_tokens is None:
        return len(array.bytes)
    return max(1, int(np.searchsorted(array.offsets, max_tokens, side="right")) - 1)


@torch.no_grad()
def score_domain(
    scorer: Scorer,
    array: TokenArray,
    config: EvalConfig,
    counter: RoutingCounter | None,
    advance: Callable,
    team: Team = ALONE,
) -> Scored:
    """Score one split of one domain; `counter` sees the routing of every predicted token.

    The ranks of `team` take the batches in turn, and all get the whole result: the very figures of one process.
    """
    documents = whole_documents(array, config.max_tokens)
    tokens = np.asarray(array.tokens[: array.offsets[documents]])
    pairs = list(windows(tokens, config.sequence_length))
    nats = []
    size = config.batch_sequences
    for turn in range(0, len(pairs), team.size * size):
        mine = pairs[turn + team.rank * size :][:size]
        # Ranks that hold parts of the weights need one another in every turn, also where one has no batch left.
        inputs, labels = (torch.from_numpy(np.stack(side)) for side in zip(*(mine or pairs[:1]), strict=True))
        scored, trace = scorer(inputs, labels)
        if mine:
            nats.append(scored.double().flatten().cpu().numpy())
            if counter is not None:
                counter.add(trace, (labels != IGNORED).to(scored.device))
        advance(team.size * inputs.numel())
    nats = in_turn(team.gather(nats))
    if counter is not None:
        counter.combine(team)
    per_token = np.concatenate([[0.0], np.concatenate(nats)[: len(tokens) - 1]])  # the stream's first is not predicted
    starts = array.offsets[:documents]
    predicted = np.diff(array.offsets[: documents + 1]) - (np.arange(documents) == 0)
    return Scored(np.add.reduceat(per_token, starts), predicted, np.asarray(array.bytes[:documents]))


def evaluate(
    model: PreTrainedModel, data: dict[str, Path], config: EvalConfig, advance: Callable, team: Team = ALONE
) -> tuple[dict, dict]:
    """(`evaluation.json` as a dict, arrays for `documents.npz`) of one model over all domains, on every rank of `team`.

    Under a strategy that cuts weights (fsdp2, zero3) the model is cut over the ranks here too.

    Raises ValueError: a domain without that split.
    """
    scorer = Scorer(model.eval(), config.precision, team.device)
    if team.strategy in ("fsdp2", "zero3"):
        sharded(scorer, model, team)
    else:
        scorer.to(team.device)
    arrays = {name: TokenArray(path, config.split) for name, path in sorted(data.items())}
    total = sum(int(array.offsets[whole_documents(array, config.max_tokens)]) for array in arrays.values())
    done, summaries, documents = 0, {}, {}
    counter = RoutingCounter(model.config) if isinstance(model, UpcycledForCausalLM) else None

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        advance(min(done, total), total)

    for name, array in arrays.items():
        if counter is not None:
            tokens = int(array.offsets[whole_documents(array, config.max_tokens)])
            starts = np.arange(0, tokens - 1, config.sequence_length)
            counter.start(name, np.searchsorted(array.offsets, starts, side="right") - 1)
        scored = score_domain(scorer, array, config, counter, tick, team)
        summaries[name] = scored.summary()
        documents |= {f"{name}.nats": scored.nats, f"{name}.tokens": scored.tokens, f"{name}.bytes": scored.bytes}
    result = {
        "split": config.split,
        "sequence_length": config.sequence_length,
        "max_tokens": config.max_tokens,
        "domains": summaries,
        "routing": counter.summary(config.rng_seed) if counter else None,
    }
    return result, documents
