"""Every router of the library, for feed-forward and for attention experts, and its slow twin inside a whole mixture.

A new router is one entry in CASES: its settings; tests/test_routers.py then asks everything of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import reference
import tiny
import torch
from torch import Tensor

from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace


@dataclass(frozen=True)
class Case:
    """A router in the terms of a mixture's config. options: fields of routing.Rule beside kind, top_k and gate_scale."""

    kind: str
    top_k: int = 1
    gate_scale: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # of the whole mixture: ties, one_per_source
    trains: bool = True  # False: refused in training, with the reason
    learns: bool = True  # False: nothing in it is trained
    draws: bool = False  # random numbers, in training
    sums_to_one: bool = True  # its gates, in evaluation
    refused_for_attention: str = ""
    only_for_attention: bool = False  # the mixture must have attention experts

    def ffn(self) -> dict[str, Any]:
        """UpcycledConfig's settings with this router on the feed-forward experts."""
        choices = {"router": self.kind, "num_experts_per_tok": self.top_k, "gate_scale": self.gate_scale}
        choices |= {"router_options": self.options} | self.config
        return choices | ({"attention": "mixture"} if self.only_for_attention else {})

    def both(self) -> dict[str, Any]:
        """The same with it on the attention experts as well."""
        own = {"kind": self.kind, "top_k": self.top_k, "gate_scale": self.gate_scale, **self.options}
        return self.ffn() | {"attention": "mixture", "attention_router": own}


SEGMENTS = {"per": "segment", "tokens": 3, "first": "seed"}
CASES = {
    "top-k, then softmax": Case("topk_softmax", 2),
    "softmax, then top-k": Case("softmax_topk", 2, sums_to_one=False),
    "softmax, then top-k, sum to one": Case("softmax_topk", 2, "sum_to_one"),
    "softmax, then top-1, straight through": Case("softmax_topk", 1, "straight_through"),
    "softmax, then top-1, compensated": Case("softmax_topk", 1, "compensate", sums_to_one=False),
    "soft": Case("soft"),
    "switch": Case(
        "switch",
        1,
        "none",
        {"capacity_factor": 0.8},
        sums_to_one=False,
        refused_for_attention="attention_router.kind='switch' is not known",
    ),
    "sample top-1": Case("sample_top1", 1, "straight_through", draws=True),
    "expert choice": Case("expert_choice", 2, sums_to_one=False),
    "expert choice, sum to one": Case("expert_choice", 2, "sum_to_one"),
    "hash of the token": Case("hash", learns=False),
    "uniform": Case("uniform", learns=False),
    "oracle by domain": Case("oracle", trains=False, learns=False),
    "random, never trained": Case("topk_softmax", 2, "none", {"trained": False}, learns=False),
    "segments, top-k": Case("topk_softmax", 2, "none", SEGMENTS),
    "segments, soft": Case("soft", 1, "none", SEGMENTS | {"first": "uniform"}),
    "first k tokens": Case("softmax_topk", 1, "straight_through", SEGMENTS | {"per": "prefix"}),
    "noise and jitter": Case("topk_softmax", 2, "none", {"noise_std": 0.3, "jitter": 0.1}, draws=True),
    "balanced by a bias": Case("softmax_topk", 2, "sum_to_one", {"bias_rate": 0.1}),
    "one expert of a source": Case(
        "topk_softmax", 2, "none", {}, {"one_per_source": True, "expert_sources": ["seed", "code", "code"]}
    ),
    "one routing for all layers": Case("topk_softmax", 2, "none", {}, {"tie": "layers"}),
    "one routing for attention and feed-forward": Case(
        "soft", 1, "none", {}, {"tie": "sublayers"}, only_for_attention=True
    ),
    "plus the layer before": Case("softmax_topk", 2, "sum_to_one", {}, {"tie": "skip"}),
}
SIDES = ("ffn", "both")
PAIRS = [
    (name, side)
    for name, case in CASES.items()
    for side in SIDES
    if not (side == "both" and case.refused_for_attention)
]
BIAS = [0.3, -0.2, 0.1]


