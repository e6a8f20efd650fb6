"""The config of a mixture, as it stands in config.json beside its weights.

This file travels inside checkpoints as remote code: it imports other such files only.
"""

from __future__ import annotations

import copy

from transformers import AutoConfig, PretrainedConfig

from .families import head_dim
from .kinds import BENDING, COMBINE, FACTS, UPDATES
from .losses import LOADS
from .plans import expert_plan, sharding_plan, tensor_plan
from .routing import GATE_SCALES, Rule, gates_sum_to_one, impossible

# What the router_options and attention_router of a config may hold, beside what they are without it.
OPTIONS = {
    name: value for name, value in Rule._field_defaults.items() if name not in ("top_k", "gate_scale", "groups", "seed")
}
ATTENTION_ROUTER = {"kind": "soft", "top_k": 1, "gate_scale": "none", **OPTIONS}
LOSSES = {
    "balance": "none",
    "balance_coefficient": 0.0,
    "balance_scope": "sequence",
    "z_coefficient": 0.0,
    "similarity_coefficient": 0.0,
    "entropy_coefficient": 0.0,
}

AUTO_MAP = {
    "AutoConfig": "configuration.UpcycledConfig",
    "AutoModel": "modeling.UpcycledModel",
    "AutoModelForCausalLM": "modeling.UpcycledForCausalLM",
}


