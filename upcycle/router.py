"""The router module, the trace of one forward, and decisions that are shared by tokens and kept across generation steps.

Shapes: B batch, S sequence, T tokens (B·S), D hidden, E experts, K experts per token, G segments.
This file travels inside checkpoints as remote code: it imports `.kinds` and `.routing` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kinds import FACTS
from .routing import CERTAIN, ROUTERS, Routing, Rule, Seen, forced, unremovable


class Kept(NamedTuple):
    """What a router that decides per segment or sequence remembers between the forwards of one generation.

    tokens: so far, padding included. count_B: valid ones. sum_BE: of the token logits of the segment that is not whole yet.
    decision_BE: the mean that decides for it.
    """

    tokens: int
    count_B: Tensor
    sum_BE: Tensor
    decision_BE: Tensor

    def rows(self, index_B: Tensor) -> Kept:
        """For sequences that moved in the batch: beam search."""
        return Kept(self.tokens, *[tensor.index_select(0, index_B.to(tensor.device)) for tensor in self[1:]])


REMEMBERED = "routers"  # attribute of a cache: what routers remember of the tokens in it
VALID, MASK = (
    "routed",
    "mask",
)  # keys of a mask that generation has prepared: (B, S) real tokens, and what the decoder takes


def remembered(past: Any) -> dict[str, Kept]:
    """What the routers remember of the tokens in a cache, by router; it stands on the cache, so each generation has its own.

    Raises ValueError: the cache holds other tokens than the routers have seen.
    """
    tokens = 0 if past is None else int(past.get_seq_length())
    kept = dict(getattr(past, REMEMBERED, {})) if tokens else {}
    if (tokens and any(one.tokens != tokens for one in kept.values())) or bool(tokens) != bool(kept):
        raise ValueError(
            f"past_key_values holds {tokens} tokens, but not what the routers, which decide per segment or sequence, "
            "remember of them: it was cut, or filled by another model; pass a cache as a forward of this model returned it"
        )
    return kept


class RoutingTrace:
    """What the routers of ONE forward saw and decided; it travels as a keyword through the decoder layers.

    It is never kept on a shared object: with gradient checkpointing a layer runs again during backward, and must then
    find the trace of its own forward. `forced` sends every token to that expert with gate 1, in every router, or to one of
    each part, {"ffn": 5, "attention": 1}. removed: of each part, an expert that no token gets: routers decide among the
    others, as if it did not exist.
    expert_B: each sequence's expert, for oracle routers. step: optimizer steps taken, for those that anneal.
    token_ids_BS: None if only embeddings were given. valid_BS: False on padding, None if nothing is known to be padded.
    earlier: what routers remember of the tokens in the cache, by router; None where nothing is to be remembered. kept: what
    they will remember after these; apart, because a recomputation must start from the same.
    bases: of layers whose base expert comes from the layer before, its weights. curvature: the map that all
    layers share, if they do.
    No dataclass: FSDP2 copies those on their way into a layer, and what the layer records would be lost.
    """

    def __init__(
        self,
        *,
        forced: int | Mapping[str, int] | None = None,
        expert_B: Tensor | None = None,
        step: int = 0,
        removed: Mapping[str, int] | None = None,
    ):
        self.forced, self.expert_B, self.step, self.removed = forced, expert_B, step, removed or {}
        self.token_ids_BS: Tensor | None = None
        self.valid_BS: Tensor | None = None
        self.earlier: dict[str, Kept] | None = None
        self.kept: dict[str, Kept] = {}
        self.routings: dict[str, Routing] = {}
        self.bases: dict[int, Any] = {}
        self.curvature: dict[str, Tensor] = {}

    def record(self, name: str, routing: Routing) -> Routing:
        """Keep the first decision under `name`; a recomputation gets that one back and routes exactly the same."""
        return self.routings.setdefault(name, routing)

    def forced_expert(self, name: str) -> int | None:
        """Where router `name` has to send every token."""
        return self.forced.get(name.partition(".")[0]) if isinstance(self.forced, Mapping) else self.forced

    def removed_expert(self, name: str) -> int | None:
        """Which expert router `name` has to do without."""
        return self.removed.get(name.partition(".")[0])

    def of(self, part: str) -> list[Routing]:
        """The decisions of `part` ("ffn" or "attention"), in layer order."""
        return [routing for name, routing in self.routings.items() if name.startswith(part + ".")]

    def see(self, input_ids: Tensor | None, tokens: int, mask: Any) -> Any:
        """Take from a forward's inputs what routers may look at; returns the mask that the decoder takes.

        tokens: S. mask: (B, past + S), True or 1 on real tokens; or what `masks_for_routers` made of one; any other, such
        as a (B, 1, S, past + S) of the caller's own, does not tell padding, and then every token is a real one.
        """
        self.token_ids_BS = input_ids
        if isinstance(mask, dict) and VALID in mask:
            self.valid_BS = mask[VALID]
            return mask[MASK] if MASK in mask else {kind: one for kind, one in mask.items() if kind != VALID}
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.valid_BS = mask[:, -tokens:].bool()
        return mask


def masks_for_routers(mask: Tensor | None, tokens: int, prepared: Any) -> Any:
    """What generation has prepared of a (B, past + S) mask, for its decoder alone, and with it which of the S tokens are
    real: the prepared one does not tell where a layer's window or a cache of fixed size cuts it."""
    if mask is None:
        return prepared
    return {VALID: mask[:, -tokens:].bool()} | (prepared if isinstance(prepared, dict) else {MASK: prepared})


