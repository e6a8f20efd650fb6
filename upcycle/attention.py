"""Soft mixture of attention (Branch-Attend-Mix): the family's own attention class, E times wider, with gated heads.

    y = Σ_e g_e(x) · O_e heads_e(x) = [O_1 … O_E] · (g ⊙ concat heads)        (BAM, arXiv:2408.08274, section 3.2)

so a soft mixture of E attention experts *is* one attention layer with E times the heads, whose head outputs are scaled
by their expert's gate before the output projection: one attention kernel call, one ordinary cache entry.
Shapes: B batch, S sequence, D hidden, E experts, H heads of one expert, d head size.
This file travels inside checkpoints as remote code: it imports `.families` and `.routing` only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families import family_of, head_dim, key_value_heads, widened
from .routing import Router


def stack_heads(experts: list[Tensor], kv_heads: int | None) -> Tensor:
    """Rows of E projections, each (heads·d, ...), as the rows of the wide one, (E·heads·d, ...).

    Order (expert, head, d); with `kv_heads`, when experts share keys and values, (kv head, expert, head of the group,
    d), so that the heads which read one key/value head are neighbours, as grouped-query attention expects.
    """
    stacked = torch.stack(experts)
    if kv_heads is not None:
        stacked = stacked.unflatten(1, (kv_heads, -1)).transpose(0, 1)
    return stacked.flatten(0, 2).contiguous() if kv_heads is not None else stacked.flatten(0, 1)


def unstack_heads(wide: Tensor, expert: int, num_experts: int, kv_heads: int | None) -> Tensor:
    """The rows of one expert: the inverse of `stack_heads`."""
    if kv_heads is None:
        return wide.chunk(num_experts)[expert]
    return wide.unflatten(0, (kv_heads, num_experts, -1))[:, expert].flatten(0, 1)


def split_fused(fused: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Rows (head, [q, k, v], d) of a fused projection as query rows (head, d) and key-value rows (head, [k, v], d)."""
    parts = fused.unflatten(0, (heads, 3, -1))
    return parts[:, 0].flatten(0, 1), parts[:, 1:].flatten(0, 2)


def join_fused(query: Tensor, key_value: Tensor, heads: int) -> Tensor:
    """The inverse of `split_fused`."""
    return torch.cat([query.unflatten(0, (heads, 1, -1)), key_value.unflatten(0, (heads, 2, -1))], dim=1).flatten(0, 2)


class GatedOutput(nn.Module):
    """The output projections of all experts side by side; scales each head by its expert's gate first.

    weight (D, E·H·d), bias (E, D) or None. `gates` (B, S, E) are put here by the mixture just before, and taken away
    at once: a tensor that stays on a module breaks deepcopy and keeps a graph alive.
    """

    def __init__(self, num_experts: int, width: int, hidden_size: int, bias: bool, shared_kv_heads: int | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, num_experts * width))
        self.bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.num_experts, self.shared_kv_heads, self.gates = num_experts, shared_kv_heads, None

    def forward(self, heads_BSW: Tensor) -> Tensor:
        assert self.gates is not None, "the mixture sets the gates before its heads are projected"
        gates_BSE, self.gates = self.gates.to(heads_BSW.dtype), None
        if self.shared_kv_heads is None:
            scaled = heads_BSW.unflatten(-1, (self.num_experts, -1)) * gates_BSE[..., None]
        else:
            grouped = heads_BSW.unflatten(-1, (self.shared_kv_heads, self.num_experts, -1))
            scaled = grouped * gates_BSE[:, :, None, :, None]
        mixed = F.linear(scaled.reshape(heads_BSW.shape), self.weight)
        return mixed if self.bias is None else mixed + gates_BSE.to(mixed.dtype) @ self.bias.to(mixed.dtype)


class _SharedFusedForward:
    """Forward of a fused-QKV attention whose E·H query heads read H shared key/value heads.

    The family's own forward cuts one projection into equally many query, key and value heads, so it can't express
    shared keys and values; everything else here calls the family's own functions.
    """

    def forward(
        self: Any, hidden_states, attention_mask=None, layer_past=None, position_embeddings: Any = None, **kwargs
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_size)
        query = self.query(hidden_states).view(shape).transpose(1, 2)
        key_value = self.key_value(hidden_states).unflatten(-1, (-1, 2, self.head_size)).transpose(1, 2)
        key, value = key_value.unbind(-2)
        query, key = self.apply_rotary(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        heads, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.get_submodule(self.output_name)(heads.flatten(-2).contiguous()), weights


def _share_fused(wide: Any, seed, num_experts: int, fused: str, bias: bool) -> Any:
    """`wide` with its fused projection replaced by E·H query heads and the seed's H key/value heads."""
    size, heads = head_dim(seed), seed.num_attention_heads
    module = sys.modules[type(wide).__module__]
    base = type(wide)
    wide.__class__ = type(base.__name__, (_SharedFusedForward, base), {"__module__": __name__})
    delattr(wide, fused)
    wide.query = nn.Linear(seed.hidden_size, num_experts * heads * size, bias=bias)
    wide.key_value = nn.Linear(seed.hidden_size, 2 * heads * size, bias=bias)
    wide.num_key_value_groups = num_experts  # attention kernels repeat keys and values this often
    wide.apply_rotary, wide.eager_attention = module.apply_rotary_pos_emb, module.eager_attention_forward
    if not hasattr(module, "repeat_kv"):  # the family's eager attention knows no groups; Llama's does
        from transformers.models.llama.modeling_llama import eager_attention_forward

        wide.eager_attention = eager_attention_forward
    return wide


def soft_mixture_of_attention(attention: nn.Module, seed, num_experts: int, kv: str, layer: int) -> nn.Module:
    """The attention of one decoder layer as a soft mixture of `num_experts` experts, uninitialised.

    attention: the family's own module, used for its class and shapes only. kv: "expert" gives each expert its own keys
    and values (E times the cache); "shared" gives all experts one set (the dense model's cache).
    """
    family, shared = family_of(seed), kv == "shared"
    output = attention.get_submodule(family.output)
    bias = output.bias is not None
    wide: Any = type(attention)(widened(seed, queries=num_experts, keys=1 if shared else num_experts), layer)
    kv_heads = key_value_heads(seed) if shared else None
    width = seed.num_attention_heads * head_dim(seed)
    setattr(wide, family.output, GatedOutput(num_experts, width, seed.hidden_size, bias, kv_heads))
    for name, linear in list(wide.named_children()):  # some families derive input sizes from the widened hidden size
        if isinstance(linear, nn.Linear) and linear.in_features != seed.hidden_size:
            setattr(wide, name, nn.Linear(seed.hidden_size, linear.out_features, bias=linear.bias is not None))
    if shared and family.fused:
        wide = _share_fused(
            wide, seed, num_experts, family.fused, bias=attention.get_submodule(family.fused).bias is not None
        )
    wide.output_name = family.output
    wide.config = seed  # the live config, so that set_attn_implementation reaches this layer
    wide.router = Router(seed.hidden_size, num_experts, f"attention.{layer}", kind="soft", top_k=num_experts)
    wide.trace = None
    wide.register_forward_pre_hook(_gate_heads, with_kwargs=True)
    return wide


def _gate_heads(wide: Any, args: tuple, kwargs: dict) -> None:
    hidden_BSD = args[0] if args else kwargs["hidden_states"]
    routing = wide.router(hidden_BSD.flatten(0, 1), wide.trace)
    gates_TE = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)
    wide.get_submodule(wide.output_name).gates = gates_TE.view(*hidden_BSD.shape[:-1], -1)
