"""Attention and experts for training on CPUs, through transformers' interfaces for kernels. Importing this registers them.

causal_blocks   exact causal attention in blocks of queries, each against the keys up to its end, with its own backward:

    P = softmax(Q Kᵀ / √d + causal mask),  O = P V
    dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P ⊙ (dP − rowsum(P ⊙ dP)),  dQ = dS K / √d,  dK = dSᵀ Q / √d

sorted_mm       tokens sorted by expert, each expert's feed-forward from end to end while its activations are in the cache

What they gain: docs/performance.md. Scores are fp32, all other products of the inputs' dtype, so that errors in bf16 are of the size
of those of SDPA's kernel.

Shapes: B batch, H query heads, K key/value heads, G = H/K, N = B·K, S sequence, d head size, b queries of a block;
T tokens, E experts, k of them for a token, R = T·k rows and some room, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from upcycle.modeling import UpcycledForCausalLM

Inner = Callable[[Tensor], Tensor] | None  # between an expert's projections; None: silu(gate) ⊙ up

CAUSAL_BLOCKS, SORTED_MM = "causal_blocks", "sorted_mm"
BLOCK = 128  # queries
ROWS = 64  # an expert's are filled up to a multiple: oneDNN compiles products anew for each number of rows, and keeps 1,024 of them
KEPT_PER_SIZE = 8  # probabilities of S <= 8 d are kept: no more than queries, keys, values and output together


def use_cpu_kernels(model: PreTrainedModel) -> None:
    """Have a model on the CPU train with these in place of transformers' defaults; other kernels were asked for and stay."""
    decoder = getattr(model.base_model, "decoder", model)  # a mixture's, whose family may refuse SDPA
    if decoder.config._attn_implementation == "sdpa":
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
    counts = torch.bincount(chosen, minlength=experts.num_experts)
    whole = (counts + ROWS - 1) // ROWS * ROWS
    shifts = (whole - counts).cumsum(0) - (whole - counts)  # by how many rows each expert's begin later
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) + shifts[chosen])
    sources = order.new_zeros(len(order) + experts.num_experts * ROWS)
    sources[places] = torch.arange(len(order)) // experts_Tk.shape[1]
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [first, f"{first}_bias", "down_proj", "down_proj_bias"] if experts.has_bias else [first, "down_proj"]
    inner = experts._apply_gate if experts.has_gate else experts.act_fn
    if experts.has_gate and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
        inner = None
    weights = [getattr(experts, name) for name in names]
    out_RD = _SortedExperts.apply(whole.tolist(), inner, hidden_TD.index_select(0, sources), *weights)
    out_TkD = out_RD.index_select(0, places).view(*experts_Tk.shape, -1)
    return (out_TkD * gates_Tk.unsqueeze(-1)).sum(1).to(hidden_TD.dtype)


class _SortedExperts(torch.autograd.Function):
    """(R, D) rows sorted by expert, `counts` of each -> (R, D), MLP_expert of each row; of rows at the end, nothing.

    All memory is taken for all R rows: sizes that change with the routing would leave holes in the heap. What is between the
    projections is computed again in backward.
    """

    @staticmethod
    def forward(ctx: Any, counts: list[int], inner: Inner, *inputs: Tensor) -> Tensor:
        rows_RD, *weights = inputs
        (up, up_bias), (down, down_bias) = _pairs(weights)
        count, width = len(rows_RD), down.shape[2]
        before, room = rows_RD.new_empty(count, up.shape[1]), rows_RD.new_empty(count, width)
        out = rows_RD.new_empty(count, down.shape[1])
        for expert, own in _ranges(counts):
            _project(rows_RD[own], up[expert], up_bias, expert, before[own])
            _project(_between(inner, before[own], room[own]), down[expert], down_bias, expert, out[own])
        ctx.save_for_backward(rows_RD, before, *weights)
        ctx.counts, ctx.inner = counts, inner
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (given_RD,), (rows_RD, before, *weights) = gradients, ctx.saved_tensors
        up, down = weights[0], weights[len(weights) // 2]
        to_rows, to_weights = torch.zeros_like(rows_RD), [torch.zeros_like(weight) for weight in weights]
        (to_up, to_up_bias), (to_down, to_down_bias) = _pairs(to_weights)
        to_after, room = before.new_empty(2, len(rows_RD), down.shape[2])
        to_before = torch.empty_like(before)
        for expert, own in _ranges(ctx.counts):
            torch.mm(given_RD[own], down[expert], out=to_after[own])
            after = _between_backward(ctx.inner, before[own], to_after[own], to_before[own], room[own])
            torch.mm(given_RD[own].T, after, out=to_down[expert])
            torch.mm(to_before[own].T, rows_RD[own], out=to_up[expert])
            torch.mm(to_before[own], up[expert], out=to_rows[own])
            if to_up_bias is not None and to_down_bias is not None:
                to_up_bias[expert], to_down_bias[expert] = to_before[own].sum(0), given_RD[own].sum(0)
        return None, None, to_rows, *to_weights


def _between(inner: Inner, before: Tensor, room: Tensor) -> Tensor:
    """What the second projection gets of what the first one gives; SwiGLU's in `room`."""
    if inner is not None:
        return inner(before)
    gate, up = before.chunk(2, -1)
    torch.ops.aten.silu.out(gate, out=room)
    return room.mul_(up)


def _between_backward(inner: Inner, before: Tensor, to_after: Tensor, to_before: Tensor, room: Tensor) -> Tensor:
    """Fills `to_before`; returns what `_between` did. Takes `to_after` and `room` as space, too."""
    if inner is not None:
        with torch.enable_grad():
            middle = before.detach().requires_grad_()
            after = inner(middle)
        (found,) = torch.autograd.grad(after, middle, to_after)
        to_before.copy_(found)
        return after.detach()
    (gate, up), (to_gate, to_up) = before.chunk(2, -1), to_before.chunk(2, -1)
    torch.ops.aten.silu.out(gate, out=room)
    torch.mul(to_after, room, out=to_up)
    torch.ops.aten.silu_backward.grad_input(to_after.mul_(up), gate, grad_input=to_gate)
    return room.mul_(up)


def _pairs(weights: list[Tensor]) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """(weight, bias) of the two projections."""
    if len(weights) == 2:
        return (weights[0], None), (weights[1], None)
    return (weights[0], weights[1]), (weights[2], weights[3])


def _ranges(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight.T, out=out)
    else:
        torch.addmm(bias[expert], rows, weight.T, out=out)


ALL_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, causal_blocks_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(CAUSAL_BLOCKS, sdpa_mask)
ALL_EXPERTS_FUNCTIONS.register(SORTED_MM, sorted_mm_forward)
