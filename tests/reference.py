"""Slow, obvious twins of the library's mathematics: loops over tokens and experts, in float64.

Imports torch and unmodified Hugging Face modules only, nothing of ours: a mistake can't be on both sides.
Shapes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.func import functional_call

IGNORED = -100

Decision = list[tuple[int, Tensor]]  # one token's (expert, gate) pairs, largest first


# ------------------------------------------------------------------------------------------------------------ routers


def softmax(logits: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(logit - max(x.item() for x in logits)) for logit in logits]
    return [e / sum(exponentials) for e in exponentials]


def largest(values: list[Tensor], k: int, groups: list[int] | None = None) -> list[int]:
    """The places of the k largest values, largest first; with groups, not two of one group."""
    order, used, taken = (
        sorted(range(len(values)), key=lambda e: -float(torch.as_tensor(values[e]).detach())),
        set(),
        [],
    )
    for e in order:
        if groups is None or groups[e] not in used:
            used.add(groups[e] if groups else e)
            taken.append(e)
    return taken[:k]


def selected(logits: list[Tensor], k: int, bias: list[float] | None, groups: list[int] | None) -> list[int]:
    if bias is None:
        return largest(logits, k, groups)
    return largest([p + b for p, b in zip(softmax(logits), bias, strict=True)], k, groups)


def topk_softmax(logits_E: Tensor, k: int, gate_scale: str = "none", bias=None, groups=None) -> Decision:
    """BTX: the K largest logits, then a softmax over them."""
    logits = list(logits_E)
    chosen = selected(logits, k, bias, groups)
    return list(zip(chosen, softmax([logits[e] for e in chosen]), strict=True))


def softmax_topk(logits_E: Tensor, k: int, gate_scale: str = "none", bias=None, groups=None) -> Decision:
    """BAM and Switch: a softmax over all, then its K largest; `gate_scale` says what happens to their sum."""
    probabilities = softmax(list(logits_E))
    chosen = selected(list(logits_E), k, bias, groups)
    gates = [probabilities[e] for e in chosen]
    total = sum(gates)
    if gate_scale == "sum_to_one":
        gates = [g / total for g in gates]
    elif gate_scale == "straight_through":
        gates = [g / total.item() for g in gates]
    elif gate_scale == "compensate":
        gates = [g * len(probabilities) / k for g in gates]
    else:
        assert gate_scale == "none", gate_scale
    return list(zip(chosen, gates, strict=True))


def soft(logits_E: Tensor, k: int | None = None, gate_scale: str = "none", bias=None, groups=None) -> Decision:
    """Every expert with its probability."""
    return list(enumerate(softmax(list(logits_E))))


# Those that look at one token at a time, and those that look at its sequence.
ROUTERS = {"topk_softmax": topk_softmax, "softmax_topk": softmax_topk, "soft": soft}


def one(dtype=torch.float64) -> Tensor:
    return torch.ones((), dtype=dtype)


def switch(sequence: Sequence, k: int, gate_scale: str, capacity_factor: float = 1.5) -> list[Decision]:
    """Top-1; while training an expert's queue is full after ceil(factor · tokens / E), in the order of the text."""
    num_experts, queue, decisions = sequence.logits[0].shape[0], {}, []
    capacity = math.ceil(Fraction(str(capacity_factor)) * sum(sequence.valid) / num_experts)
    for logits, ok in zip(sequence.logits, sequence.valid, strict=True):
        ((expert, gate),) = softmax_topk(logits, 1, gate_scale)
        queue[expert] = queue.get(expert, 0) + ok
        dropped = sequence.training and ok and queue[expert] > capacity
        decisions.append([(expert, gate * 0 if dropped else gate)])
    return decisions


def sample_top1(sequence: Sequence, k: int, gate_scale: str) -> list[Decision]:
    """The largest logit; while training after Gumbel noise, with the gate of the tempered softmax."""
    decisions = []
    temperature = max(0.5, math.exp(-1e-4 * sequence.step))
    for t, logits in enumerate(sequence.logits):
        if sequence.training:
            noisy = (logits - torch.log(sequence.exponential[t].double())) / temperature
            decisions.append(softmax_topk(noisy, 1, gate_scale))
        else:
            decisions.append([(largest(list(logits), 1)[0], one())])
    return decisions


def expert_choice(sequence: Sequence, k: int, gate_scale: str) -> list[Decision]:
    """While training, expert e takes token t if fewer than ceil(k (t + 1) / E) of the tokens before it suit e as well."""
    if not sequence.training:
        return [softmax_topk(logits, k, gate_scale) for logits in sequence.logits]
    num_experts, probabilities = sequence.logits[0].shape[0], [softmax(list(x)) for x in sequence.logits]
    decisions, real = [], [t for t, ok in enumerate(sequence.valid) if ok]
    for t in range(len(sequence.logits)):
        seen = [s for s in real if s <= t]
        allowed = math.ceil(k * len(seen) / num_experts)
        taken = []
        for e in range(num_experts):
            rank = sum(probabilities[s][e].item() > probabilities[t][e].item() - 1e-6 for s in seen)  # equals count
            if rank <= allowed:
                taken.append((e, probabilities[t][e]))
        total = sum(g for _, g in taken)
        decisions.append([(e, g / total) for e, g in taken] if gate_scale == "sum_to_one" else taken)
    return decisions


def hashed(sequence: Sequence, k: int, gate_scale: str) -> list[Decision]:
    """Knuth's multiplicative hash of the token id, modulo 2^32, without its low eight bits."""
    num_experts = sequence.logits[0].shape[0]
    return [[((token * 2654435761 % 2**32 >> 8) % num_experts, one())] for token in sequence.ids]


