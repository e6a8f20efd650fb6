"""Losses as sums over tokens, so that one division by the global count of valid tokens makes every split equal.

Accumulation steps and ranks only add sums: `loss = (Σ cross-entropy + Σ_k c_k · Σ aux_k) / N`, N = valid tokens of the
whole optimizer step. Shapes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token, V vocabulary.
This file travels inside checkpoints as remote code: it imports nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORED = -100
FULL_LOGITS_BYTES = 256 * 2**20  # below this, one pass over all logits is cheaper than chunks
CHUNK_TOKENS = 256  # as fast as more of them, and its logits take least


def next_token_labels(input_ids_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    """(B, S): the token that follows each position; IGNORED at the last one and wherever either of the two is padding."""
    labels = torch.full_like(input_ids_BS, IGNORED)
    labels[:, :-1] = input_ids_BS[:, 1:]
    if valid_BS is not None:
        labels[:, :-1] = labels[:, :-1].masked_fill(~(valid_BS[:, 1:].bool() & valid_BS[:, :-1].bool()), IGNORED)
    return labels


def token_nats(hidden_TD: Tensor, head: Callable[[Tensor], Tensor], labels_T: Tensor) -> Tensor:
    """(T,) cross-entropy of each token in nats, 0 where the label is IGNORED. Softmax in fp32."""
    return F.cross_entropy(head(hidden_TD).float(), labels_T, ignore_index=IGNORED, reduction="none")


def cross_entropy_sum(
    hidden_TD: Tensor,
    head: Callable[[Tensor], Tensor],
    labels_T: Tensor,
    vocab_size: int,
    weights: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """(Σ over valid tokens of −log p(label) in nats, number of valid tokens).

    Above FULL_LOGITS_BYTES of fp32 logits, works on CHUNK_TOKENS at a time, so that (T, V) logits never exist at once. weights:
    all that `head` computes with, if it is whole on this rank: each chunk's gradients are then taken at once, while its logits are
    there; without, its logits are computed again in backward.
    """
    count = (labels_T != IGNORED).sum()
    if hidden_TD.shape[0] * vocab_size * 4 <= FULL_LOGITS_BYTES:
        return token_nats(hidden_TD, head, labels_T).sum(), count
    if weights and torch.is_grad_enabled():
        nats = _ChunkedNats.apply(head, labels_T, hidden_TD, *weights)
        assert isinstance(nats, Tensor)
        return nats, count
    total = hidden_TD.new_zeros((), dtype=torch.float32)
    for hidden, labels in zip(hidden_TD.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True):
        nats = checkpoint(token_nats, hidden, head, labels, use_reentrant=False)
        assert isinstance(nats, Tensor)
        total = total + nats.sum()
    return total, count


class _ChunkedNats(torch.autograd.Function):
    """Σ token_nats, with its gradients in hidden states and the head's weights taken during the forward."""

    @staticmethod
    def forward(ctx: Any, head: Callable[[Tensor], Tensor], labels_T: Tensor, *inputs: Tensor) -> Tensor:
        hidden_TD, *weights = inputs
        trained = [weight for weight in weights if weight.requires_grad]
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        to_hidden, to_weights = [], [torch.zeros_like(weight) for weight in trained]
        for hidden, labels in zip(hidden_TD.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True):
            with torch.enable_grad():
                own = hidden.detach().requires_grad_()
                nats = token_nats(own, head, labels).sum()
            to_own, *others = torch.autograd.grad(nats, [own, *trained])
            to_hidden.append(to_own)
            for sums, other in zip(to_weights, others, strict=True):
                sums += other
            total += nats.detach()
        ctx.gradients = torch.cat(to_hidden), iter(to_weights)
        ctx.trained = [weight.requires_grad for weight in weights]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (to_hidden, to_weights), (scale,) = ctx.gradients, gradients
        of_weights = [next(to_weights).mul_(scale) if trained else None for trained in ctx.trained]
        return None, None, to_hidden * scale, *of_weights


def gate_load(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E): each token's gates, spread over the experts; its mean over tokens is BTX's u_e."""
    zeros = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return zeros.scatter_add(1, experts_TK, gates_TK)


def assignment_load(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E): 1/K on each chosen expert, no gradient; its mean over tokens is Switch's f_e."""
    return gate_load(torch.full_like(gates_TK, 1 / gates_TK.shape[1]).detach(), experts_TK, num_experts)


LOADS = {"btx": gate_load, "switch": assignment_load}


