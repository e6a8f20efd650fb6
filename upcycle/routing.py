"""Routers: logits -> (gates, experts). Pure functions in one table; what is true of each stands in kinds.py.

A router sees the logits of every token, its `Rule` (settings) and `Seen` (what else it may look at): (T, E) -> Routing.
None of them looks at later tokens, in training or evaluation. router.py holds the module that calls them.
Shapes: B batch, S sequence, T tokens (B·S), E experts, K experts per token.
This file travels inside checkpoints as remote code: it imports `.kinds` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kinds import FACTS

CERTAIN = 1e4  # a logit this far above the others has a softmax of exactly 1, and no NaN in its entropy
TIE = 1e-6  # probabilities closer than that rank as equals: rounding, which differs with the batch, does not rank them
# Who takes the first segment; PoolConfig says what each means.
FIRST = ("seed", "uniform", "base", "own_mean")
DEAD_SHARE = 0.1  # an expert is called dead below this share of the uniform load
HASH_PRIME = 2654435761  # Knuth's multiplicative hash, modulo 2^32


class Routing(NamedTuple):
    """One router's decision for T tokens: `logits` (T, E) in fp32, `gates` (T, K) in fp32, `experts` (T, K) int64.

    A place with gate 0 holds nothing. decided (T,) bool: where the logits decided; None is everywhere. run (T,) int64, where
    tokens share decisions: those with one number, which follow one another, have one.
    """

    logits: Tensor
    gates: Tensor
    experts: Tensor
    decided: Tensor | None = None
    run: Tensor | None = None


class Rule(NamedTuple):
    """The settings of one router. groups: of each expert, the group of which a token takes one at most; None: no such rule.

    per, tokens, first: which tokens share a decision (router.pooled). seed: the seed's expert, -1 if it has none.
    """

    kind: str
    top_k: int = 1
    gate_scale: str = "none"
    trained: bool = True
    capacity_factor: float = 1.5
    bias_rate: float = 0.0
    per: str = "token"
    tokens: int = 256
    first: str = "seed"
    noise_std: float = 0.0
    jitter: float = 0.0
    groups: tuple[int, ...] | None = None
    seed: int = -1


class Seen(NamedTuple):
    """What a router may look at besides its logits.

    shape: (B, S), B·S = T. valid_BS: False on padding, None without any. token_ids_BS: None if only embeddings were given.
    bias_E: added to the probabilities when experts are selected, never to gates. step: optimizer steps taken.
    expert_B: each sequence's expert by its domain, for the oracle.
    """

    shape: tuple[int, int]
    valid_BS: Tensor | None = None
    token_ids_BS: Tensor | None = None
    training: bool = False
    step: int = 0
    bias_E: Tensor | None = None
    expert_B: Tensor | None = None

    def valid(self, like: Tensor) -> Tensor:
        """(B, S) bool."""
        return torch.ones(self.shape, dtype=torch.bool, device=like.device) if self.valid_BS is None else self.valid_BS


def places_taken(routing: Routing) -> Tensor:
    """(T, E): 1 where a token has the expert with a gate that is not 0, and the logits decided so."""
    zeros = torch.zeros_like(routing.logits)
    taken_TK = routing.gates != 0
    if routing.decided is not None:
        taken_TK = taken_TK & routing.decided.unsqueeze(1)
    return zeros.scatter_add(1, routing.experts, taken_TK.to(zeros.dtype))


# ------------------------------------------------------------------------------------------------------------- gates

GATE_SCALES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "none": lambda gates, num_experts: gates,
    "sum_to_one": lambda gates, num_experts: gates / gates.sum(-1, keepdim=True).clamp_min(1e-20),
    "straight_through": lambda gates, num_experts: gates / gates.sum(-1, keepdim=True).clamp_min(1e-20).detach(),
    "compensate": lambda gates, num_experts: gates * (num_experts / gates.shape[-1]),
}


def select(logits_TE: Tensor, rule: Rule, seen: Seen) -> Tensor:
    """(T, K) the K experts with the largest logits.

    With a bias (arXiv:2408.15664) by softmax + bias; with groups, the best of each group only, the first of equals.
    """
    scores_TE = logits_TE if seen.bias_E is None else logits_TE.softmax(-1) + seen.bias_E
    if rule.groups is not None:
        group_E = torch.tensor(rule.groups, device=scores_TE.device)
        other_GE = group_E != torch.arange(max(rule.groups) + 1, device=scores_TE.device).unsqueeze(1)
        best_TG = scores_TE.unsqueeze(1).masked_fill(other_GE, -math.inf).argmax(-1)
        beaten_TE = torch.ones_like(scores_TE, dtype=torch.bool).scatter(1, best_TG, False)
        scores_TE = scores_TE.masked_fill(beaten_TE, -math.inf)
    return scores_TE.topk(rule.top_k, dim=-1).indices


def _certain(experts_T1: Tensor, num_experts: int) -> Routing:
    """One expert a token, with gate 1, whatever any weight says."""
    logits_TE = torch.zeros(len(experts_T1), num_experts, device=experts_T1.device).scatter(1, experts_T1, CERTAIN)
    return Routing(logits_TE, torch.ones_like(experts_T1, dtype=logits_TE.dtype), experts_T1)


# ----------------------------------------------------------------------------------------------------------- routers


def topk_softmax(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """`gates = softmax(topk(W x))`: the K largest logits, then a softmax over them (BTX, arXiv:2403.07816, eq. 3).

    Gates sum to 1. At K = 1 the gate is the constant 1 and carries no gradient to the router.
    """
    experts_TK = select(logits_TE, rule, seen)
    return Routing(logits_TE, logits_TE.gather(1, experts_TK).softmax(-1), experts_TK)


def softmax_topk(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """`gates = topk(softmax(W x))` (BAM, arXiv:2408.08274, and Switch, arXiv:2101.03961), then `gate_scale`:

    none              the probabilities as they are; with a fresh router they sum to about K/E
    sum_to_one        g / Σ g; at K = 1 the constant 1
    straight_through  g / stop_gradient(Σ g): the value of sum_to_one, the gradient of g
    compensate        g · E/K
    """
    experts_TK = select(logits_TE, rule, seen)
    gates_TK = logits_TE.softmax(-1).gather(1, experts_TK)
    return Routing(logits_TE, GATE_SCALES[rule.gate_scale](gates_TK, logits_TE.shape[-1]), experts_TK)


def soft(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """Every expert, weighted by `softmax(W x)`; gates sum to 1 (BTX's "soft" variant; BAM's attention)."""
    experts_TE = torch.arange(logits_TE.shape[-1], device=logits_TE.device).expand(logits_TE.shape)
    return Routing(logits_TE, logits_TE.softmax(-1), experts_TE)


def uniform(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """Every expert with gate 1/E: the average of the experts' outputs. It has no weights."""
    return soft(torch.zeros_like(logits_TE), rule, seen)