def uniform(sequence: Sequence, k: int, gate_scale: str) -> list[Decision]:
    num_experts = sequence.logits[0].shape[0]
    return [[(e, one() / num_experts) for e in range(num_experts)] for _ in sequence.logits]


def oracle(sequence: Sequence, k: int, gate_scale: str) -> list[Decision]:
    return [[(sequence.expert, one())] for _ in sequence.logits]


SEQUENCE_ROUTERS = {
    "switch": switch,
    "sample_top1": sample_top1,
    "expert_choice": expert_choice,
    "hash": hashed,
    "uniform": uniform,
    "oracle": oracle,
}


@dataclass
class Sequence:
    """One sequence as a router sees it. exponential: the draws of its Gumbel noise."""

    logits: list[Tensor]
    valid: list[bool]
    ids: list[int]
    training: bool = False
    step: int = 0
    exponential: Tensor | None = None
    expert: int | None = None


def pooled(sequence: Sequence, per: str, tokens: int) -> list[Tensor | None]:
    """By which logits each token is routed: the mean of the segment before its own; None in the first segment."""
    place, places = -1, []
    for ok in sequence.valid:
        place += ok
        segment = max(place, 0) // tokens
        places.append(min(segment, 1) if per == "prefix" else segment)
    means: list[Tensor | None] = []
    for segment in places:
        rows = zip(sequence.logits, places, sequence.valid, strict=True)
        before = [logits for logits, other, ok in rows if other == segment - 1 and ok]
        means.append(sum(before) / len(before) if segment > 0 else None)
    return means


def decide(sequence: Sequence, kind: str, k: int, gate_scale: str = "none", **rule) -> list[Decision]:
    """The decision of each token. rule: per, tokens, first, seed; bias, groups; capacity_factor."""
    per, tokens = rule.pop("per", "token"), rule.pop("tokens", None)
    first, seed = rule.pop("first", None), rule.pop("seed", None)
    if kind in SEQUENCE_ROUTERS:
        return SEQUENCE_ROUTERS[kind](sequence, k, gate_scale, **rule)
    if per == "token":
        return [ROUTERS[kind](logits, k, gate_scale, **rule) for logits in sequence.logits]
    num_experts = sequence.logits[0].shape[0]
    start = [(seed, one())] if first == "seed" else [(e, one() / num_experts) for e in range(num_experts)]
    return [
        start if logits is None else ROUTERS[kind](logits, k, gate_scale, **rule)
        for logits in pooled(sequence, per, tokens)
    ]


# ------------------------------------------------------------------------------------------------------------- losses


def gate_load(decision: Decision, num_experts: int) -> Tensor:
    """(E,): BTX's load of one token, its gates."""
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([sum([g for e, g in decision if e == expert], zero) for expert in range(num_experts)])


def assignment_load(decision: Decision, num_experts: int) -> Tensor:
    """(E,): Switch's load of one token, 1/K on each chosen expert."""
    chosen = [e for e, _ in decision]
    return torch.tensor([chosen.count(e) / len(chosen) for e in range(num_experts)], dtype=torch.float64)


LOADS = {"btx": gate_load, "switch": assignment_load}


def balance_loss(layers: list[tuple[Tensor, list[Decision]]], valid: list[list[bool]], kind: str, scope: str) -> Tensor:
    """E · Σ_e mean(load_e) · mean(prob_e), per group of tokens; groups averaged by their tokens, then layers averaged.

    layers: each layer's logits (B·S, E) and its B·S decisions. valid: B rows of S. Groups: each sequence, or all.
    """
    sequence = len(valid[0])
    rows = [[b * sequence + s for s in range(sequence) if row[s]] for b, row in enumerate(valid)]
    groups = rows if scope == "sequence" else [[t for row in rows for t in row]]
    tokens = sum(len(group) for group in groups)
    total = torch.zeros((), dtype=torch.float64)
    for logits_TE, decisions in layers:
        num_experts = logits_TE.shape[-1]
        for group in groups:
            if not group:
                continue
            load = sum(LOADS[kind](decisions[t], num_experts) for t in group) / len(group)
            probability = sum(torch.stack(softmax(list(logits_TE[t].double()))) for t in group) / len(group)
            loss = num_experts * sum(load[e] * probability[e] for e in range(num_experts))
            total = total + loss * len(group) / tokens / len(layers)
    return total


def z_loss(layers: list[Tensor], valid: list[list[bool]]) -> Tensor:
    """Mean over valid tokens, then over layers, of (log Σ_e exp logit_e)²."""
    flat = [ok for row in valid for ok in row]
    total = torch.zeros((), dtype=torch.float64)
    for logits_TE in layers:
        for t, ok in enumerate(flat):
            if ok:
                total = total + torch.log(sum(torch.exp(x) for x in logits_TE[t].double())) ** 2
    return total / sum(flat) / len(layers)


def similarity_loss(layers: list[Tensor], valid: list[list[bool]]) -> Tensor:
    """Half the squared distance of two neighbouring layers' softmax, mean over valid tokens, then over pairs of layers."""
    flat = [ok for row in valid for ok in row]
    total = torch.zeros((), dtype=torch.float64)
    for before, after in itertools.pairwise(layers):
        for t, ok in enumerate(flat):
            if ok:
                pairs = zip(softmax(list(before[t].double())), softmax(list(after[t].double())), strict=True)
                total = total + sum((p - q) ** 2 for p, q in pairs) / 2
    return total / sum(flat) / (len(layers) - 1)