def balance_sum(load_BSE: Tensor, probs_BSE: Tensor, valid_BS: Tensor, scope: str) -> Tensor:
    """Load-balancing loss of one layer times the number of valid tokens; the loss itself is 1 when routing is uniform.

        loss = E · Σ_e mean(load_e) · mean(prob_e)      (BTX eq. 4, arXiv:2403.07816; Switch eqs. 4-6, arXiv:2101.03961)

    load: `gate_load` (BTX) or `assignment_load` (Switch). Both means run over the valid tokens of `scope`: each
    sequence (then averaged by tokens: the same gradient at any accumulation and rank count), the micro-batch (the
    papers'), or the micro-batches of all ranks (`global`).
    Differs: Switch has K = 1. transformers pools all layers before the product; here layers stay apart.
    """
    valid_BS1 = valid_BS.unsqueeze(-1).to(probs_BSE.dtype)
    load_BE, probs_BE = (load_BSE * valid_BS1).sum(1), (probs_BSE * valid_BS1).sum(1)
    tokens_B1 = valid_BS1.sum(1)
    num_experts, local_tokens = probs_BSE.shape[-1], tokens_B1.sum()
    if scope != "sequence":
        load_BE, probs_BE, tokens_B1 = (x.sum(0, keepdim=True) for x in (load_BE, probs_BE, tokens_B1))
    if scope == "global" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce  # differentiable

        load_BE, probs_BE, tokens_B1 = all_reduce(load_BE), all_reduce(probs_BE), all_reduce(tokens_B1)
    # Σ load · Σ prob / n = n · mean(load) · mean(prob); an all-padding sequence has 0/1.
    weighted = num_experts * (load_BE * probs_BE).sum(-1) / tokens_B1.squeeze(-1).clamp(min=1)
    if scope == "global":
        return weighted.sum() * local_tokens / tokens_B1.sum().clamp(min=1)
    return weighted.sum()


def z_sum(logits_BSE: Tensor, valid_BS: Tensor) -> Tensor:
    """Router z-loss times the number of valid tokens: Σ_t logsumexp(logits_t)² (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return (logits_BSE.logsumexp(-1).square() * valid_BS).sum()


def similarity_sum(logits_BSE: Tensor, before_BSE: Tensor, valid_BS: Tensor) -> Tensor:
    """How far a layer routes from the layer before, times the number of valid tokens; 0 alike, 1 at most.

    Σ_t ½ Σ_e (p_te − p'_te)²,   p and p' the full softmax of the two layers
    """
    return (0.5 * (logits_BSE.softmax(-1) - before_BSE.softmax(-1)).square().sum(-1) * valid_BS).sum()


def entropy_sum(logits_BSE: Tensor, valid_BS: Tensor) -> Tensor:
    """Entropy of the full softmax in nats, summed over valid tokens: Σ_t −Σ_e p_te log p_te."""
    log_probs = logits_BSE.log_softmax(-1)
    return (-(log_probs.exp() * log_probs).sum(-1) * valid_BS).sum()


def _decided(valid_BS: Tensor, decided_T: Tensor) -> Tensor:
    """(B, S) weights: 0 where nothing was decided; they sum to a sequence's valid tokens, unless it has no decided one."""
    counted_BS = valid_BS & decided_T.view(valid_BS.shape)
    return counted_BS * (valid_BS.sum(1, keepdim=True) / counted_BS.sum(1, keepdim=True).clamp_min(1))


def router_losses(
    routings: Sequence,
    valid_BS: Tensor,
    balance: str = "none",
    scope: str = "sequence",
    z: bool = False,
    similarity: bool = False,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """The auxiliary losses of all routed layers, as sums over valid tokens, averaged over layers (or pairs of neighbours).

    routings: one `Routing` a layer, over the B·S tokens of `valid_BS`. Of a sequence in which the logits did not decide about
    some tokens, those that they did decide about speak for all. Keys: "balance" unless `balance` is "none", and the others
    that are asked for. A loss that is not asked for is not computed at all.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor, count: int) -> None:
        sums[name] = sums.get(name, 0) + value / count

    before_BSE: Tensor | None = None
    for routing in routings:
        logits_TE, gates_TK, experts_TK, decided_T = routing[:4]
        num_experts = logits_TE.shape[-1]
        logits_BSE = logits_TE.view(*valid_BS.shape, num_experts)
        counted_BS = valid_BS if decided_T is None else _decided(valid_BS, decided_T)
        if balance != "none":
            load_BSE = LOADS[balance](gates_TK, experts_TK, num_experts).view(logits_BSE.shape)
            add("balance", balance_sum(load_BSE, logits_BSE.softmax(-1), counted_BS, scope), len(routings))
        if z:
            add("z", z_sum(logits_BSE, counted_BS), len(routings))
        if entropy:
            add("entropy", entropy_sum(logits_BSE, counted_BS), len(routings))
        if similarity and before_BSE is not None:
            add("similarity", similarity_sum(logits_BSE, before_BSE, counted_BS), len(routings) - 1)
        before_BSE = logits_BSE
    return sums