class UpcycledConfig(PretrainedConfig):
    """A mixture: the seed's config, the experts by name and in order, and its routers.

    experts: names; the position is the expert's index in every stacked tensor and router row. expert_sources: the model
    that each came from, "seed" or a branch (None: its own name). one_per_source: a token takes one expert of each at most.
    split: hidden units of the seed's feed-forward over those of one expert. shared_expert: "none", or whose feed-forward
    every token takes beside the routed ones ("seed", "merged"), and shared_gate, "half" of either or the "sum".
    attention: "merged" (one attention, BTX) or "mixture" (soft mixture over experts, BAM), with kv: "expert" | "shared".
    attention_experts, attention_sources: names and sources of these (None: those of `experts`). router: a name in
    routing.ROUTERS; its other fields (`routing.Rule`) are num_experts_per_tok, gate_scale and router_options.
    attention_router: the same fields of the attention's, in one.
    tie: "none", "layers" (the first layer decides for all), "sublayers" (the feed-forward router has the attention router's
    logits) or "skip" (a router adds the logits of the layer before). balance to entropy_coefficient: the feed-forward
    routers' losses; attention_losses: the same fields for the attention's. routed_layers: those that are mixtures (None: all).
    combine: whether outputs or weights of feed-forward experts are combined, and how (kinds.COMBINE).
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
        router_options: dict | None = None,
        attention: str = "merged",
        attention_router: dict | None = None,
        kv: str = "expert",
        tie: str = "none",
        balance: str = "none",
        balance_coefficient: float = 0.0,
        balance_scope: str = "sequence",
        z_coefficient: float = 0.0,
        similarity_coefficient: float = 0.0,
        entropy_coefficient: float = 0.0,
        attention_losses: dict | None = None,
        expert_sources: list[str] | None = None,
        one_per_source: bool = False,
        attention_experts: list[str] | None = None,
        attention_sources: list[str] | None = None,
        split: int = 1,
        shared_expert: str = "none",
        shared_gate: str = "half",
        routed_layers: list[int] | None = None,
        initializer_range: float = 0.02,
        combine: dict | None = None,
        **kwargs,
    ):
        seed = {"model_type": "llama"} if seed is None else seed
        self.seed = AutoConfig.for_model(**seed) if isinstance(seed, dict) else seed
        self.experts = list(experts)
        self.expert_sources = list(self.experts if expert_sources is None else expert_sources)
        self.attention_experts = None if attention_experts is None else list(attention_experts)
        self.attention_sources = None if attention_sources is None else list(attention_sources)
        self.one_per_source, self.routed_layers = one_per_source, routed_layers
        self.split, self.shared_expert, self.shared_gate = split, shared_expert, shared_gate
        self.router, self.gate_scale, self.attention, self.kv, self.tie = router, gate_scale, attention, kv, tie
        self.router_options = OPTIONS | (router_options or {})
        self.attention_router = ATTENTION_ROUTER | (attention_router or {})
        self.num_experts_per_tok = _places(router, num_experts_per_tok, len(self.experts))
        self.attention_router["top_k"] = _places(
            self.attention_router["kind"], self.attention_router["top_k"], self.num_attention_experts
        )
        self.balance, self.balance_coefficient, self.balance_scope = balance, balance_coefficient, balance_scope
        self.z_coefficient, self.similarity_coefficient = z_coefficient, similarity_coefficient
        self.entropy_coefficient, self.attention_losses = entropy_coefficient, LOSSES | (attention_losses or {})
        self.initializer_range, self.combine = initializer_range, COMBINE | (combine or {})
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.seed, name, None))
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        scopes = ("sequence", "micro_batch", "global")
        choices = [
            ("router", self.router, FACTS),
            ("gate_scale", self.gate_scale, GATE_SCALES),
            ("attention", self.attention, ("merged", "mixture")),
            ("attention_router.kind", self.attention_router["kind"], [name for name in FACTS if name != "switch"]),
            ("attention_router.gate_scale", self.attention_router["gate_scale"], GATE_SCALES),
            ("kv", self.kv, ("expert", "shared")),
            ("shared_expert", self.shared_expert, ("none", "seed", "merged")),
            ("shared_gate", self.shared_gate, ("half", "sum")),
            ("combine.of", self.combine.get("of"), ("outputs", "weights")),
            ("combine.curvature", self.combine.get("curvature"), ("none", "kronecker", "linear")),
            ("combine.share", self.combine.get("share"), ("layer", "all")),
            ("combine.election", self.combine.get("election"), ("none", "sign")),
            ("combine.update", self.combine.get("update"), UPDATES),
            ("tie", self.tie, ("none", "layers", "sublayers", "skip")),
            ("balance", self.balance, ("none", *LOADS)),
            ("balance_scope", self.balance_scope, scopes),
            ("attention_losses.balance", self.attention_losses["balance"], ("none", *LOADS)),
            ("attention_losses.balance_scope", self.attention_losses["balance_scope"], scopes),
        ]
        for name, value, valid in choices:
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known; expected one of {', '.join(valid)}")
        for name, given, valid in (
            ("router_options", self.router_options, OPTIONS),
            ("attention_router", self.attention_router, ATTENTION_ROUTER),
            ("attention_losses", self.attention_losses, LOSSES),
            ("combine", self.combine, COMBINE),
        ):
            if odd := [key for key in given if key not in valid]:
                raise ValueError(f"{name}: {odd[0]!r} is not known; expected one of {', '.join(valid)}")
        layers = range(self.seed.num_hidden_layers)
        if (self.routed_layers is not None and not set(self.routed_layers) <= set(layers)) or self.routed_layers == []:
            raise ValueError(
                f"routed_layers={self.routed_layers}: expected some of the seed's {len(layers)} layers, from 0"
            )
        self._check_experts()
        self._check_combine()
        for part in self.parts:
            if problem := impossible(self.rule(part, self.routed[-1])) or self._idle_loss(part):
                raise ValueError(f"{part} router: {problem}")
        if self.tie in ("layers", "skip") and len(self.routed) == 1:
            raise ValueError(f"tie={self.tie} has no effect with one mixture layer; expected tie=none, or more layers")
        if "sample_top1" in (self.router, self.attention_router["kind"]) and len(self.routed) == 1:
            raise ValueError(
                "sample_top1 is soft in the first mixture layer, and there is no other; expected soft, or more layers"
            )
        if self.tie == "layers" and "sample_top1" in [self.rule(part, self.routed[-1]).kind for part in self.parts]:
            raise ValueError(
                "tie=layers: the first layer of sample_top1 is soft, and would be so in all layers; expected tie=none, or "
                "another router"
            )

    def _idle_loss(self, part: str) -> str:
        """Why a loss of `part` that is switched on could not train its routers; "" if there is none such."""
        names, rule = self.loss_names(part), self.rule(part, self.routed[-1])
        if "balance" in names and self.losses(part)["balance"] == "switch" and rule.top_k == len(self.names_of(part)):
            return "balance=switch is constant where a token takes every expert; expected balance=btx, or none"
        if "similarity" in names and (self.tie == "layers" or len(self.routed) == 1):
            return "similarity compares the decisions of layers, and there is one decision; expected its coefficient to be 0"
        return ""

    def _check_combine(self) -> None:
        for name, default in COMBINE.items():
            if not isinstance(self.combine[name], (int, float) if isinstance(default, float) else type(default)):
                raise ValueError(f"combine.{name}={self.combine[name]!r}, expected {type(default).__name__}")
        rule = self.rule("ffn", self.routed[-1])
        if not self.merges_weights:
            if self.combine != COMBINE or rule.first in ("base", "own_mean"):
                raise ValueError(
                    f"combine={self.combine}, first={rule.first!r}: a base, a curvature and their like are for experts whose weights are "
                    "merged; expected combine.of=weights, or all else as it is by default"
                )
            return
        if rule.per == "token" or not (rule.kind == "soft" or FACTS[rule.kind].selects):
            raise ValueError(
                f"combine.of=weights merges weights once for each decision; expected a soft or top-k router that decides per segment or "
                f"prefix, got {rule.kind}, per={rule.per}"
            )
        if rule.first == "base" and self.combine["base"] in ("none", "zeros"):
            raise ValueError(f"first='base' needs a base expert, got combine.base={self.combine['base']!r}")
        if rule.first == "base" and self.combine["update"] in ("travel", "previous_merged"):
            raise ValueError(
                f"first='base' with combine.update={self.combine['update']!r} sends first segments through another layer's feed-forward; "
                "expected first='uniform'"
            )
        if self.split > 1:
            raise ValueError(f"combine.of=weights merges whole feed-forwards, got split={self.split}; expected 1")

    def _check_experts(self) -> None:
        where = "router.top_k (num_experts_per_tok)"
        sides = [("experts", self.experts, self.expert_sources, where, self.num_experts_per_tok)]
        if self.attention == "mixture":
            top_k = self.attention_router["top_k"]
            names, sources = self.names_of("attention"), self.sources_of("attention")
            sides.append(("attention_experts", names, sources, "attention_router.top_k", top_k))
        for field, names, sources, where, top_k in sides:
            if len(set(names)) != len(names):
                raise ValueError(f"{field}={names} has a name twice; experts need distinct names")
            if len(sources) != len(names):
                raise ValueError(
                    f"{field}: {len(names)} names and {len(sources)} sources; expected one source for each"
                )
            if not 1 <= top_k <= len(names):
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise ValueError(
                    f"{where}={top_k} is not between 1 and the {len(names)} experts ({shown}); lower top_k or add a branch"
                )
        if self.tie == "sublayers" and self.num_attention_experts != self.num_experts:
            raise ValueError(
                f"tie=sublayers: {self.num_experts} feed-forward experts cannot have the logits of {self.num_attention_experts} "
                "attention experts; expected as many of either, or tie=none"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The sublayers that have routers."""
        return ("ffn", "attention") if self.attention == "mixture" else ("ffn",)

    @property
    def routed(self) -> list[int]:
        """The layers that are mixtures, in order."""
        return list(range(self.seed.num_hidden_layers)) if self.routed_layers is None else sorted(self.routed_layers)

    def rule(self, part: str, layer: int) -> Rule:
        """The router of `part` ("ffn" or "attention") in a layer. BTX's sample_top1 is soft in the first one."""
        if part == "ffn":
            rule = Rule(self.router, self.num_experts_per_tok, self.gate_scale, **self.router_options)
        else:
            rule = Rule(**self.attention_router)
        sources = self.sources_of(part)
        order = list(dict.fromkeys(sources))
        # Soft attention has all experts; who asks for one of a source means the feed-forward's.
        grouped = self.one_per_source and (part == "ffn" or FACTS[rule.kind].selects)
        groups = tuple(order.index(source) for source in sources) if grouped else None
        rule = rule._replace(groups=groups, seed=sources.index("seed") if "seed" in sources else -1)
        if rule.kind == "sample_top1" and layer == self.routed[0]:
            return rule._replace(kind="soft", top_k=len(sources))
        return rule

    def ties(self, part: str, layer: int) -> dict[str, str]:
        """What the router of `part` in a layer takes from another: `router.Router`'s arguments."""
        place = self.routed.index(layer)
        if self.tie == "sublayers":
            return {"logits_of": f"attention.{layer}"} if part == "ffn" else {}
        if self.tie == "none" or place == 0:
            return {}
        if self.tie == "layers":
            return {"decides": f"{part}.{self.routed[0]}"}
        return {"skip_from": f"{part}.{self.routed[place - 1]}"}

    @property
    def merges_weights(self) -> bool:
        """Whether feed-forward experts are merged in weight space, not their outputs."""
        return self.combine["of"] == "weights"

    @property
    def bends(self) -> bool:
        """Whether what is merged is more than the experts' weights as they are stored (camex.py)."""
        return any(self.combine[name] != COMBINE[name] for name in BENDING)

    def has_base(self, layer: int) -> bool:
        """Whether the base expert's weights lie in this layer."""
        own = self.combine["update"] in ("none", "per_layer") or layer == self.routed[0]
        return self.merges_weights and own and self.combine["base"] not in ("none", "zeros")

    @property
    def remembers(self) -> bool:
        """Whether a router decides for many tokens, so that it remembers with the cache."""
        return any(self.rule(part, self.routed[0]).per != "token" for part in self.parts)

    @property
    def leaks(self) -> int:
        """How many tokens at a sequence's start are routed by their own segment, later tokens included; 0: no router looks ahead."""
        rule = self.rule("ffn", self.routed[0])
        return rule.tokens if rule.per != "token" and rule.first == "own_mean" else 0

    @property
    def counts_steps(self) -> bool:
        """Whether routers change with the optimizer's steps, beyond their weights: what train.py does, and no other loop."""
        rules = [self.rule(part, self.routed[-1]) for part in self.parts]
        return any(rule.bias_rate or rule.kind == "sample_top1" for rule in rules)

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the feed-forward gates of every token sum to 1, so that copies of the seed are the seed."""
        return gates_sum_to_one(self.rule("ffn", self.routed[-1]), self.num_experts)

    def losses(self, part: str) -> dict:
        """The auxiliary losses of the routers of `part`: the fields of LOSSES."""
        return {name: getattr(self, name) for name in LOSSES} if part == "ffn" else dict(self.attention_losses)

    def loss_names(self, part: str) -> dict[str, str]:
        """The losses of `part` that are switched on, and what they are called in a mixture's outputs and metrics."""
        losses, prefix = self.losses(part), "" if part == "ffn" else f"{part}_"
        return {
            name: prefix + name
            for name in ("balance", "z", "similarity", "entropy")
            if losses[f"{name}_coefficient"] and (name != "balance" or losses["balance"] != "none")
        }

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_attention_experts(self) -> int:
        return len(self.names_of("attention"))

    def names_of(self, part: str) -> list[str]:
        """The experts of "ffn" or "attention", in order."""
        return self.experts if part == "ffn" or self.attention_experts is None else self.attention_experts

    def sources_of(self, part: str) -> list[str]:
        """The model that each of them came from."""
        if part == "ffn" or self.attention_experts is None:
            return self.expert_sources
        return self.attention_experts if self.attention_sources is None else self.attention_sources

    @property
    def vocab_size(self) -> int:
        return self.seed.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.seed.hidden_size

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tensor_plan(self)

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return expert_plan(self)

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sharding_plan(self)

    def get_text_config(self, decoder=None, encoder=None):
        """The seed's config with the head counts that the cache of a mixture's layer has. Shallow: kernel settings stay live.

        Caches take their sizes from the keys themselves; `UpcycledForCausalLM._get_static_cache_init_shape` says what
        happens where they would be read here.
        """
        if self.attention == "merged":
            return self.seed
        wide = copy.copy(self.seed)
        wide.head_dim = head_dim(self.seed)  # else it would be derived from the wide head count
        wide.num_attention_heads *= self.num_attention_experts
        if getattr(wide, "num_key_value_heads", None) and self.kv == "expert":
            wide.num_key_value_heads *= self.num_attention_experts
        elif not getattr(wide, "num_key_value_heads", None) and self.kv == "shared":
            wide.num_key_value_heads = self.seed.num_attention_heads
        return wide


def _places(kind: str, top_k: int, num_experts: int) -> int:
    """K: all experts where the router needs them all, one where it takes one."""
    facts = FACTS.get(kind)  # an unknown one is refused below
    return num_experts if facts and facts.every else 1 if facts and facts.one else top_k


if __name__.startswith("upcycle."):  # as remote code it must not stand in for the code of other directories
    AutoConfig.register("upcycled", UpcycledConfig, exist_ok=True)
UpcycledConfig.register_for_auto_class()