def entropy_loss(layers: list[Tensor], valid: list[list[bool]]) -> Tensor:
    """Mean over valid tokens, then over layers, of −Σ p log p in nats."""
    flat = [ok for row in valid for ok in row]
    total = torch.zeros((), dtype=torch.float64)
    for logits_TE in layers:
        for t, ok in enumerate(flat):
            if ok:
                total = total - sum(p * torch.log(p) for p in softmax(list(logits_TE[t].double())))
    return total / sum(flat) / len(layers)


def next_token_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, int]:
    """(Σ −log p of each labelled next token, in nats; their number). labels are not shifted; IGNORED has no target."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(labels_BS.shape[0]):
        for s in range(labels_BS.shape[1] - 1):
            label = labels_BS[b, s + 1].item()
            if label != IGNORED:
                logits = logits_BSV[b, s].double()
                largest_logit = logits.max().item()
                total = total + torch.log(torch.exp(logits - largest_logit).sum()) + largest_logit - logits[label]
                count += 1
    return total, count


# --------------------------------------------------------------------------------------------------- sublayers, model


def moe_feed_forward(hidden_TD: Tensor, decisions: list[Decision], mlps: list[nn.Module]) -> Tensor:
    """Each token: the sum over its experts of gate · MLP(token)."""
    return torch.stack(
        [
            sum((gate * mlps[expert](x) for expert, gate in decision), 0 * x)
            for x, decision in zip(hidden_TD, decisions, strict=True)
        ]
    )


def route(hidden_TD: Tensor, weight_ED: Tensor, router: str, k: int, gate_scale: str) -> tuple[Tensor, list[Decision]]:
    """(T, E) logits and the decision of each token."""
    logits = hidden_TD.double() @ weight_ED.double().T
    return logits, [ROUTERS[router](row, k, gate_scale) for row in logits]


def mixture_of_attention(hidden_BSD: Tensor, decisions: list[list[Decision]], attentions: list) -> Tensor:
    """Σ_e g_e(x) · Attn_e(x) with the gates of the query token; each expert attends over the whole sequence."""
    outputs = [attend(hidden_BSD) for attend in attentions]
    rows = [
        torch.stack(
            [sum((g * outputs[e][b, s] for e, g in decision), 0 * hidden_BSD[b, s]) for s, decision in enumerate(row)]
        )
        for b, row in enumerate(decisions)
    ]
    return torch.stack(rows)


def soft_mixture_of_attention(
    hidden_BSD: Tensor, weight_ED: Tensor, attentions: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    """The same with g = softmax(W x)."""
    decisions = [[soft(weight_ED.double() @ x.double()) for x in row] for row in hidden_BSD]
    return mixture_of_attention(hidden_BSD, decisions, attentions)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, S, H, d) of query (B, H, S, d), key and value (B, K, S, d): each query over the keys up to its own, one at a time."""
    (batch, heads, length, _), group = query.shape, query.shape[1] // key.shape[1]
    rows = []
    for b in range(batch):
        for s in range(length):
            for h in range(heads):
                scores = [scale * (query[b, h, s] * key[b, h // group, t]).sum() for t in range(s + 1)]
                rows.append(sum(p * value[b, h // group, t] for t, p in enumerate(softmax(scores))))
    return torch.stack(rows).view(batch, length, heads, -1)


def causal_mask(attention_mask: list[list[int]]) -> Tensor:
    """(B, 1, S, S) to be added to attention scores: 0 where the key is a real token at or before the query.

    Elsewhere fp32's lowest number: Hugging Face's eager softmax runs in fp32, and −inf in a whole row would be NaN.
    """
    sequence = len(attention_mask[0])
    mask = torch.full((len(attention_mask), 1, sequence, sequence), torch.finfo(torch.float32).min, dtype=torch.float64)
    for b, row in enumerate(attention_mask):
        for query in range(sequence):
            for key in range(query + 1):
                if row[key]:
                    mask[b, 0, query, key] = 0
    return mask


def average(models: list[nn.Module]) -> nn.Module:
    """A model whose every tensor is the mean of the models'."""
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.zero_()
            for model in models:
                parameter += model.get_parameter(name) / len(models)
    return merged


def attention_with_shared_kv(own: nn.Module, shared: nn.Module) -> dict[str, Tensor]:
    """The parameters of an attention expert that has its own Q and O and takes K and V from `shared`."""
    own_parameters, shared_parameters = dict(own.named_parameters()), dict(shared.named_parameters())
    mixed = {}
    for name, parameter in own_parameters.items():
        if name.startswith(("k_proj", "v_proj", "k_norm", "k_layernorm")):
            mixed[name] = shared_parameters[name]
        elif name.startswith("query_key_value"):  # GPT-NeoX: rows head by head, each head's query, key, value
            rows, size = [], own.head_size
            for start in range(0, parameter.shape[0], 3 * size):
                rows.append(parameter[start : start + size])
                rows.append(shared_parameters[name][start + size : start + 3 * size])
            mixed[name] = torch.cat(rows)
        elif name.startswith("qkv_proj"):  # Phi-3: all query rows, then all key rows, then all value rows
            queries = own.o_proj.weight.shape[1]
            mixed[name] = torch.cat([parameter[:queries], shared_parameters[name][queries:]])
        elif name.startswith("c_attn"):  # GPT-2: the same, in columns; its biases are 1-D
            queries = own.c_proj.weight.shape[0]
            mixed[name] = torch.cat([parameter[..., :queries], shared_parameters[name][..., queries:]], dim=-1)
        else:
            mixed[name] = parameter
    return mixed


class FamilyMixture:
    """The mixture of any family's dense models, in float64: the averaged model's own layers, sublayers as explicit sums.

    parts(model): each layer's (attention, MLP). attention_routers: None leaves the averaged attention ("merged").
    """

    def __init__(self, models, parts, ffn_routers, attention_routers, k, kv="expert"):
        self.experts = [copy.deepcopy(model).double() for model in models]
        self.rest = average(self.experts)
        for model in [self.rest, *self.experts]:
            model.set_attn_implementation("eager")
        self.ffn_routers = [w.detach().double().clone().requires_grad_() for w in ffn_routers]
        self.attention_routers = [w.detach().double().clone().requires_grad_() for w in attention_routers or []]
        self.k, self.kv = k, kv
        layers = zip(parts(self.rest), *[parts(expert) for expert in self.experts], strict=True)
        for index, ((attention, mlp), *experts) in enumerate(layers):
            mlp.forward = self._feed_forward(index, [one for _, one in experts])
            if self.attention_routers:
                attention.forward = self._attend(index, attention, [one for one, _ in experts])

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.rest(input_ids, use_cache=False).logits

    def _feed_forward(self, index: int, mlps: list[nn.Module]):
        def forward(x: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            _, decisions = route(tokens, self.ffn_routers[index], "topk_softmax", self.k, "none")
            return moe_feed_forward(tokens, decisions, mlps).view_as(x)

        return forward

    def _attend(self, index: int, shared: nn.Module, attentions: list[nn.Module]):
        def forward(*args, **kwargs):
            x = args[0] if args else kwargs.pop("hidden_states")

            def expert(own):
                own_kv = dict(own.named_parameters())
                parameters = attention_with_shared_kv(own, shared) if self.kv == "shared" else own_kv
                return lambda x: functional_call(own, parameters, (x, *args[1:]), kwargs)[0]

            return soft_mixture_of_attention(x, self.attention_routers[index], [expert(a) for a in attentions]), None

        return forward


def feed_forward_of_units(mlp: nn.Module, down: str, units: list[int], x: Tensor, of: int) -> Tensor:
    """The MLP with all hidden units but `units` silenced, and 1/of of the last bias."""

    def silence(module, args):
        (hidden,) = args
        kept = torch.zeros_like(hidden)
        for unit in units:
            kept[..., unit] = hidden[..., unit]
        return (kept,)

    projection = getattr(mlp, down)
    handle = projection.register_forward_pre_hook(silence)
    out = mlp(x)
    handle.remove()
    return out if projection.bias is None else out - projection.bias + projection.bias / of


Part = tuple[str, list[int], int]  # hidden units of a model's MLP, which is cut into so many parts


class PlacedMixture:
    """A mixture of any family's dense models, in float64, whose experts are parts of MLPs, in some layers.

    models: by name. parts(model): each layer's (attention, MLP). down: what the MLP calls its last projection. merged:
    names of the models that the rest is averaged of. experts: of each, its parts; scale multiplies their outputs. ffn_routers:
    of each mixture layer. attention: names of the models of the attention experts, if any. shared: a model's name, or
    "merged", beside the experts; gate "half" or "sum". forced: (feed-forward expert, attention expert) of all tokens.
    """

    def __init__(
        self, models: dict[str, nn.Module], parts, down: str, merged: list[str], experts: list[list[Part]],
        ffn_routers: dict[int, Tensor], router: str = "topk_softmax", k: int = 2, gate_scale: str = "none", scale: float = 1.0,
        attention: list[str] | None = None, attention_routers: dict[int, Tensor] | None = None,
        shared: str = "none", gate: str = "half", forced: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.models = {name: copy.deepcopy(model).double() for name, model in models.items()}
        self.rest = average([self.models[name] for name in merged])
        for model in [self.rest, *self.models.values()]:
            model.set_attn_implementation("eager")
        self.down, self.experts, self.scale, self.forced = down, experts, scale, forced
        self.router, self.k, self.gate_scale = router, k, gate_scale
        own = {name: parts(model) for name, model in self.models.items()}
        for layer, weight in ffn_routers.items():
            averaged_attention, averaged_mlp = parts(self.rest)[layer]
            mlps = {name: found[layer][1] for name, found in own.items()}
            beside = None if shared == "none" else copy.deepcopy(averaged_mlp) if shared == "merged" else mlps[shared]
            averaged_mlp.forward = self._feed_forward(mlps, weight.double(), beside, gate)
            if attention:
                attentions = [own[name][layer][0] for name in attention]
                averaged_attention.forward = self._attend(attentions, attention_routers[layer].double())

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.rest(input_ids, use_cache=False).logits

    def _feed_forward(self, mlps: dict[str, nn.Module], weight_ED: Tensor, beside: nn.Module | None, gate: str):
        def forward(x: Tensor) -> Tensor:
            outputs = []
            for parts in self.experts:
                made = [feed_forward_of_units(mlps[name], self.down, units, x, of) for name, units, of in parts]
                outputs.append(self.scale * sum(made))
            flat = [output.flatten(0, 1) for output in outputs]
            if self.forced is not None:
                routed = outputs[self.forced[0]]
            else:
                _, decisions = route(x.flatten(0, 1), weight_ED, self.router, self.k, self.gate_scale)
                rows = [sum(g * flat[e][t] for e, g in decision) for t, decision in enumerate(decisions)]
                routed = torch.stack(rows).view_as(x)
            if beside is None:
                return routed
            return 0.5 * beside(x) + 0.5 * routed if gate == "half" else beside(x) + routed

        return forward

    def _attend(self, attentions: list[nn.Module], weight_ED: Tensor):
        def forward(*args, **kwargs):
            x = args[0] if args else kwargs.pop("hidden_states")
            if self.forced is not None:
                return attentions[self.forced[1]](x, *args[1:], **kwargs)
            each = [lambda x, own=own: own(x, *args[1:], **kwargs)[0] for own in attentions]
            return soft_mixture_of_attention(x, weight_ED, each), None

        return forward


class ReferenceMixture:
    """The mixture of dense Llama or GPT-NeoX causal LMs, in float64, with the residual structure written out.

    `rest` holds the averaged tensors; `experts` the branches, whose MLPs (and attentions) are used as they are.
    ffn_routers, attention_routers: one (E, D) weight a layer. attention: "merged" | "mixture"; kv: "expert" | "shared".
    forced sends every token to that expert with gate 1. After a forward, `ffn` holds each layer's (logits, decisions), and
    `seen` what each layer's attention and feed-forward got, (B, S, D) by ("attention" | "ffn", layer).
    decide(part, layer, hidden_BSD) -> decisions by row and token, in place of `router`, for both parts.
    """

    def __init__(
        self, models, ffn_routers, router=None, k=None, gate_scale="none", attention="merged", kv="expert",
        attention_routers=None, decide=None,
    ):  # fmt: skip
        self.decide = decide
        self.experts = [copy.deepcopy(model).double() for model in models]
        self.rest = average(self.experts)
        for model in [self.rest, *self.experts]:
            model.set_attn_implementation("eager")
        self.ffn_routers = [w.detach().double().clone().requires_grad_() for w in ffn_routers]
        self.attention_routers = [w.detach().double().clone().requires_grad_() for w in attention_routers or []]
        self.router, self.k, self.gate_scale, self.attention, self.kv = router, k, gate_scale, attention, kv
        self.forced: int | None = None
        self.seen: dict[tuple[str, int], Tensor] = {}
        self.neox = self.rest.config.model_type == "gpt_neox"

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        decoder = self.rest.gpt_neox if self.neox else self.rest.model
        hidden = (decoder.embed_in if self.neox else decoder.embed_tokens)(input_ids)
        context = {
            "attention_mask": causal_mask(mask.tolist()),
            "position_embeddings": decoder.rotary_emb(hidden, position_ids=position_ids),
        }
        self.ffn, self.seen = [], {}
        for index, layer in enumerate(decoder.layers):
            attended = self.attend(index, layer.input_layernorm(hidden), context)
            if self.neox and self.rest.config.use_parallel_residual:
                hidden = hidden + attended + self._feed_forward(index, layer.post_attention_layernorm(hidden))
            else:
                hidden = hidden + attended
                hidden = hidden + self._feed_forward(index, layer.post_attention_layernorm(hidden))
        hidden = (decoder.final_layer_norm if self.neox else decoder.norm)(hidden)
        return self.rest.lm_head(hidden)

    def _layer(self, model, index):
        return (model.gpt_neox if self.neox else model.model).layers[index]

    def _attention_of(self, model, index):
        layer = self._layer(model, index)
        return layer.attention if self.neox else layer.self_attn

    def attend(self, index: int, x: Tensor, context: dict) -> Tensor:
        self.seen["attention", index] = x
        shared = self._attention_of(self.rest, index)
        if self.attention == "merged":
            return shared(x, **context)[0]

        def expert_attention(model):
            own = self._attention_of(model, index)
            parameters = attention_with_shared_kv(own, shared) if self.kv == "shared" else dict(own.named_parameters())
            return lambda x: functional_call(own, parameters, (x,), context)[0]

        attentions = [expert_attention(model) for model in self.experts]
        if self.forced is not None:
            return attentions[self.forced](x)
        if self.decide is not None:
            return mixture_of_attention(x, self.decide("attention", index, x), attentions)
        return soft_mixture_of_attention(x, self.attention_routers[index], attentions)

    def _feed_forward(self, index: int, x: Tensor) -> Tensor:
        self.seen["ffn", index] = x
        mlps = [self._layer(model, index).mlp for model in self.experts]
        if self.forced is not None:
            return mlps[self.forced](x)
        tokens = x.flatten(0, 1)
        if self.decide is not None:
            decisions = [decision for row in self.decide("ffn", index, x) for decision in row]
            return moe_feed_forward(tokens, decisions, mlps).view_as(x)
        logits, decisions = route(tokens, self.ffn_routers[index], self.router, self.k, self.gate_scale)
        self.ffn.append((logits, decisions))
        return moe_feed_forward(tokens, decisions, mlps).view_as(x)


# ------------------------------------------------------------------------------------------------ routers from texts


@torch.no_grad()
def mean_seen(
    mixture: ReferenceMixture, texts: list[list[int]], expert: int, place: tuple[str, int], kind: str
) -> Tensor:
    """(D,): what the router at `place` sees of an expert's texts, one at a time, while everything goes to that expert.

    hidden_mean: the mean over texts of each one's mean over tokens; hidden_last: of its last token; domain_centroid: the
    mean over all tokens of all texts; prompt_embedding: as hidden_mean, of the embeddings.
    """
    embedding = mixture.rest.get_input_embeddings().weight
    of_texts, of_tokens = [], []
    mixture.forced = expert
    for ids in texts:
        mixture.logits(torch.tensor([ids]))
        states = [embedding[i] for i in ids] if kind == "prompt_embedding" else list(mixture.seen[place][0])
        of_tokens += states
        of_texts.append(states[-1] if kind == "hidden_last" else sum(states) / len(states))
    mixture.forced = None
    counted = of_tokens if kind == "domain_centroid" else of_texts
    return sum(counted) / len(counted)


def rows_towards(means: list[Tensor], std: float) -> list[Tensor]:
    """From the mean of all means to each, at right angles to that mean, with norm std · √D."""
    size = len(means[0])
    origin = [sum(mean[i].item() for mean in means) / len(means) for i in range(size)]
    rows = []
    for mean in means:
        away = [mean[i].item() - origin[i] for i in range(size)]
        along = sum(a * o for a, o in zip(away, origin, strict=True)) / sum(o * o for o in origin)
        away = [a - along * o for a, o in zip(away, origin, strict=True)]
        length = math.sqrt(sum(a * a for a in away))
        rows.append(torch.tensor([std * math.sqrt(size) * a / length for a in away], dtype=torch.float64))
    return rows


# ------------------------------------------------------------------------------------------------- training, merging


def clip_and_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    decay: list[float] | float = 0.1,
    max_norm: float = math.inf,
) -> tuple[list[Tensor], float]:
    """One step of AdamW (decoupled weight decay) after clipping the global norm. `states` start as empty dicts.

    Returns the new parameters and the norm before clipping.
    """
    norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
    scale = min(1.0, max_norm / (norm + 1e-6))
    decays = decay if isinstance(decay, list) else [decay] * len(parameters)
    new = []
    for p, g, state, wd in zip(parameters, gradients, states, decays, strict=True):
        p, g = p.double(), g.double() * scale
        state["step"] = step = state.get("step", 0) + 1
        state["m"] = m = betas[0] * state.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
        state["v"] = v = betas[1] * state.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g * g
        p = p - lr * wd * p
        new.append(p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps))
    return new, norm


def weighted_average(tensors: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """Σ w_i θ_i, entry by entry; uniform weights by default."""
    weights = weights or [1 / len(tensors)] * len(tensors)
    flat = [t.double().flatten().tolist() for t in tensors]
    merged = [sum(w * values[i] for w, values in zip(weights, flat, strict=True)) for i in range(len(flat[0]))]
    return torch.tensor(merged, dtype=torch.float64).view(tensors[0].shape)


# ------------------------------------------------------------------------------------------------------------ windows


def windows(tokens, sequence_length: int, stride: int | None = None):
    """(inputs, labels) of one window after the other: inputs padded with 0; labels, the next tokens, -100 where there is
    none and where an earlier window predicted it."""
    stream, start, predicted = [int(token) for token in tokens], 0, 1
    while predicted < len(stream):
        inputs, labels = [], []
        for place in range(start, start + sequence_length):
            inside = place + 1 < len(stream)
            inputs.append(stream[place] if inside else 0)
            labels.append(stream[place + 1] if inside and place + 1 >= predicted else -100)
        yield torch.tensor(inputs), torch.tensor(labels)
        predicted, start = start + sequence_length + 1, start + (stride or sequence_length)


# ---------------------------------------------------------------------------------------------------------- ensembles


@torch.no_grad()
def branch_train_merge(models: list[nn.Module], window: list[int], top_k: int | None = None) -> list[float]:
    """Nats of window[1], window[2], ...: every next token from a mixture of the models' probabilities, weighed by the
    product of the probabilities that each gave to the tokens before it. Probabilities, not logarithms: for short windows."""
    merits, nats = [1.0 for _ in models], []
    for position in range(1, len(window)):
        chances = []
        for model in models:
            logits = model(torch.tensor([window[:position]])).logits[0, -1].double()
            chances.append((logits.exp() / logits.exp().sum())[window[position]].item())
        counted = largest(merits, top_k or len(models))
        total = sum(merits[index] for index in counted)
        nats.append(-math.log(sum(merits[index] / total * chances[index] for index in counted)))
        merits = [merit * chance for merit, chance in zip(merits, chances, strict=True)]
    return nats


# ------------------------------------------------------------------------------------------------------------ merging
# One tensor of N models as flat lists of floats, in float64. A model is (weight, entries); matrices are lists of rows.


def entries_of(tensor: Tensor) -> list[float]:
    return tensor.double().flatten().tolist()


def differences(models: list[tuple[float, list[float]]], seed: list[float]) -> list[tuple[float, list[float]]]:
    return [(weight, [x - s for x, s in zip(theta, seed, strict=True)]) for weight, theta in models]


def task_arithmetic(models, seed, scale) -> list[float]:
    taus = differences(models, seed)
    return [s + scale * sum(w * tau[j] for w, tau in taus) for j, s in enumerate(seed)]


def trimmed(tau: list[float], density: float) -> list[float]:
    """Only the largest stay, one after the other; of equal ones the first."""
    count = max(1, math.floor(Fraction(str(density)) * len(tau)))
    order = sorted(range(len(tau)), key=lambda j: (-abs(tau[j]), j))
    return [value if j in order[:count] else 0.0 for j, value in enumerate(tau)]


def elected_mean(taus: list[tuple[float, list[float]]]) -> list[float]:
    merged = []
    for j in range(len(taus[0][1])):
        votes = sum(w * tau[j] for w, tau in taus)
        voices = [(w, tau[j]) for w, tau in taus if votes * tau[j] > 0]
        merged.append(sum(w * x for w, x in voices) / sum(w for w, _ in voices) if voices else 0.0)
    return merged


def ties(models, seed, density, scale) -> list[float]:
    kept = [(w, trimmed(tau, density)) for w, tau in differences(models, seed)]
    return [s + scale * x for s, x in zip(seed, elected_mean(kept), strict=True)]


def philox(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) of the counters 1, 2, ...: four words each."""
    whole, words = 2**64 - 1, []
    for counter in itertools.count(1):
        if len(words) >= count:
            return words[:count]
        c, k = [counter, 0, 0, 0], list(key)
        for _ in range(10):
            high, low = divmod(0xD2E7470EE14C6C93 * c[0], 2**64), divmod(0xCA5A826395121157 * c[2], 2**64)
            c = [low[0] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], high[1]]
            k = [k[0] + 0x9E3779B97F4A7C15 & whole, k[1] + 0xBB67AE8584CAA73B & whole]
        words += c
    raise AssertionError


def stays(count: int, drop: float, branch: str, tensor: str, rng_seed: int) -> list[bool]:
    """Which entries DARE leaves: those whose word, read as a number from 0 to 1, is p or more."""
    digest = hashlib.sha256("\x1f".join(["dare", str(rng_seed), branch, tensor]).encode()).digest()
    words = philox((int.from_bytes(digest[:8], "little"), 0), count)
    return [Fraction(word, 2**64) >= Fraction(drop) for word in words]


def dropped(named, seed, drop, tensor, rng_seed) -> list[tuple[float, list[float]]]:
    """named: branch → (weight, entries)."""
    taus = []
    for branch, model in named.items():
        ((weight, tau),) = differences([model], seed)
        mask = stays(len(tau), drop, branch, tensor, rng_seed)
        taus.append((weight, [x / (1 - drop) if stay else 0.0 for x, stay in zip(tau, mask, strict=True)]))
    return taus


def dare(named, seed, drop, combine, scale, tensor, rng_seed) -> list[float]:
    taus = dropped(named, seed, drop, tensor, rng_seed)
    total = sum(w for w, _ in taus) if combine == "average" else 1.0
    return [s + scale * sum(w * tau[j] for w, tau in taus) / total for j, s in enumerate(seed)]


def dare_ties(named, seed, drop, scale, tensor, rng_seed) -> list[float]:
    mean = elected_mean(dropped(named, seed, drop, tensor, rng_seed))
    return [s + scale * x for s, x in zip(seed, mean, strict=True)]


def fisher(models, fishers: list[list[float]], norms: list[float], floor: float) -> list[float]:
    merged = []
    for j in range(len(models[0][1])):
        shares = [w * max(f[j], floor) / norm for (w, _), f, norm in zip(models, fishers, norms, strict=True)]
        merged.append(sum(c * theta[j] for c, (_, theta) in zip(shares, models, strict=True)) / sum(shares))
    return merged


def gradient_matching(models, hessians, seed, seed_hessian, alpha, damping) -> list[float]:
    merged = []
    for j, s in enumerate(seed):
        start = seed_hessian[j] + damping
        below = start + sum(alpha * w * h[j] for (w, _), h in zip(models, hessians, strict=True))
        above = sum(alpha * w * (start + h[j]) * (theta[j] - s) for (w, theta), h in zip(models, hessians, strict=True))
        merged.append(s + above / below)
    return merged


def product(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    return [[sum(row[k] * right[k][j] for k in range(len(right))) for j in range(len(right[0]))] for row in left]


def solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination with the largest pivot."""
    rows, n = [[*row, value] for row, value in zip(matrix, right, strict=True)], len(matrix)
    for i in range(n):
        best = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[best] = rows[best], rows[i]
        for r in range(n):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def shrunk(matrix: list[list[float]], factor: float) -> list[list[float]]:
    return [[x if i == j else factor * x for j, x in enumerate(row)] for i, row in enumerate(matrix)]


def regmean(models, grams: list[list[list[float]]], off_diagonal: float, ridge: float) -> list[list[float]]:
    """models: (weight, W as rows of inputs). Column by column of W, with the ridge on both sides of the equation."""
    weights = [w for w, _ in models]
    grams = [[[w * x for x in row] for row in shrunk(g, off_diagonal)] for w, g in zip(weights, grams, strict=True)]
    size = len(grams[0])
    total = [[sum(g[i][j] for g in grams) for j in range(size)] for i in range(size)]
    added = ridge * sum(total[i][i] for i in range(size)) / size
    columns = []
    for column in range(len(models[0][1][0])):
        right = []
        for i in range(size):
            mean = sum(w * theta[i][column] for w, theta in models) / sum(weights)
            seen = sum(
                g[i][k] * theta[k][column] for g, (_, theta) in zip(grams, models, strict=True) for k in range(size)
            )
            right.append(seen + added * mean)
        columns.append(
            solved([[x + added * (i == j) for j, x in enumerate(row)] for i, row in enumerate(total)], right)
        )
    return [[column[i] for column in columns] for i in range(size)]


def general_merge(curvatures: list[list[list[float]]], thetas: list[list[float]]) -> list[float]:
    """θ* = (Σ C_i)⁻¹ Σ C_i θ_i with every C_i written out, (entries, entries)."""
    size = len(thetas[0])
    total = [[sum(c[i][j] for c in curvatures) for j in range(size)] for i in range(size)]
    right = [
        sum(c[i][j] * t[j] for c, t in zip(curvatures, thetas, strict=True) for j in range(size)) for i in range(size)
    ]
    return solved(total, right)


def kronecker(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    """What vec(W), rows one after the other, is multiplied by in left · W · right, right symmetric."""
    return [[a * b for a in row for b in other] for row in left for other in right]


def conjugate_gradient(matrix: list[list[float]], right: list[float], start: list[float], steps: int) -> list[float]:
    """Hestenes & Stiefel 1952, step by step."""

    def times(v):
        return [sum(a * b for a, b in zip(row, v, strict=True)) for row in matrix]

    def dot(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True))

    x, rest = start, [b - a for a, b in zip(times(start), right, strict=True)]
    direction = rest
    for _ in range(steps):
        moved = times(direction)
        length = dot(rest, rest) / dot(direction, moved)
        x = [a + length * b for a, b in zip(x, direction, strict=True)]
        new = [a - length * b for a, b in zip(rest, moved, strict=True)]
        direction = [a + dot(new, new) / dot(rest, rest) * b for a, b in zip(new, direction, strict=True)]
        rest = new
    return x


# ---------------------------------------------------------------------------------------------------------- curvature


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """By the name of the weight: everything with a weight matrix that is neither an embedding nor tied to one."""
    embedded = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
        and not any(module.weight is one for one in embedded)
    }


def curvature(model: nn.Module, sequences: list[list[int]], enumerated: bool = False) -> tuple[dict, dict, dict]:
    """Of each tensor the mean over sequences of squared gradients of Σ_t log p(y_t); of each linear X^T X / T, and Σ_s g_s g_s^T
    over positions s with g_s the gradient by its output there. y: the text's tokens, or all labels weighed by their
    probability, whose cross terms between positions have mean 0."""
    parameters = dict(model.named_parameters())
    modules, seen = _linear_modules(model), {}
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    gram, factors = {}, {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    for sequence in sequences:
        log_p = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        outputs = {name: out for name, (_, out) in seen.items()}
        for name, (inputs, _) in seen.items():
            x = inputs[0, :-1].detach()
            gram[name] = gram.get(name, 0) + sum(torch.outer(row, row) for row in x) / len(x) / len(sequences)
        text = [log_p[place, token] for place, token in enumerate(sequence[1:])]
        scored = [(1.0, sum(text))]
        if enumerated:
            scored = [(one.exp().item(), one) for row in log_p for one in row]
        wanted = [*parameters.values(), *outputs.values()]
        for weight, score in scored:
            gradients = torch.autograd.grad(score, wanted, retain_graph=True, materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=False):
                fisher[name] += weight * gradient**2 / len(sequences)
            for name, gradient in zip(outputs, gradients[len(parameters) :], strict=True):
                every = sum(torch.outer(g, g) for g in gradient[0])
                factors[name] = factors.get(name, 0) + weight * every / len(sequences)
    return fisher, gram, factors


def hessian_diagonal(model: nn.Module, sequence: list[int], names: tuple[str, ...]) -> dict[str, Tensor]:
    """∂²/∂θ² of Σ_t −log p(x_t), one entry after the other, by differentiating each entry of the gradient."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        log_p = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        loss = -sum(log_p[place, token] for place, token in enumerate(sequence[1:]))
        found = {}
        for name in names:
            parameter = dict(model.named_parameters())[name]
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
            entries = []
            for index, one in enumerate(gradient.flatten()):
                (second,) = torch.autograd.grad(one, parameter, retain_graph=True)
                entries.append(second.flatten()[index])
            found[name] = torch.stack(entries).view_as(parameter)
    return found


def mean_gradient(model: nn.Module, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Of each tensor the mean over sequences of the gradient of Σ_t −log p(x_t)."""
    losses = []
    for sequence in sequences:
        log_p = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        losses.append(-sum(log_p[place, token] for place, token in enumerate(sequence[1:])))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(sum(losses) / len(losses), parameters), strict=True))


# -------------------------------------------------------------------------------------------------- merging of experts


def kronecker_map(terms: list[list[Tensor]]) -> Tensor:
    """Σ_r (o₁ ⊗ o₂) ⊗ (i₁ ⊗ i₂), written out: the matrix that takes vec(τ), row by row, to vec(M τ)."""
    return sum(torch.kron(torch.kron(out1, out2), torch.kron(in1, in2)) for out1, out2, in1, in2 in terms)


def camex_differences(
    experts: list[Tensor], base: Tensor, maps: list[Tensor] | None, alpha: float, election: bool
) -> list[Tensor]:
    """α M_e τ_e of one matrix of every expert; maps: written out. Where signs are elected, of the entries that have the sum's sign."""
    taus = [expert - base for expert in experts]
    if election:
        total = sum(taus)
        taus = [torch.where(tau.sign() * total.sign() > 0, tau, torch.zeros_like(tau)) for tau in taus]
    if maps is not None:
        taus = [(matrix @ tau.flatten()).view_as(tau) for matrix, tau in zip(maps, taus, strict=True)]
    return [alpha * tau for tau in taus]


def camex_merged(base: Tensor, differences: list[Tensor], scores: list[Tensor]) -> Tensor:
    """Ê = B + Σ_e s_e · (α M_e τ_e) (arXiv:2502.18821, eq. 3)."""
    return base + sum(score * difference for score, difference in zip(scores, differences, strict=True))


def camex_updated(base: Tensor, differences: list[Tensor]) -> Tensor:
    """The next base: B + 1/E Σ_e α M_e τ_e (eq. 4)."""
    return base + sum(differences) / len(differences)
