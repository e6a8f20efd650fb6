"""How feed-forward experts are combined, as settings: their outputs, or their weights once a segment; and CAMEx. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import STRICT
from upcycle.kinds import BENDING, COMBINE

BASES = ("none", "zeros", "mean")  # or a model's name
LARGEST_ALPHA, LARGEST_RANK = 1e3, 256  # above: a slip; the published ones are 1, and 1 to 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CombineConfig:
    """What of the experts is combined, by which formula (soft_merging.py, camex.py; docs/camex.md).

    of: "outputs", Σ gate · MLP(x), or "weights": one MLP for each segment, B + Σ gate · (E − B) (soft merging, arXiv:2405.03133).
    base: the expert B that nobody routes to: "seed" or a branch, which is then none of the routed ones; "mean" of the routed; "zeros"; "none",
    only Σ gate · E. train_base: False keeps it as it is.
    The rest is CAMEx (arXiv:2502.18821), B + α Σ gate · M(E − B). alpha: α. curvature: M, learned, I at first: "kronecker" of this `rank`, of each expert
    and matrix in each `layer`, or in `all` together (share); "linear", a plain map of the inputs, the control. election: "sign" keeps entries of E − B
    that have the sign of Σ (E − B). drop: of them so many are dropped in training (DARE). update: what the base of a layer is;
    "none", its own; "travel", from layer to layer as published; "previous_merged", what the layer before merged; "per_layer".
    """

    of: Literal["outputs", "weights"] = "outputs"
    base: str = "none"
    train_base: bool = True
    alpha: float = Field(default=1.0, gt=0, le=LARGEST_ALPHA, allow_inf_nan=False)
    curvature: Literal["none", "kronecker", "linear"] = "none"
    rank: int = Field(default=1, ge=1, le=LARGEST_RANK)
    share: Literal["layer", "all"] = "layer"
    election: Literal["none", "sign"] = "none"
    drop: float = Field(default=0.0, ge=0, lt=1)
    update: Literal["none", "travel", "previous_merged", "per_layer"] = "none"

    @property
    def model(self) -> str | None:
        """The model whose feed-forwards are the base."""
        return None if self.base in BASES else self.base

    @model_validator(mode="after")
    def _means_something(self):
        changed = [name for name, of in self.__dataclass_fields__.items() if getattr(self, name) != _default(of)]
        if self.of == "outputs":
            if changed:
                raise ValueError(
                    f"{changed[0]}={_shown(getattr(self, changed[0]))} has no effect with of=outputs, where experts keep their weights; write "
                    f"of=weights, or leave {changed[0]} out"
                )
            return self
        idle = {}
        if self.curvature != "kronecker":
            idle["rank"] = f"curvature={self.curvature}"
        if self.curvature == "none":
            idle["share"] = "curvature=none"
        if self.base in ("none", "zeros"):
            idle["train_base"] = f"base={self.base}"
        if self.base == "none":
            idle |= dict.fromkeys(
                BENDING, "base=none, which makes no differences (base=seed, mean, zeros or a branch does)"
            )
        for name in changed:
            if name in idle:
                raise ValueError(
                    f"{name}={_shown(getattr(self, name))} has no effect with {idle[name]}; leave {name} out"
                )
        return self

    def check_beside(self, choice: Any) -> None:
        """What of an AssembleConfig these settings do not go with. Raises ValueError."""
        router, placement = choice.router, choice.placement
        for name, one in choice.routers.items():
            if one.pool.first in ("base", "own_mean") and (self.of == "outputs" or name != "router"):
                raise ValueError(
                    f"{name}.pool.first={one.pool.first} is for experts whose weights are merged (combine.of=weights); write first=seed or uniform"
                )
        if self.of == "outputs":
            return
        if router.pool.per == "token":
            raise ValueError(
                "combine.of=weights builds a feed-forward for each decision, and router.pool.per=token decides for every token; write "
                "router.pool.per=segment"
            )
        if router.pool.first == "base" and self.base in ("none", "zeros"):
            raise ValueError(
                f"router.pool.first=base needs a base expert, got combine.base={self.base}; write base=seed, mean or a branch, or first=uniform"
            )
        if router.pool.first == "base" and self.update in ("travel", "previous_merged"):
            raise ValueError(
                f"router.pool.first=base with combine.update={self.update}: the base comes from the layer before, so first segments would go "
                "through another layer's feed-forward; write router.pool.first=uniform"
            )
        if placement.split > 1 or placement.blend or placement.match != "none":
            raise ValueError(
                f"combine.of=weights merges whole feed-forwards, got placement.{placement.changes_experts}; leave it out"
            )
        bends = any(getattr(self, name) != COMBINE[name] for name in BENDING)
        sums = router.kind == "soft" or router.gate_order == "topk_softmax"
        if self.base != "none" and not bends and router.pool.first != "base" and sums:
            raise ValueError(
                f"combine.base={self.base} has no effect with curvature=none, alpha=1 and router.pool.first={router.pool.first}: gates sum to 1, and "
                "B + Σ gate (E − B) is Σ gate E; write base=none"
            )
        if self.curvature != "none" and placement.experts == "seed" and self.base in ("seed", "mean"):
            raise ValueError(
                f"combine.base={self.base} with placement.experts=seed: experts that are their base leave differences of 0, which teach no "
                "curvature; write experts=branches"
            )
        if self.model is not None and isinstance(placement.experts, tuple) and self.model in placement.experts:
            raise ValueError(
                f"combine.base={self.base} is also among placement.experts={list(placement.experts)}; nobody routes to a base: take it out"
            )


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What merging experts in weight space costs. bases: layers that hold a base; maps: that hold a curvature of this kind and rank. segment:
    tokens of a decision, 0 for two decisions a sequence. merges_first: the first segment's experts are merged too.
    """

    bases: int
    maps: int
    curvature: str
    rank: int
    update: str
    segment: int
    merges_first: bool

    @classmethod
    def of(cls, combine: Mapping[str, Any], pool: Mapping[str, Any], mixtures: int) -> Combined | None:
        """combine, pool: the settings' fields, as kinds.COMBINE and PoolConfig name them. None: outputs are combined."""
        if combine["of"] == "outputs":
            return None
        own = combine["update"] in ("none", "per_layer")
        return cls(
            bases=0 if combine["base"] in ("none", "zeros") else mixtures if own else 1,
            maps=mixtures if combine["share"] == "layer" else 1,
            curvature=combine["curvature"],
            rank=combine["rank"],
            update=combine["update"],
            segment=pool["tokens"] if pool["per"] == "segment" else 0,
            merges_first=pool["first"] != "base",
        )

    def decisions(self, sequence_length: int) -> int:
        """Of a sequence, in one layer: how often experts are merged."""
        count = -(-sequence_length // self.segment) if self.segment else 2
        return count - (not self.merges_first)


def _default(field: Any) -> Any:
    return getattr(field.default, "default", field.default)  # pydantic's Field


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