class Pooled(NamedTuple):
    """logits: (B, S, E) by which tokens are routed. first: (B, S) bool, the first segment, which has nothing to go by. run: (B, S), which
    tokens have one decision. kept: what the next tokens need."""

    logits: Tensor
    first: Tensor
    run: Tensor
    kept: Kept


def pooled(logits_BSE: Tensor, valid_BS: Tensor, rule: Rule, kept: Kept | None) -> Pooled:
    """Logits by which whole segments are routed: those of segment g are the mean over the tokens of segment g − 1.

    W · mean(x) = mean(W x), so pooling logits is Lory's (arXiv:2405.03133) router on the mean hidden state. With
    rule.per = "prefix" there are two segments: the first `rule.tokens` tokens, and the rest of the sequence.
    With rule.first = "own_mean" the first segment has the mean of its own tokens that are there, without a gradient: a leak of later
    tokens into earlier ones, as in Lory's training.
    """
    (B, S, E), size = logits_BSE.shape, rule.tokens
    last = 1 if rule.per == "prefix" else torch.iinfo(torch.int64).max
    if kept is None:
        zeros = logits_BSE.new_zeros(B, E)
        kept = Kept(0, torch.zeros(B, dtype=torch.int64, device=logits_BSE.device), zeros, zeros)
    segment_BS = ((kept.count_B.unsqueeze(1) + valid_BS.cumsum(1) - 1).clamp_min(0) // size).clamp_max(last)
    start_B = (kept.count_B // size).clamp_max(last)
    count_B = kept.count_B + valid_BS.sum(1)
    local_BS = (segment_BS - start_B.unsqueeze(1)).clamp_min(0)  # padding right after a whole segment has none
    slots = S // size + 2  # segments that S tokens can touch, and one that begins after them
    sum_BGE = torch.zeros(B, slots, E, dtype=logits_BSE.dtype, device=logits_BSE.device)
    sum_BGE[:, 0] = kept.sum_BE
    sum_BGE = sum_BGE.scatter_add(
        1, local_BS.unsqueeze(-1).expand(-1, -1, E), logits_BSE * valid_BS.unsqueeze(-1).to(logits_BSE.dtype)
    )
    decision_BGE = torch.cat([kept.decision_BE.unsqueeze(1), sum_BGE[:, :-1] / size], 1)  # all but the last are whole

    def at(values_BGE: Tensor, places_BN: Tensor) -> Tensor:
        return values_BGE.gather(1, places_BN.unsqueeze(-1).expand(-1, -1, E))

    next_B1 = ((count_B // size).clamp_max(last) - start_B).unsqueeze(1)
    following = Kept(kept.tokens + S, count_B, at(sum_BGE, next_B1).squeeze(1), at(decision_BGE, next_B1).squeeze(1))
    if rule.first == "own_mean":
        own_BE = sum_BGE[:, 0] / (kept.count_B + (valid_BS & (local_BS == 0)).sum(1)).clamp_min(1).unsqueeze(1)
        starts_B11 = (start_B == 0).view(-1, 1, 1)  # the slots of later forwards begin with later segments
        first_B1E = torch.where(starts_B11, own_BE.detach().unsqueeze(1), decision_BGE[:, :1])
        decision_BGE = torch.cat([first_B1E, decision_BGE[:, 1:]], 1)
    run_BS = torch.arange(B, device=local_BS.device).unsqueeze(1) * slots + local_BS
    return Pooled(at(decision_BGE, local_BS), segment_BS == 0, run_BS, following)


class Router(nn.Module):
    """`W x` of one layer, always in fp32: bf16 logits flip near-ties and differ between recomputations.

    name: its place in the trace, "ffn.3" or "attention.3". decides: the router whose decision this one repeats (it has no
    weights then). logits_of: the router whose logits it takes in place of its own. skip_from: the one whose logits it adds.
    """

    weight: nn.Parameter | Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        name: str,
        rule: Rule,
        decides: str | None = None,
        logits_of: str | None = None,
        skip_from: str | None = None,
    ):
        super().__init__()
        self.num_experts, self.name, self.rule = num_experts, name, rule
        self.decides, self.logits_of, self.skip_from = decides, logits_of, skip_from
        if decides or logits_of or FACTS[rule.kind].weightless:
            self.register_parameter("weight", None)
        elif rule.trained:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        else:  # a buffer: no phase, optimizer or adapter can train it
            self.register_buffer("weight", torch.empty(num_experts, hidden_size))
        biased = bool(rule.bias_rate) and not decides
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32) if biased else None)

    def forward(self, hidden_BSD: Tensor, trace: RoutingTrace | None) -> Routing:
        """The decision for all B·S tokens. Raises ValueError: the kind of router needs what the trace does not have."""
        trace = RoutingTrace() if trace is None else trace
        hidden_BSD = hidden_BSD.unsqueeze(0) if hidden_BSD.dim() == 2 else hidden_BSD
        if self.decides is not None:
            return trace.record(self.name, self._other(trace, self.decides))
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            logits_BSE = self._logits(hidden_BSD, trace)
            expert = trace.forced_expert(self.name)
            if expert is not None:
                places = self.num_experts if FACTS[self.rule.kind].every else self.rule.top_k
                routing = forced(logits_BSE.flatten(0, 1), places, expert)
                rows_BS = torch.arange(len(logits_BSE), device=logits_BSE.device).unsqueeze(1)
                routing = routing._replace(run=rows_BS.expand(logits_BSE.shape[:2]).flatten())
            else:
                routing = self._route(logits_BSE, trace)
        return trace.record(self.name, routing)

    def _other(self, trace: RoutingTrace, name: str) -> Routing:
        if name not in trace.routings:
            raise ValueError(
                f"router {self.name} follows {name}, which has not decided; call the whole model with one trace"
            )
        return trace.routings[name]

    def _logits(self, hidden_BSD: Tensor, trace: RoutingTrace) -> Tensor:
        shape = (*hidden_BSD.shape[:-1], self.num_experts)
        if self.logits_of is not None:
            return self._other(trace, self.logits_of).logits.view(shape)
        if self.weight is None:
            return hidden_BSD.new_zeros(shape, dtype=torch.float32)
        hidden_BSD = hidden_BSD.float()
        if self.training and self.rule.jitter:
            hidden_BSD = hidden_BSD * torch.empty_like(hidden_BSD).uniform_(1 - self.rule.jitter, 1 + self.rule.jitter)
        logits_BSE = F.linear(hidden_BSD, self.weight.float())
        if self.training and self.rule.noise_std:
            logits_BSE = logits_BSE + self.rule.noise_std * torch.randn_like(logits_BSE)
        if self.skip_from is not None:
            logits_BSE = logits_BSE + self._other(trace, self.skip_from).logits.view(shape)
        return logits_BSE

    def _route(self, logits_BSE: Tensor, trace: RoutingTrace) -> Routing:
        (B, S, _), rule = logits_BSE.shape, self.rule
        seen = Seen((B, S), trace.valid_BS, trace.token_ids_BS, self.training, trace.step, self.bias, trace.expert_B)
        if rule.per == "token":
            return self._decide(logits_BSE, seen, trace)
        earlier = (trace.earlier or {}).get(self.name)
        shared = pooled(logits_BSE, seen.valid(logits_BSE), rule, earlier)
        trace.kept[self.name] = shared.kept
        routing = self._decide(shared.logits, seen, trace)._replace(run=shared.run.flatten())
        first_T1 = shared.first.reshape(-1, 1)
        if rule.first == "seed":  # "uniform" needs nothing: a soft router without logits
            start = forced(routing.logits, routing.gates.shape[1], rule.seed)
            gates = torch.where(first_T1, start.gates, routing.gates)
            routing = routing._replace(gates=gates, experts=torch.where(first_T1, start.experts, routing.experts))
        elif rule.first == "base":
            routing = routing._replace(gates=routing.gates.masked_fill(first_T1, 0))
        return routing._replace(decided=~first_T1.squeeze(1))

    def _decide(self, logits_BSE: Tensor, seen: Seen, trace: RoutingTrace) -> Routing:
        """The decision of the table's function; where the trace removes an expert, among the others."""
        removed = trace.removed_expert(self.name)
        if removed is not None:
            if problem := unremovable(self.rule, removed):
                raise ValueError(f"router {self.name}: expert {removed} cannot be removed, {problem}")
            gone_E = torch.arange(self.num_experts, device=logits_BSE.device) == removed
            logits_BSE = logits_BSE.masked_fill(gone_E, -CERTAIN)
            if seen.bias_E is not None:
                seen = seen._replace(bias_E=seen.bias_E.masked_fill(gone_E, -CERTAIN))
        return ROUTERS[self.rule.kind](logits_BSE.flatten(0, 1), self.rule, seen)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.rule.kind}, experts={self.num_experts}, top_k={self.rule.top_k}, {self.rule.gate_scale}"
