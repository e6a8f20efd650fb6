"""How a mixture is cut over processes by transformers: tensor, expert and FSDP plans, from its config and its modules.

This file travels inside checkpoints as remote code: it imports `.families` only.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .families import Family, family_of

# Styles of transformers.distributed for the stacked experts: every expert cut along its hidden units, or whole experts.
# Names that a family lacks (it has no biases, or no gate) are dropped when the model is built. down_proj_bias has no
# style in the first: each rank holds it whole and adds its share.
CUT_EXPERTS = {
    "experts.gate_up_proj": "packed_colwise",
    "experts.gate_up_proj_bias": "packed_rowwise",  # along the last dimension, gate and up apart
    "experts.up_proj": "colwise",
    "experts.up_proj_bias": "rowwise",  # along the last dimension
    "experts.down_proj": "rowwise",
    "experts": "moe_tp_experts",
}
WHOLE_EXPERTS = {
    **dict.fromkeys([name for name in CUT_EXPERTS if name != "experts"], "grouped_gemm"),
    "experts.down_proj_bias": "grouped_gemm",
    "experts": "ep_dispatch_experts",
}
WHOLE_HEADS = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}


def with_whole_heads(plan: dict[str, str], family: Family) -> dict[str, str]:
    """A tensor-parallel plan whose attentions see all heads on every rank: weights stay cut, activations are gathered.

    For norms of queries and keys that a rank's share of the heads is not enough for.
    """
    attention = f"decoder.{family.layers}.*.{family.attention}."
    return {
        name: WHOLE_HEADS.get(style, style) if name.startswith(attention) else style
        for name, style in plan.items()
        if name.removeprefix(attention) not in family.norms
    }


def tensor_plan(config: Any) -> dict[str, str]:
    """Tensor parallelism: the plan of the seed's family, with the experts cut along their hidden units.

    Layers that are no mixtures, and shared experts, keep the family's own plan.
    """
    family = family_of(config.seed)
    attention, mlp = (f"{family.layers}.*.{part}." for part in (family.attention, family.mlp))
    some, plan = len(config.routed) < config.seed.num_hidden_layers, {}
    for name, style in (config.seed.base_model_tp_plan or {}).items():
        if config.attention == "mixture" and name == f"{attention}{family.fused}":
            plan |= {f"{name}.{role}": style for role in ("query", "key", "value")}
            plan |= {name: style} if some else {}
        elif not name.startswith(mlp):
            plan[name] = style
        else:
            plan |= {name: style} if some else {}
            if config.shared_expert != "none":
                plan[f"{mlp}shared_expert.{name.removeprefix(mlp)}"] = style
    if not config.merges_weights:  # else every rank merges whole experts
        plan |= {f"{mlp}{name}": style for name, style in CUT_EXPERTS.items()}
    return {f"decoder.{name}": style for name, style in plan.items()}


def expert_plan(config: Any) -> dict[str, str]:
    """Expert parallelism: whole experts on their ranks. A mixture of attention is not part of it; nor are experts whose weights
    are merged, since every decision needs all of them."""
    if config.merges_weights:
        return {}
    family = family_of(config.seed)
    return {f"decoder.{family.layers}.*.{family.mlp}.{name}": style for name, style in WHOLE_EXPERTS.items()}


def sharding_plan(config: Any) -> dict[str, str]:
    """FSDP: the layers; the model adds its embeddings and its final norm, whose names it knows."""
    return {f"decoder.{family_of(config.seed).layers}.*": "free_full_weight"}


def plans_of_modules(model: Any, family: Family) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The three plans of a model's config with what only the modules tell: names of embeddings and norms, and which parts
    exist."""
    plan, ep_plan, fsdp_plan = (dict(plan or {}) for plan in (model._tp_plan, model._ep_plan, model._fsdp_plan))
    attention = getattr(getattr(model.decoder, family.layers)[model.config.routed[0]], family.attention)
    for name in family.norms:
        norm, rule = getattr(attention, name, None), f"decoder.{family.layers}.*.{family.attention}.{name}"
        if norm is not None and (rule not in plan or hasattr(norm, "norms")):  # one norm an expert
            plan = with_whole_heads(plan, family)
    for name, part in model.decoder.named_children():
        if part is model.get_input_embeddings():
            plan[f"decoder.{name}"] = "embedding_rowwise"
        if name != family.layers and next(part.parameters(), None) is not None:
            embedding = isinstance(part, nn.Embedding)
            fsdp_plan[f"decoder.{name}"] = "free_full_weight" if embedding else "keep_full_weight"
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    return (
        {name: style for name, style in plan.items() if name in names},
        {name: style for name, style in ep_plan.items() if name in names},
        fsdp_plan,
    )
