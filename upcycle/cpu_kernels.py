"""Attention and experts for training on CPUs, through transformers' interfaces for kernels. Importing this registers them.

causal_blocks   exact causal attention in blocks of queries, each against the keys up to its end, with its own backward:

    P = softmax(Q Kᵀ / √d + causal mask),  O = P V
    dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ⊙ (dP − rowsum(P ⊙ dP)),  dQ = dS K / √d,  dK = dSᵀ Q / √d

sorted_mm       tokens sorted by expert, each expert's feed-forward from end to end while its activations are in the cache

What they gain: `python -m evals.speed training`. Scores are fp32, all other products of the inputs' dtype; in bf16 gradients are
at least as near as those of SDPA's kernel. Shapes: B batch, H query heads, K key/value heads, G = H/K, N = B·K, S sequence,
d head size, b queries of a block; T tokens, E experts, k of them for a token, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from upcycle.modeling import UpcycledForCausalLM

CAUSAL_BLOCKS, SORTED_MM = "causal_blocks", "sorted_mm"
BLOCK = 128  # queries
KEPT_PER_SIZE = 8  # probabilities of S <= 8 d are kept: no more than queries, keys, values and output together


def use_cpu_kernels(model: PreTrainedModel) -> None:
    """Have a model on the CPU train with these in place of transformers' defaults; other kernels were asked for and stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CAUSAL_BLOCKS)
    if isinstance(model, UpcycledForCausalLM) and model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(SORTED_MM)


def causal_blocks_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query (B, H, S, d), key and value (B, K, S, d) -> (B, S, H, d).

    SDPA does what this does not: masks, dropout, caches, other biases; and all that needs no gradient, where it is faster.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and query.shape[2] == key.shape[2]
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    extras = any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if not plain or not trained or extras:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # fmt: skip
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA; queries and keys leave the rotary embedding in fp32
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    return _CausalBlocks.apply(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def _probabilities(query_NGSd: Tensor, key_NSd: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """(N, G·b, stop) of the queries [start, stop), in the inputs' dtype; equal bits whenever it is computed."""
    exact = torch.promote_types(query_NGSd.dtype, torch.float32)
    block_NGbd = query_NGSd[:, :, start:stop].to(exact) * scale
    scores = torch.bmm(block_NGbd.flatten(1, 2), key_NSd[:, :stop].to(exact).transpose(1, 2))
    later = scores.new_full((stop - start, stop - start), float("-inf")).triu_(1)
    scores.unflatten(1, (-1, stop - start))[..., start:] += later
    return scores.softmax(-1).to(query_NGSd.dtype)


class _CausalBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (B, H, S, d), K = query.shape, key.shape[1]
        queries, keys, values = query.reshape(B * K, H // K, S, d), key.reshape(B * K, S, d), value.flatten(0, 1)
        out_BSHd, kept = value.new_empty(B, S, H, value.shape[-1]), []
        out_BKGSd = out_BSHd.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)
        with torch.autocast(query.device.type, enabled=False):
            for start, stop in _blocks(S):
                chances = _probabilities(queries, keys, scale, start, stop)
                mixed = torch.bmm(chances, values[:, :stop])
                out_BKGSd[..., start:stop, :] = mixed.view(B, K, H // K, stop - start, -1)
                if KEPT_PER_SIZE * d >= S:
                    kept.append(chances)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale, ctx.heads = scale, (B, K)
        return out_BSHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        given_BKGSd = gradients[0].unflatten(2, (ctx.heads[1], -1)).permute(0, 2, 3, 1, 4)
        to_queries, to_keys, to_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for number, (start, stop) in enumerate(_blocks(queries.shape[2])):
            chances = kept[number] if kept else _probabilities(queries, keys, ctx.scale, start, stop)
            given = given_BKGSd[..., start:stop, :].flatten(0, 1).flatten(1, 2)
            block = queries[:, :, start:stop]
            to_values[:, :stop].baddbmm_(chances.transpose(1, 2), given)
            to_chances = torch.bmm(given, values[:, :stop].transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_chances, chances, -1, chances.dtype)
            to_queries[:, :, start:stop] = torch.bmm(to_scores, keys[:, :stop]).view(block.shape)
            to_keys[:, :stop].baddbmm_(to_scores.transpose(1, 2), block.flatten(1, 2))
        to_queries *= ctx.scale
        to_keys *= ctx.scale
        to_queries = to_queries.view(ctx.heads[0], -1, *queries.shape[2:])
        return to_queries, to_keys.unflatten(0, ctx.heads), to_values.unflatten(0, ctx.heads), None


def sorted_mm_forward(experts: Any, hidden_TD: Tensor, experts_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
    """transformers' interface: Σ_k gate · MLP_expert(x), (T, D). Sums over k are fp32.

    Where tokens per expert must not be read, in a compiled layer, or experts are on other ranks, grouped_mm does it.
    """
    if torch.compiler.is_compiling() or experts._is_expert_parallel:
        return grouped_mm_experts_forward(experts, hidden_TD, experts_Tk, gates_Tk)
    chosen, order = experts_Tk.flatten().sort(stable=True)
    counts = torch.bincount(chosen, minlength=experts.num_experts).tolist()
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    ups, downs = (_of_each_expert(experts, name) for name in (first, "down_proj"))
    rows = hidden_TD.index_select(0, order // experts_Tk.shape[1]).split(counts)
    out = []
    for x, up, down in zip(rows, ups, downs, strict=True):
        inner = linear(x, *up)
        out.append(linear(experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner), *down))
    gated = torch.cat(out) * gates_Tk.flatten().index_select(0, order).unsqueeze(1)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return gated.index_select(0, places).view(*experts_Tk.shape, -1).sum(1).to(hidden_TD.dtype)


def _of_each_expert(experts: Any, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a projection."""
    weights = getattr(experts, name).unbind(0)
    biases = getattr(experts, f"{name}_bias").unbind(0) if experts.has_bias else (None,) * len(weights)
    return zip(weights, biases, strict=True)


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, causal_blocks_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, sdpa_mask)
ALL_EXPERTS_FUNCTIONS.register(SORTED_MM, sorted_mm_forward)
