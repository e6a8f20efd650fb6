"""The config of a mixture, as it stands in config.json beside its weights.

This file travels inside checkpoints as remote code: it imports `.families`, `.losses` and `.routing` only.
"""

from __future__ import annotations

import copy

from transformers import AutoConfig, PretrainedConfig

from .families import Family, family_of, head_dim
from .losses import LOADS
from .routing import GATE_SCALES, ROUTERS

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


class UpcycledConfig(PretrainedConfig):
    """A mixture: the seed's config, the experts by name and in order, and its routers.

    experts: names; the position is the expert's index in every stacked tensor and router row.
    attention: "merged" (one attention, BTX) or "mixture" (soft mixture over the same experts, BAM), with
    kv: "expert" | "shared". router: a name in routing.ROUTERS; gate_scale, balance, balance_scope as in METHODS.
    """

    model_type = "upcycled"
    sub_configs = {"seed": AutoConfig}  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        seed: dict | PretrainedConfig | None = None,
        experts: list[str] | tuple[str, ...] = ("seed", "branch"),
        num_experts_per_tok: int = 2,
        router: str = "topk_softmax",
        gate_scale: str = "none",
        attention: str = "merged",
        kv: str = "expert",
        balance: str = "none",
        balance_coefficient: float = 0.0,
        balance_scope: str = "sequence",
        z_coefficient: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        seed = {"model_type": "llama"} if seed is None else seed
        self.seed = AutoConfig.for_model(**seed) if isinstance(seed, dict) else seed
        self.experts = list(experts)
        self.num_experts_per_tok = len(self.experts) if router == "soft" else num_experts_per_tok
        self.router, self.gate_scale, self.attention, self.kv = router, gate_scale, attention, kv
        self.balance, self.balance_coefficient, self.balance_scope = balance, balance_coefficient, balance_scope
        self.z_coefficient, self.initializer_range = z_coefficient, initializer_range
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.seed, name, None))
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration.UpcycledConfig",
                "AutoModel": "modeling.UpcycledModel",
                "AutoModelForCausalLM": "modeling.UpcycledForCausalLM",
            },
        )
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        choices = {
            "router": ROUTERS,
            "gate_scale": GATE_SCALES,
            "attention": ("merged", "mixture"),
            "kv": ("expert", "shared"),
            "balance": ("none", *LOADS),
            "balance_scope": ("sequence", "micro_batch", "global"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; expected one of {', '.join(valid)}")
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts={self.experts} has a name twice; experts need distinct names")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and the {self.num_experts} experts "
                f"({', '.join(self.experts)}); lower top_k or add a branch"
            )

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def vocab_size(self) -> int:
        return self.seed.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.seed.hidden_size

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tensor parallelism: the plan of the seed's family, with the experts cut along their hidden units."""
        family = family_of(self.seed)
        attention, mlp = (f"{family.layers}.*.{part}." for part in (family.attention, family.mlp))
        plan = {}
        for name, style in (self.seed.base_model_tp_plan or {}).items():
            if self.attention == "mixture" and name == f"{attention}{family.fused}":
                plan |= {f"{name}.{role}": style for role in ("query", "key", "value")}
            elif not name.startswith(mlp):
                plan[name] = style
        plan |= {f"{mlp}{name}": style for name, style in CUT_EXPERTS.items()}
        return {f"decoder.{name}": style for name, style in plan.items()}

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Expert parallelism: whole experts on their ranks. A mixture of attention is not part of it."""
        family = family_of(self.seed)
        return {f"decoder.{family.layers}.*.{family.mlp}.{name}": style for name, style in WHOLE_EXPERTS.items()}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers; the model adds its embeddings and its final norm, whose names it knows."""
        return {f"decoder.{family_of(self.seed).layers}.*": "free_full_weight"}

    def get_text_config(self, decoder=None, encoder=None):
        """The seed's config with the head counts the cache really has. Shallow: kernel settings stay live."""
        if self.attention == "merged":
            return self.seed
        wide = copy.copy(self.seed)
        wide.head_dim = head_dim(self.seed)  # else it would be derived from the wide head count
        wide.num_attention_heads *= self.num_experts
        if getattr(wide, "num_key_value_heads", None) and self.kv == "expert":
            wide.num_key_value_heads *= self.num_experts
        elif not getattr(wide, "num_key_value_heads", None) and self.kv == "shared":
            wide.num_key_value_heads = self.seed.num_attention_heads
        return wide


if __name__.startswith("upcycle."):  # as remote code it must not stand in for the code of other directories
    AutoConfig.register("upcycled", UpcycledConfig, exist_ok=True)
UpcycledConfig.register_for_auto_class()
