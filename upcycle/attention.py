"""Soft mixture of attention (Branch-Attend-Mix): the family's own attention class, E times wider, with gated heads.

    y = Σ_e g_e(x) · O_e heads_e(x) = [O_1 … O_E] · (g ⊙ concat heads)        (BAM, arXiv:2408.08274, section 3.2)

so a soft mixture of E attention experts *is* one attention layer with E times the heads, whose head outputs are scaled
by their expert's gate before the output projection: one attention kernel call, one ordinary cache entry.
Shapes: B batch, S sequence, D hidden, E experts, H heads of one expert, d head size.
This file travels inside checkpoints as remote code: it imports `.families` and `.router` only.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .families import Family, family_of, head_dim, key_value_heads, widened
from .router import Router

# Eager attention of families whose own knows no grouped queries; Llama's does.
GROUPED_EAGER = "grouped_eager"
ALL_ATTENTION_FUNCTIONS.register(GROUPED_EAGER, eager_attention_forward)


def stack_heads(experts: list[Tensor], kv_heads: int | None) -> Tensor:
    """Rows of E projections, each (heads·d, ...), as the rows of the wide one, (E·heads·d, ...).

    Order (expert, head, d); with `kv_heads`, when experts share keys and values, (kv head, expert, head of the group,
    d), so that the heads which read one key/value head are neighbours, as grouped-query attention expects.
    """
    stacked = torch.stack(experts)
    if kv_heads is None:
        return stacked.flatten(0, 1)
    return stacked.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 2)


def unstack_heads(wide: Tensor, expert: int, num_experts: int, kv_heads: int | None) -> Tensor:
    """The rows of one expert: the inverse of `stack_heads`."""
    if kv_heads is None:
        return wide.chunk(num_experts)[expert]
    return wide.unflatten(0, (kv_heads, num_experts, -1))[:, expert].flatten(0, 1)


class GatedOutput(nn.Module):
    """The output projections of all experts side by side; scales each head by its expert's gate first.

    weight (D, E·H·d), bias (E, D) or None. `gates` (B, S, E) are put here by the mixture just before, and taken away
    at once: a tensor that stays on a module breaks deepcopy and keeps a graph alive. Under tensor parallelism
    transformers hands over the heads as a DTensor, and each rank scales those that it holds.
    """

    def __init__(self, num_experts: int, width: int, hidden_size: int, bias: bool, shared_kv_heads: int | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, num_experts * width))
        self.bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.in_features, self.out_features = num_experts * width, hidden_size  # transformers' styles read them
        self.num_experts, self.shared_kv_heads, self.gates = num_experts, shared_kv_heads, None

    def forward(self, heads_BSW: Tensor) -> Tensor:
        assert self.gates is not None, "the mixture sets the gates before its heads are projected"
        gates_BSE, self.gates = self.gates.to(heads_BSW.dtype), None
        if hasattr(heads_BSW, "device_mesh"):
            scaled, gates_BSE = self._scale_sharded(heads_BSW, gates_BSE)
        elif self.shared_kv_heads is None:
            scaled = heads_BSW.unflatten(-1, (self.num_experts, -1)) * gates_BSE[..., None]
        else:
            grouped = heads_BSW.unflatten(-1, (self.shared_kv_heads, self.num_experts, -1))
            scaled = grouped * gates_BSE[:, :, None, :, None]
        mixed = F.linear(scaled.reshape(heads_BSW.shape), self.weight)
        return mixed if self.bias is None else mixed + gates_BSE.to(mixed.dtype) @ self.bias.to(mixed.dtype)

    def _scale_sharded(self, heads_BSW: Any, gates_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the slice of the heads on this rank; also the gates as the replicated DTensor that they are.

        A rank sees what its own heads say about the gates; declared Partial, these gradients are summed over ranks.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, groups = heads_BSW.device_mesh, self.shared_kv_heads or 1
        gates: Any = DTensor.from_local(gates_BSE, mesh, [Replicate()], run_check=False)
        run = self.in_features // (groups * self.num_experts)  # neighbouring inputs that belong to one expert
        factors = gates.to_local(grad_placements=[Partial()])[:, :, None, :, None].expand(-1, -1, groups, -1, run)
        local = heads_BSW.to_local() * factors.flatten(2).chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]
        return DTensor.from_local(local, mesh, heads_BSW.placements, run_check=False), gates


def copied(module: nn.Module) -> nn.Module:
    """A copy with weights of its own, also where ZeRO-3 has partitioned the weights while the module was built."""
    twin = copy.deepcopy(module)
    parameter: Any
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_shape"):  # the partition alone is no tensor that could be loaded
            own = nn.Parameter(torch.empty(parameter.ds_shape, dtype=parameter.dtype))
            parameter.convert_to_zero_parameters(param_list=[own])
            owner, _, last = name.rpartition(".")
            setattr(twin.get_submodule(owner), last, own)
    return twin


class ExpertNorms(nn.Module):
    """The query or key norms of all experts, each on its own expert's heads, in that expert's own layout.

    axis: where the heads are in (B, S, heads, d) or (B, heads, S, d); a norm over all heads at once (OLMo-2) sees
    (B, S, heads·d). kv_heads: see `stack_heads`.
    """

    def __init__(self, norm: nn.Module, num_experts: int, axis: int, kv_heads: int | None):
        super().__init__()
        self.norms = nn.ModuleList(copied(norm) for _ in range(num_experts))
        self.axis, self.kv_heads = axis, kv_heads

    def forward(self, heads: Tensor) -> Tensor:
        axis, count = 2 if heads.dim() == 3 else self.axis, len(self.norms)
        if self.kv_heads is None:
            parts = heads.unflatten(axis, (count, -1)).unbind(axis)
            normed = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
            return torch.stack(normed, axis).flatten(axis, axis + 1)
        parts = heads.unflatten(axis, (self.kv_heads, count, -1)).unbind(axis + 1)
        normed = [norm(part.flatten(axis, axis + 1)) for norm, part in zip(self.norms, parts, strict=True)]
        return torch.stack([one.unflatten(axis, (self.kv_heads, -1)) for one in normed], axis + 1).flatten(
            axis, axis + 2
        )


class SplitProjection(nn.Module):
    """A fused query-key-value projection in its three parts, so that each can have its own number of heads."""

    def __init__(self, hidden_size: int, widths: dict[str, int], bias: bool, interleaved_size: int | None):
        super().__init__()
        for role, width in widths.items():
            self.add_module(role, nn.Linear(hidden_size, width, bias=bias))
        self.interleaved_size = interleaved_size  # of a head, where the family interleaves its heads

    def forward(self, hidden: Tensor) -> Tensor:
        """The rows in the order that the family's own forward takes apart again."""
        parts = [part(hidden) for part in self.children()]
        if self.interleaved_size is None:
            return torch.cat(parts, dim=-1)
        return torch.stack([part.unflatten(-1, (-1, self.interleaved_size)) for part in parts], dim=-2).flatten(-3)