def switch(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """Softmax, top-1; in training an expert takes the first C tokens that come to it, the rest pass by the residual.

        C = ceil(capacity_factor · tokens / E)                                     (Switch, arXiv:2101.03961, eq. 3)

    Differs: tokens are those of one sequence, not of a device's batch, so that a token's fate depends on the tokens before
    it and the sequence's length alone; in evaluation nothing is dropped.
    """
    routing = softmax_topk(logits_TE, rule._replace(top_k=1), seen)
    if not seen.training:
        return routing
    valid_BS = seen.valid(logits_TE)
    taken_BSE = F.one_hot(routing.experts.view(seen.shape), logits_TE.shape[-1]) * valid_BS.unsqueeze(-1)
    place_BS = (taken_BSE.cumsum(1) * taken_BSE).sum(-1)  # 1 for the first that came to its expert
    # In float64 and less a rounding: 1.1 · 50 / 11 is five places, not six.
    share_B1 = rule.capacity_factor * valid_BS.sum(1, keepdim=True).double() / logits_TE.shape[-1]
    capacity_B1 = (share_B1 - 1e-9).ceil()
    kept_T1 = (place_BS <= capacity_B1).view(-1, 1)
    return routing._replace(gates=routing.gates * kept_T1)


def sample_top1(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """One expert drawn by the Gumbel-softmax, then `gate_scale`; in evaluation the largest logit with gate 1.

        p = softmax((W x + G) / τ),  G ~ Gumbel(0, 1),  τ = max(0.5, exp(−1e−4 · step))     (BTX, arXiv:2403.07816)

    BTX's first layer is soft: `UpcycledConfig.rule` sees to that.
    """
    if not seen.training:
        return _certain(logits_TE.argmax(-1, keepdim=True), logits_TE.shape[-1])._replace(logits=logits_TE)
    temperature = max(0.5, math.exp(-1e-4 * seen.step))
    gumbel_TE = -torch.empty_like(logits_TE).exponential_().clamp_min(1e-20).log()
    sampled = softmax_topk((logits_TE + gumbel_TE) / temperature, rule._replace(top_k=1), seen)
    return sampled._replace(logits=logits_TE)


def expert_choice(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """Experts choose tokens (arXiv:2202.09368), each in order: expert e takes token t if it is one of its best so far,

        rank of p_e(t) among p_e(0 .. t) ≤ ceil(K · (t + 1) / E)

    where equals, a token that comes again say, count against t. Gates are the probabilities; a token that nobody takes passes by the residual. In evaluation a token takes its top K,
    since generation sees one token at a time. Differs: the paper's experts choose among all tokens of a batch, later ones
    and other sequences included.
    """
    if not seen.training:
        return softmax_topk(logits_TE, rule, seen)
    probs_TE, num_experts = logits_TE.softmax(-1), logits_TE.shape[-1]
    valid_BS = seen.valid(logits_TE)
    probs_BSE = probs_TE.detach().view(*seen.shape, num_experts)
    earlier_SS = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=logits_TE.device).tril()
    counted_BSS = earlier_SS & valid_BS.unsqueeze(1)
    # One expert at a time: (B, S, S) comparisons.
    rank_BSE = torch.stack(
        [((p.unsqueeze(1) > p.unsqueeze(2) - TIE) & counted_BSS).sum(-1) for p in probs_BSE.unbind(-1)], dim=-1
    )
    allowed_BS1 = ((rule.top_k * valid_BS.cumsum(1) + num_experts - 1) // num_experts).unsqueeze(-1)
    taken_TE = (rank_BSE <= allowed_BS1).flatten(0, 1)
    every = soft(logits_TE, rule, seen)
    return every._replace(gates=GATE_SCALES[rule.gate_scale](probs_TE * taken_TE, num_experts))


def hashed(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """A fixed hash of the token's id picks its expert (hash layers, arXiv:2106.04426). It has no weights."""
    if seen.token_ids_BS is None:
        raise ValueError("a hash router needs token ids, got embeddings alone; pass input_ids, or another router")
    mixed_T1 = (seen.token_ids_BS.reshape(-1, 1).long() * HASH_PRIME) % 2**32 // 2**8  # the low bits mix badly
    return _certain(mixed_T1 % logits_TE.shape[-1], logits_TE.shape[-1])


def oracle(logits_TE: Tensor, rule: Rule, seen: Seen) -> Routing:
    """Every token of a sequence to the expert of its domain (RoutingTrace.expert_B). Evaluation only; it has no weights."""
    if seen.training or seen.expert_B is None:
        raise ValueError(
            "an oracle router needs each sequence's expert and is for evaluation only; pass "
            "trace=RoutingTrace(expert_B=...) to a model in eval mode"
        )
    experts_T1 = seen.expert_B.to(logits_TE.device).view(-1, 1).expand(seen.shape).reshape(-1, 1)
    return _certain(experts_T1, logits_TE.shape[-1])


def forced(logits_TE: Tensor, top_k: int, expert: int | Tensor) -> Routing:
    """One-hot: `expert` (for all tokens, or (T, 1)) with gate 1, the other K − 1 places with gate 0."""
    tokens, num_experts = logits_TE.shape
    places = torch.arange(top_k, device=logits_TE.device)
    gates = (places == 0).to(logits_TE.dtype).expand(tokens, top_k)
    return Routing(logits_TE, gates, ((expert + places) % num_experts).expand(tokens, top_k))


ROUTERS: dict[str, Callable[[Tensor, Rule, Seen], Routing]] = {
    "topk_softmax": topk_softmax,
    "softmax_topk": softmax_topk,
    "soft": soft,
    "switch": switch,
    "sample_top1": sample_top1,
    "expert_choice": expert_choice,
    "hash": hashed,
    "uniform": uniform,
    "oracle": oracle,
}


def gates_sum_to_one(rule: Rule, num_experts: int) -> bool:
    """Whether every token's gates sum to 1; those of a softmax over all E experts do. Of sample_top1 in training: its
    evaluation has gate 1."""
    whole = rule.kind == "softmax_topk" and rule.top_k == num_experts
    return whole or not FACTS[rule.kind].scaled or rule.gate_scale in ("sum_to_one", "straight_through")


def impossible(rule: Rule) -> str:
    """Why no router can follow `rule`; "" if one can."""
    kind = FACTS[rule.kind]
    if rule.kind == "expert_choice" and rule.gate_scale in ("straight_through", "compensate"):
        return f"gate_scale={rule.gate_scale!r} is not defined where a token has any number of experts; expected none or sum_to_one"
    if rule.per not in ("token", "segment", "prefix") or rule.first not in FIRST or rule.tokens < 1:
        return (
            f"per={rule.per!r}, tokens={rule.tokens}, first={rule.first!r}; expected token, segment or prefix, at least 1, and "
            f"one of {', '.join(FIRST)}"
        )
    if rule.per != "token" and not (kind.selects or rule.kind == "soft"):
        return f"per={rule.per!r} needs a top-k or soft router, got {rule.kind}, which decides token by token"
    if rule.per != "token" and rule.first == "seed" and rule.seed < 0:
        return "first='seed' needs the seed among the experts' sources; expected it there, or first='uniform' with a soft router"
    if rule.per != "token" and rule.first == "uniform" and not kind.every:
        return "first='uniform' needs a soft router: few experts cannot have equal shares of a token; expected first='seed'"
    if rule.bias_rate and not (kind.selects and rule.trained):
        return (
            f"bias_rate={rule.bias_rate} needs a top-k router that is trained, got {rule.kind}, trained={rule.trained}"
        )
    if rule.groups is not None and not kind.selects:
        return f"one_per_source needs a top-k router, got {rule.kind}, which does not select"
    if rule.groups is not None and rule.top_k > len(set(rule.groups)):
        return f"top_k={rule.top_k} exceeds the {len(set(rule.groups))} sources of which a token takes one expert each"
    return ""


def unremovable(rule: Rule, expert: int) -> str:
    """Why a router cannot decide without `expert`; "" if it can."""
    if FACTS[rule.kind].weightless:
        return f"{rule.kind} decides by no weights"
    if rule.per != "token" and rule.first == "seed" and rule.seed == expert:
        return "the first tokens, about which nothing is known yet, go to it"
    return ""
