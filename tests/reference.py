"""Slow, obvious twins of the library's mathematics: loops over tokens and experts, in float64.

Imports torch and unmodified Hugging Face modules only, nothing of ours: a mistake can't be on both sides.
Shapes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

IGNORED = -100

Decision = list[tuple[int, Tensor]]  # one token's (expert, gate) pairs, largest first


# ------------------------------------------------------------------------------------------------------------ routers


def softmax(logits: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(logit - max(x.item() for x in logits)) for logit in logits]
    return [e / sum(exponentials) for e in exponentials]


def largest(values: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:k]


def topk_softmax(logits_E: Tensor, k: int, gate_scale: str = "none") -> Decision:
    """BTX: the K largest logits, then a softmax over them."""
    logits = list(logits_E)
    chosen = largest(logits, k)
    return list(zip(chosen, softmax([logits[e] for e in chosen]), strict=True))


def softmax_topk(logits_E: Tensor, k: int, gate_scale: str = "none") -> Decision:
    """BAM and Switch: a softmax over all, then its K largest; `gate_scale` says what happens to their sum."""
    probabilities = softmax(list(logits_E))
    chosen = largest(probabilities, k)
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


def soft(logits_E: Tensor, k: int | None = None, gate_scale: str = "none") -> Decision:
    """Every expert with its probability."""
    return list(enumerate(softmax(list(logits_E))))


ROUTERS = {"topk_softmax": topk_softmax, "softmax_topk": softmax_topk, "soft": soft}


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
            sum(gate * mlps[expert](x) for expert, gate in decision)
            for x, decision in zip(hidden_TD, decisions, strict=True)
        ]
    )


def route(hidden_TD: Tensor, weight_ED: Tensor, router: str, k: int, gate_scale: str) -> tuple[Tensor, list[Decision]]:
    """(T, E) logits and the decision of each token."""
    logits = hidden_TD.double() @ weight_ED.double().T
    return logits, [ROUTERS[router](row, k, gate_scale) for row in logits]


def soft_mixture_of_attention(
    hidden_BSD: Tensor, weight_ED: Tensor, attentions: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Σ_e g_e(x) · Attn_e(x), g = softmax(W x) of the query token; each expert attends over the whole sequence."""
    outputs = [attend(hidden_BSD) for attend in attentions]
    out = torch.zeros_like(hidden_BSD)
    for b in range(hidden_BSD.shape[0]):
        for s in range(hidden_BSD.shape[1]):
            gates = softmax(list(weight_ED.double() @ hidden_BSD[b, s].double()))
            mixed = sum(gate * output[b, s] for gate, output in zip(gates, outputs, strict=True))
            out = out.index_put((torch.tensor(b), torch.tensor(s)), mixed)
    return out


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


class ReferenceMixture:
    """The mixture of dense Llama or GPT-NeoX causal LMs, in float64, with the residual structure written out.

    `rest` holds the averaged tensors; `experts` the branches, whose MLPs (and attentions) are used as they are.
    ffn_routers, attention_routers: one (E, D) weight a layer. attention: "merged" | "mixture"; kv: "expert" | "shared".
    forced sends every token to that expert with gate 1. After a forward, `ffn` holds each layer's (logits, decisions).
    """

    def __init__(
        self, models, ffn_routers, router, k, gate_scale="none", attention="merged", kv="expert", attention_routers=None
    ):
        self.experts = [copy.deepcopy(model).double() for model in models]
        self.rest = average(self.experts)
        for model in [self.rest, *self.experts]:
            model.set_attn_implementation("eager")
        self.ffn_routers = [w.detach().double().clone().requires_grad_() for w in ffn_routers]
        self.attention_routers = [w.detach().double().clone().requires_grad_() for w in attention_routers or []]
        self.router, self.k, self.gate_scale, self.attention, self.kv = router, k, gate_scale, attention, kv
        self.forced: int | None = None
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
        self.ffn = []
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
        return soft_mixture_of_attention(x, self.attention_routers[index], attentions)

    def _feed_forward(self, index: int, x: Tensor) -> Tensor:
        mlps = [self._layer(model, index).mlp for model in self.experts]
        if self.forced is not None:
            return mlps[self.forced](x)
        tokens = x.flatten(0, 1)
        logits, decisions = route(tokens, self.ffn_routers[index], self.router, self.k, self.gate_scale)
        self.ffn.append((logits, decisions))
        return moe_feed_forward(tokens, decisions, mlps).view_as(x)


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