class WideConfig:
    """The seed's live config as the wide attention sees it: its own head counts, the seed's for the rest.

    Live, so that `set_attn_implementation` reaches this layer.
    """

    def __init__(self, seed, num_attention_heads: int, grouped_eager: bool):
        self.seed, self.num_attention_heads, self.grouped_eager = seed, num_attention_heads, grouped_eager

    @property
    def _attn_implementation(self) -> str:
        implementation = self.seed._attn_implementation
        return GROUPED_EAGER if self.grouped_eager and implementation == "eager" else implementation

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "seed":  # copying asks before there is a seed
            raise AttributeError(name)
        return getattr(self.seed, name)


class _SharedInterleavedForward:
    """Forward of a fused attention with interleaved heads whose E·H query heads read H shared key/value heads.

    The family's own forward cuts one projection into equally many query, key and value heads, so it can't express
    shared keys and values; everything else here calls the family's own functions.
    """

    def forward(
        self: Any, hidden_states, attention_mask=None, layer_past=None, position_embeddings: Any = None, **kwargs
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_size)
        parts = [part(hidden_states) for part in self.get_submodule(self.fused_name).children()]
        query, key, value = [part.view(shape).transpose(1, 2) for part in parts]
        query, key = sys.modules[type(self).__mro__[2].__module__].apply_rotary_pos_emb(
            query, key, *position_embeddings
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        heads, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.get_submodule(self.output_name)(heads.flatten(-2).contiguous()), weights


def _split_fused_projection(wide: Any, attention: nn.Module, seed, family: Family, num_experts: int, shared: bool):
    """Replace the fused projection of `wide` and, where its forward counts heads by itself, tell it the new counts."""
    assert family.fused is not None
    size, keys = head_dim(seed), key_value_heads(seed) * (1 if shared else num_experts)
    widths = {"query": seed.num_attention_heads * num_experts * size, "key": keys * size, "value": keys * size}
    interleaved = family.fused_rows == "heads"
    bias = getattr(attention, family.fused).bias is not None
    split = SplitProjection(seed.hidden_size, widths, bias, size if interleaved else None)
    setattr(wide, family.fused, split)
    wide.split_size = list(widths.values())  # GPT-2's
    wide.fused_name = family.fused
    if shared and interleaved:
        base = type(wide)
        wide.__class__ = type(base.__name__, (_SharedInterleavedForward, base), {"__module__": __name__})


def soft_mixture_of_attention(attention: nn.Module, config: Any, layer: int) -> nn.Module:
    """The attention of one decoder layer as a mixture of all experts, uninitialised; soft unless its router says else.

    attention: the family's own module, used for its class and shapes only. config: the mixture's. Its kv: "expert" gives
    each expert its own keys and values (E times the cache); "shared" gives all experts one set (the dense model's cache).
    """
    seed, num_experts, shared = config.seed, config.num_attention_experts, config.kv == "shared"
    family = family_of(seed)
    wide_config = widened(seed, queries=num_experts, keys=1 if shared else num_experts)
    wide: Any = type(attention)(wide_config, layer_idx=layer)
    kv_heads = key_value_heads(seed) if shared else None
    width = seed.num_attention_heads * head_dim(seed)
    bias = attention.get_submodule(family.output).bias is not None
    setattr(wide, family.output, GatedOutput(num_experts, width, seed.hidden_size, bias, kv_heads))
    for name, linear in list(wide.named_children()):  # some families derive input sizes from the widened hidden size
        if isinstance(linear, nn.Linear) and linear.in_features != seed.hidden_size:
            setattr(wide, name, nn.Linear(seed.hidden_size, linear.out_features, bias=linear.bias is not None))
    if family.fused:
        _split_fused_projection(wide, attention, seed, family, num_experts, shared)
    for name, role in family.norms.items():
        norm = getattr(attention, name, None)
        if norm is not None and shared and role == "key":
            setattr(wide, name, copied(norm))
        elif norm is not None:
            setattr(wide, name, ExpertNorms(norm, num_experts, 1 if family.heads_first else 2, kv_heads))
    if shared and not family.grouped:
        wide.num_key_value_groups = num_experts  # attention kernels repeat keys and values this often
    wide.output_name = family.output
    wide.config = WideConfig(seed, wide_config.num_attention_heads, grouped_eager=shared and not family.grouped)
    rule, ties = config.rule("attention", layer), config.ties("attention", layer)
    wide.router = Router(seed.hidden_size, num_experts, f"attention.{layer}", rule, **ties)
    wide.trace = None
    wide.register_forward_pre_hook(_gate_heads, with_kwargs=True)
    return wide


def _gate_heads(wide: Any, args: tuple, kwargs: dict) -> None:
    hidden_BSD = args[0] if args else kwargs["hidden_states"]
    routing = wide.router(hidden_BSD, wide.trace)
    gates_TE = torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.gates)
    # By class: an adapter may stand between (PEFT wraps the module that it adapts).
    output: Any = next(module for module in wide.modules() if isinstance(module, GatedOutput))
    output.gates = gates_TE.view(*hidden_BSD.shape[:-1], -1)
