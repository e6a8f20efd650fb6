"""The settings of a router: its kind, its losses and its first weights. No torch.

A setting that has no effect beside the others is refused with the reason, here, before any work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import STRICT, nearest
from upcycle.kinds import FACTS, Facts

# top_k stands for both of its gate orders.
KINDS = ("top_k", *(kind for kind in FACTS if kind not in ("topk_softmax", "softmax_topk")))


def shown(value: object) -> str:
    """As a setting is written."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossesConfig:
    """Auxiliary losses of one router, per layer and then averaged; a coefficient of 0 computes nothing.

    balance: BTX's or Switch's load balance. z: ST-MoE's. similarity: pulls the routers of neighbouring layers together.
    entropy: adds the mean entropy of the softmax (above 0 sharpens, below 0 spreads).
    """

    balance: Literal["btx", "switch", "none"] = "none"
    balance_coefficient: float = Field(default=0.0, ge=0)
    balance_scope: Literal["sequence", "micro_batch", "global"] = "sequence"
    z_coefficient: float = Field(default=0.0, ge=0)
    similarity_coefficient: float = Field(default=0.0, ge=0)
    entropy_coefficient: float = 0.0

    @property
    def names(self) -> list[str]:
        """Those that are switched on."""
        return [
            name
            for name in ("balance", "z", "similarity", "entropy")
            if getattr(self, f"{name}_coefficient") and (name != "balance" or self.balance != "none")
        ]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitConfig:
    """The first weights of a router's rows, one row an expert (router_init.py).

    std: of a weight; rows of every kind have the norm that a normal draw has, std · √D. prompts: of each source of
    experts, texts for prompt_embedding, hidden_mean and hidden_last. tokens: of each domain's training text, for
    domain_centroid.
    """

    kind: Literal[
        "normal", "zeros", "orthogonal", "prompt_embedding", "hidden_mean", "hidden_last", "domain_centroid"
    ] = "normal"
    std: float = Field(default=0.02, gt=0)
    prompts: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    tokens: int = Field(default=16_384, gt=0)

    @property
    def needs_prompts(self) -> bool:
        return self.kind in ("prompt_embedding", "hidden_mean", "hidden_last")

    @property
    def needs_text(self) -> bool:
        return self.needs_prompts or self.kind == "domain_centroid"

    @model_validator(mode="after")
    def _means_something(self):
        if self.needs_prompts != bool(self.prompts):
            got = f"prompts of {', '.join(self.prompts)}" if self.prompts else "no prompts"
            raise ValueError(
                f"kind={self.kind} with {got}: prompt_embedding, hidden_mean and hidden_last need prompts={{EXPERT: [TEXT, "
                "...], ...}, and no other kind reads them"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PoolConfig:
    """Which tokens share a decision, so that the text itself stays causal.

    per: "token"; "segment", every `tokens` tokens, from the mean of the segment before (Lory, arXiv:2405.03133);
    "prefix", the whole sequence from the mean of its first `tokens`. first: who takes the first segment (or the prefix),
    before which there is nothing to decide from: the seed's expert; all alike; the base that is no routed expert
    (CombineConfig); or whom the segment's own mean says, without a gradient, which leaks later tokens (perplexity skips it).
    """

    per: Literal["token", "segment", "prefix"] = "token"
    tokens: int = Field(default=256, gt=0)
    first: Literal["seed", "uniform", "base", "own_mean"] = "seed"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NoiseConfig:
    """In training only. std: of Gaussian noise on the logits. jitter: router inputs are scaled by U(1 ± jitter) (Switch)."""

    std: float = Field(default=0.0, ge=0)
    jitter: float = Field(default=0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RouterConfig:
    """A router, of the feed-forward or of the attention experts; docs/routing.md has a table of all of them.

    trained: False leaves the weights as drawn (the control every learned router must beat). capacity_factor: of switch.
    bias_rate: of balancing by a bias on the selection (arXiv:2408.15664); 0 is off.
    """

    kind: str = "top_k"
    top_k: int = Field(default=2, ge=1)
    gate_order: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    gate_scale: Literal["none", "sum_to_one", "straight_through", "compensate"] = "none"
    router_gradient: Literal["required", "none"] = "required"
    trained: bool = True
    capacity_factor: float = Field(default=1.5, gt=0)
    bias_rate: float = Field(default=0.0, ge=0)
    pool: PoolConfig = PoolConfig()
    noise: NoiseConfig = NoiseConfig()
    init: InitConfig = InitConfig()
    losses: LossesConfig = LossesConfig()

    @property
    def form(self) -> str:
        """The name in routing.ROUTERS."""
        return self.gate_order if self.kind == "top_k" else self.kind

    @property
    def facts(self) -> Facts:
        return FACTS[self.form]

    @property
    def learns(self) -> bool:
        return self.trained and not self.facts.weightless

    @model_validator(mode="after")
    def _means_something(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"kind={self.kind} is not known, expected one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            )
        if self.top_k != 1 and (self.facts.every or self.facts.one):
            why = "every expert sees every token" if self.facts.every else "a token has one expert"
            raise ValueError(
                f"top_k={self.top_k} has no effect with kind={self.kind}, where {why}; "
                "write top_k=1, or kind=top_k if few experts are wanted"
            )
        self._check_read()
        self._check_gates()
        self._check_pool()
        if self.bias_rate and (self.kind != "top_k" or not self.trained):
            raise ValueError(
                f"bias_rate={self.bias_rate} needs kind=top_k and trained=true, got kind={self.kind} and "
                f"trained={str(self.trained).lower()}: the bias moves which experts are selected; set bias_rate=0"
            )
        if self.kind == "expert_choice" and self.init.kind == "zeros":
            raise ValueError(
                "init.kind=zeros with kind=expert_choice: to experts that choose, all tokens would be alike, and they would take "
                "none; write init.kind=normal"
            )
        self._check_losses()
        return self

    def _check_read(self) -> None:
        """No setting differs from what it is by default while another keeps it from being read."""
        fixed = f"kind={self.kind} has no weights: {self.facts.weightless}" if self.facts.weightless else ""
        by_token = "pool.per=token decides token by token" if self.pool.per == "token" else ""
        untold = "" if self.kind == "switch" else f"kind={self.kind} has no capacity; switch has"
        unread = {
            "capacity_factor": (self, untold),
            "trained": (self, fixed),
            "pool.tokens": (self.pool, by_token),
            "pool.first": (self.pool, by_token),
            "noise.std": (self.noise, fixed),
            "noise.jitter": (self.noise, fixed),
            "init.kind": (self.init, fixed),
            "init.std": (self.init, fixed or ("init.kind=zeros draws nothing" if self.init.kind == "zeros" else "")),
            "losses.balance_scope": (self.losses, "losses.balance=none" if self.losses.balance == "none" else ""),
            "init.tokens": (
                self.init,
                "" if self.init.kind == "domain_centroid" else f"init.kind={self.init.kind} reads no training text",
            ),
        }
        for name, (of, why) in unread.items():
            field = name.rpartition(".")[2]
            value, default = getattr(of, field), type(of).__dataclass_fields__[field].default
            default = getattr(default, "default", default)  # pydantic's Field
            if why and value != default:
                raise ValueError(f"{name}={shown(value)} has no effect: {why}; leave {name}={shown(default)}")

    def _check_pool(self) -> None:
        if self.pool.per == "token":
            return
        if self.kind not in ("top_k", "soft"):
            raise ValueError(
                f"pool.per={self.pool.per} needs kind=top_k or soft: {self.kind} decides token by token; write pool.per=token"
            )
        if self.pool.first == "uniform" and self.kind != "soft":
            raise ValueError(
                "pool.first=uniform needs kind=soft: few experts cannot have equal shares of a token; write pool.first=seed"
            )
        if self.noise.std or self.noise.jitter:
            raise ValueError(
                f"noise with pool.per={self.pool.per}: noise of single tokens averages out before anything is decided; set "
                "noise.std and noise.jitter to 0"
            )

    def _check_losses(self) -> None:
        if self.losses.balance == "none" and self.losses.balance_coefficient:
            raise ValueError(
                f"losses.balance_coefficient={self.losses.balance_coefficient} has no effect with losses.balance=none; write "
                "losses.balance=btx or switch, or set the coefficient to 0"
            )
        if "balance" in self.losses.names and self.losses.balance == "switch" and self.facts.every:
            raise ValueError(
                f"losses.balance=switch is constant with kind={self.kind}, where every token takes every expert; write balance=btx "
                "or none"
            )
        if self.losses.names and not self.learns:
            why = self.facts.weightless or "its weights are never trained"
        elif "balance" in self.losses.names and self.kind == "expert_choice":
            why = "experts that choose their tokens are balanced by construction"
        else:
            return
        raise ValueError(
            f"losses ({', '.join(self.losses.names)}) have no effect on a router with kind={self.kind}, "
            f"trained={str(self.trained).lower()}: {why}; set their coefficients to 0"
        )

    def _check_gates(self) -> None:
        constant = (
            self.kind == "top_k"
            and self.top_k == 1
            and (self.gate_order == "topk_softmax" or self.gate_scale == "sum_to_one")
        ) or (self.kind in ("switch", "sample_top1") and self.gate_scale == "sum_to_one")
        if constant and self.learns and self.router_gradient == "required":
            raise ValueError(
                f"top_k=1 with gate_order={self.gate_order}, gate_scale={self.gate_scale} makes every gate the constant 1, "
                "so the language-model loss cannot train the router; use gate_order=softmax_topk with "
                "gate_scale=straight_through or none, or write router_gradient=none if that is what you want"
            )
        if self.kind == "top_k" and self.gate_order == "topk_softmax" and self.gate_scale not in ("none", "sum_to_one"):
            raise ValueError(
                f"gate_scale={self.gate_scale} needs gate_order=softmax_topk: gates of topk_softmax already sum to 1"
            )
        if self.kind != "top_k" and not self.facts.scaled and self.gate_scale not in ("none", "sum_to_one"):
            raise ValueError(f"gate_scale={self.gate_scale} has no effect with kind={self.kind}: its gates sum to 1")
        if self.kind == "expert_choice" and self.gate_scale not in ("none", "sum_to_one"):
            raise ValueError(
                f"gate_scale={self.gate_scale} is not defined for kind=expert_choice, where a token has any number of "
                "experts; write none (the probabilities) or sum_to_one"
            )
