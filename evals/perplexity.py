"""Perplexity of one model on every domain: cross-entropy alone, per document, at any batch size the same.

A domain's split is one stream of documents, each ended by EOS. It is cut into windows (windows.py), so every token but
the stream's first is predicted exactly once, from what precedes it in its window. Nats are summed per document; bytes are
those of the document's text, so bits per byte compare across tokenizers.
Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evals.microscope import Vocabulary
from evals.routing import RoutingCounter, in_turn
from evals.windows import first_counted, inputs_and_labels, window_starts
from evals.words import token_texts
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.configuration import UpcycledConfig
from upcycle.families import language_model_head
from upcycle.losses import IGNORED, token_nats
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace
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


class Steering(NamedTuple):
    """What routers are told. expert: of this domain, for oracles; forced, removed: of each sublayer an expert that all
    tokens go to, or none (RoutingTrace)."""

    expert: int | None = None
    forced: Mapping[str, int] | None = None
    removed: Mapping[str, int] | None = None


FREE = Steering()


class Scorer(nn.Module):
    """A model and the cross-entropy of its predictions, token by token."""

    def __init__(self, model: PreTrainedModel, precision: str, device: torch.device):
        super().__init__()
        self.model, self.precision, self.device = model, precision, device

    def forward(
        self, inputs_BS: Tensor, labels_BS: Tensor, steering: Steering = FREE
    ) -> tuple[Tensor, RoutingTrace | None]:
        """(B, S) nats of every label, 0 where IGNORED; what a mixture's routers decided."""
        inputs_BS, labels_BS = inputs_BS.to(self.device), labels_BS.to(self.device)
        trace = None
        if isinstance(self.model, UpcycledForCausalLM):
            expert_B = None
            if steering.expert is not None:
                expert_B = torch.full((len(inputs_BS),), steering.expert, device=self.device)
            trace = RoutingTrace(expert_B=expert_B, forced=steering.forced, removed=steering.removed)
        extra = {"trace": trace} if trace else {}
        bf16 = self.precision == "bf16"
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False
        ):  # a weight is used once
            hidden = self.model.base_model(input_ids=inputs_BS, use_cache=False, **extra).last_hidden_state
            nats = token_nats(hidden.flatten(0, 1), language_model_head(self.model), labels_BS.flatten())
        return nats.view_as(labels_BS), trace


def count_windows(tokens: int, config: EvalConfig) -> int:
    """How many windows a stream of so many tokens has."""
    return len(window_starts(int(tokens) - 1, config.sequence_length, config.tokens_apart))


def whole_documents(array: TokenArray, max_tokens: int | None) -> int:
    """How many documents, from the first, fit in `max_tokens`; at least one."""
    if max_tokens is None:
        return len(array.bytes)
    return max(1, int(np.searchsorted(array.offsets, max_tokens, side="right")) - 1)


@torch.no_grad()
def score_domain(
    scorer: nn.Module,
    array: TokenArray,
    config: EvalConfig,
    counter: RoutingCounter | None,
    advance: Callable,
    team: Team = ALONE,
    steering: Steering = FREE,
) -> Scored:
    """Score one split of one domain; `counter` sees the routing of every predicted token.

    The ranks of `team` take the batches in turn, and all get the whole result: the very figures of one process.
    advance: called with how many windows more have been scored by all of them.
    """
    documents = whole_documents(array, config.max_tokens)
    tokens = np.asarray(array.tokens[: array.offsets[documents]])
    S, stride = config.sequence_length, config.tokens_apart
    starts = window_starts(len(tokens) - 1, S, stride)
    nats, size, skip = [], config.batch_sequences, config.skip_first
    for turn in range(0, len(starts), team.size * size):
        mine = starts[turn + team.rank * size :][:size]
        # Ranks that hold parts of the weights need one another in every turn, also where one has no batch left.
        pair = inputs_and_labels(tokens, mine if len(mine) else starts[:1], S, stride, skip)
        inputs, labels = (torch.from_numpy(side) for side in pair)
        scored, trace = scorer(inputs, labels, steering)
        if len(mine):
            counted = labels != IGNORED
            nats.append(scored.cpu()[counted].double().numpy())
            if counter is not None:
                counter.add(trace, counted.to(scored.device), turn + team.rank * size)
        advance(min(team.size * size, len(starts) - turn))
    nats = in_turn(team.gather(nats))
    if counter is not None:
        counter.combine(team)
    kept_T = predicted_places(len(tokens), config)
    per_token = np.zeros(len(tokens))
    per_token[kept_T] = np.concatenate([[], *nats])
    starts, bytes_D = array.offsets[:documents], np.asarray(array.bytes[:documents])
    predicted = np.add.reduceat(kept_T.astype(np.int64), starts)
    if skip:  # of a document that is scored in part, its share of the bytes
        lengths = np.diff(array.offsets[: documents + 1])
        bytes_D = np.round(bytes_D * predicted / np.maximum(lengths, 1)).astype(bytes_D.dtype)
    return Scored(np.add.reduceat(per_token, starts), predicted, bytes_D)