def file_of(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def mixture_of(name: str, side: str, kind: str = "llama", dtype: torch.dtype = torch.float64, **choices):
    """(dense models, the mixture of three in eval mode) with the case's routers; biases are not 0."""
    models = tiny.dense_models(kind, dtype=dtype)
    mixture = tiny.mixture_of(models, **(getattr(CASES[name], side)() | choices))
    for router in routers_of(mixture):
        if router.bias is not None:
            router.bias.copy_(torch.tensor(BIAS))
    return models, mixture


def routers_of(mixture: UpcycledForCausalLM) -> list[Any]:
    return [module for module in mixture.modules() if type(module).__name__ == "Router"]


def trace_of(name: str, ids: Tensor, step: int = 0) -> RoutingTrace:
    """A trace; the oracle's says that row b belongs to expert b."""
    expert_B = torch.arange(len(ids)) % 3 if CASES[name].kind == "oracle" else None
    return RoutingTrace(expert_B=expert_B, step=step)


class Twin:
    """`decide` of a reference.ReferenceMixture: the case's routers as loops, with the model's random draws replayed."""

    def __init__(
        self,
        name: str,
        side: str,
        weights: dict[str, list[Tensor]],
        ids: Tensor,
        mask: Tensor,
        training: bool,
        step: int,
    ):
        self.case, self.side, self.weights, self.ids, self.mask = CASES[name], side, weights, ids, mask
        self.training, self.step = training, step
        self.logits: dict[str, Tensor] = {}
        self.decisions: dict[str, list] = {}

    def __call__(self, part: str, layer: int, hidden_BSD: Tensor) -> list[list[reference.Decision]]:
        case, tie, name = self.case, self.case.config.get("tie"), f"{part}.{layer}"
        own = part == "ffn" or self.side == "both"
        if tie == "layers" and layer > 0:
            return self.decisions[f"{part}.0"]
        if tie == "sublayers" and part == "ffn":
            logits = self.logits[f"attention.{layer}"]
        else:
            logits = self._logits(part, layer, hidden_BSD, own)
        if tie == "skip" and layer > 0:
            logits = logits + self.logits[f"{part}.{layer - 1}"]
        self.logits[name] = logits
        kind, k, scale, rule = (
            (case.kind, case.top_k, case.gate_scale, self._rule()) if own else ("soft", 1, "none", {})
        )
        if kind == "sample_top1" and layer == 0:
            kind = "soft"
        shape, draws = logits.shape, None
        if kind == "sample_top1" and self.training:
            draws = torch.empty(shape, dtype=torch.float32).flatten(0, 1).exponential_().view(shape)
        self.decisions[name] = [
            reference.decide(
                reference.Sequence(
                    list(logits[b]), self.mask[b].bool().tolist(), self.ids[b].tolist(), self.training, self.step,
                    None if draws is None else draws[b], b % 3,
                ),
                kind, k, scale, **dict(rule),
            )
            for b in range(len(self.ids))
        ]  # fmt: skip
        return self.decisions[name]

    def _logits(self, part: str, layer: int, hidden_BSD: Tensor, own: bool) -> Tensor:
        options, weights = self.case.options if own else {}, self.weights[part]
        if not weights:  # a router without any
            return torch.zeros(*hidden_BSD.shape[:2], 3, dtype=torch.float64)
        if self.training and (jitter := options.get("jitter")):
            drawn = torch.empty(hidden_BSD.shape, dtype=torch.float32).uniform_(1 - jitter, 1 + jitter)
            hidden_BSD = hidden_BSD * drawn.double()
        logits = hidden_BSD.double() @ weights[layer].T
        if self.training and (std := options.get("noise_std")):
            logits = logits + std * torch.randn(logits.shape, dtype=torch.float32).double()
        return logits

    def _rule(self) -> dict[str, Any]:
        """The options in reference.decide's terms."""
        rule = {
            name: self.case.options[name]
            for name in ("per", "tokens", "first", "capacity_factor")
            if name in self.case.options
        }
        if "per" in rule:
            rule["seed"] = 0
        if self.case.options.get("bias_rate"):
            rule["bias"] = torch.tensor(BIAS).tolist()
        if self.case.config.get("one_per_source"):
            rule["groups"] = [0, 1, 1]
        return rule


def twin_of(
    name: str,
    side: str,
    models: list,
    mixture: UpcycledForCausalLM,
    ids: Tensor,
    mask: Tensor,
    training: bool,
    step: int,
):
    """The reference mixture with the case's routers as loops; its routers' weights have gradients."""
    weights = {part: tiny.routers_of(mixture, part) for part in ("ffn", "attention")}
    config = mixture.config
    twin = reference.ReferenceMixture(
        models, weights["ffn"], attention=config.attention, kv=config.kv, attention_routers=weights["attention"]
    )
    ours = {"ffn": twin.ffn_routers, "attention": twin.attention_routers}
    twin.decide = Twin(name, side, ours, ids, mask, training, step)
    return twin