def predicted_places(tokens: int, config: EvalConfig) -> np.ndarray:
    """(tokens,) bool: those of a stream that are predicted. The stream's first is not."""
    S, stride = config.sequence_length, config.tokens_apart
    kept_T, starts_W = np.zeros(tokens, dtype=bool), window_starts(tokens - 1, S, stride)
    for start, first in zip(starts_W, first_counted(starts_W, S, stride, config.skip_first), strict=True):
        kept_T[first + 1 : min(start + S + 1, tokens)] = True
    return kept_T


def expert_of_domain(config: Any, domain: str) -> int | None:
    """The expert that an oracle router sends a domain's text to: its branch's, the seed's for domains without a branch.

    None where no router asks. Raises ValueError: neither is among the experts.
    """
    routers = (getattr(config, "router", None), getattr(config, "attention_router", {}).get("kind"))
    if "oracle" not in routers:
        return None
    for source in (domain, "seed"):
        if source in config.expert_sources:
            return config.expert_sources.index(source)
    raise ValueError(
        f"an oracle router has no expert for domain {domain!r}: neither it nor the seed is among the experts "
        f"({', '.join(config.experts)}); include the seed, or leave that domain out"
    )


def vocabulary_of(streams: Iterable[np.ndarray], tokenizer: Any) -> Vocabulary:
    """The ids that occur in the streams, with their texts if there is a tokenizer."""
    ids = np.unique(np.concatenate([np.unique(tokens) for tokens in streams]))
    if tokenizer is None:
        return Vocabulary(ids)
    signs = set(tokenizer.all_special_ids)
    return Vocabulary(ids, token_texts(tokenizer, ids), [int(one) in signs for one in ids])


def check_positions(model: PreTrainedModel, sequence_length: int | None, setting: str) -> int | None:
    """The positions that a model has, if its config says. Raises ValueError: `setting` asks for more."""
    own = getattr(getattr(model.config, "seed", model.config), "max_position_embeddings", None)
    if sequence_length is not None and own is not None and sequence_length > own:
        raise ValueError(f"{setting}={sequence_length} exceeds the model's {own} positions; set it to {own} or less")
    return own


def scorer_of(model: PreTrainedModel, precision: str, team: Team = ALONE) -> Scorer:
    """The model, ready to score: where the team computes, and cut over the ranks under a strategy that cuts weights."""
    scorer = Scorer(model.eval(), precision, team.device)
    if team.strategy in ("fsdp2", "zero3"):
        sharded(scorer, model, team)
        return scorer
    return scorer.to(team.device)


def evaluate(
    model: PreTrainedModel,
    data: dict[str, Path],
    config: EvalConfig,
    advance: Callable,
    team: Team = ALONE,
    tokenizer: Any = None,
) -> tuple[dict, dict]:
    """`measure` of one model.

    Raises ValueError: an oracle router without an expert for a domain; windows longer than the model's positions.
    """
    check_positions(model, config.sequence_length, "eval.sequence_length")
    mixture = model.config if isinstance(model, UpcycledForCausalLM) else None
    if mixture is not None and mixture.leaks > config.skip_first:
        raise ValueError(
            f"eval.skip_first={config.skip_first}: this mixture's routers decide about the first {mixture.leaks} tokens of a window by these very tokens "
            f"(pool.first=own_mean), so they are no test; write eval.skip_first={mixture.leaks}"
        )
    return measure(scorer_of(model, config.precision, team), data, config, advance, team, mixture, tokenizer)


def measure(
    scorer: nn.Module,
    data: dict[str, Path],
    config: EvalConfig,
    advance: Callable,
    team: Team = ALONE,
    mixture: UpcycledConfig | None = None,
    tokenizer: Any = None,
) -> tuple[dict, dict]:
    """(`evaluation.json` as a dict, arrays for `documents.npz`) over all domains, on every rank of `team`.

    scorer: a Scorer, or what is called as one. mixture: its config, if the routing is to be counted. tokenizer: for what
    tokens are as text; without it routing is not held against words.

    Raises ValueError: a domain without that split.
    """
    arrays = {name: TokenArray(path, config.split) for name, path in sorted(data.items())}
    streams = {
        name: array.tokens[: array.offsets[whole_documents(array, config.max_tokens)]] for name, array in arrays.items()
    }
    total = sum(count_windows(len(tokens), config) for tokens in streams.values())
    done, summaries, documents = 0, {}, {}
    counter = None
    if mixture is not None:
        words = vocabulary_of(streams.values(), tokenizer)
        counter = RoutingCounter(mixture, words, config)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        advance(done, total, doing=f"windows, {name}")

    for name, array in arrays.items():
        if counter is not None:
            counter.start(name, streams[name], array.offsets)
        steering = Steering(expert_of_domain(mixture, name))
        scored = score_domain(scorer, array, config, counter, tick, team, steering)
        summaries[name] = scored.summary()
        documents |= {f"{name}.nats": scored.nats, f"{name}.tokens": scored.tokens, f"{name}.bytes": scored.bytes}
    result = {
        "split": config.split,
        "sequence_length": config.sequence_length,
        "stride": config.tokens_apart,
        "skip_first": config.skip_first,
        "max_tokens": config.max_tokens,
        "domains": summaries,
        "routing": counter.summary(team) if counter else None,
    }
    return result, documents
