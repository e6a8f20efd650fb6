"""The settings of a mixture: its routers, where its experts sit, and how the rest is merged. No torch.

A setting that has no effect beside the others is refused with the reason, here, before any work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle.combine_config import CombineConfig
from upcycle.config import STRICT, TrainConfig
from upcycle.merge_config import MergeConfig
from upcycle.placement_config import PlacementConfig
from upcycle.router_config import InitConfig, LossesConfig, RouterConfig, shown


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AssembleConfig:
    """How branches become one mixture. `attention: merged` is BTX, `attention: mixture` is BAM.

    tie: "layers", the first routed layer decides for all; "sublayers", the feed-forward router of a layer has the logits of
    its attention router; "skip", a router adds the logits of the layer before. merge: how what is no expert is made of all.
    """

    router: RouterConfig = RouterConfig(losses=LossesConfig(balance="btx", balance_coefficient=0.01))
    attention: Literal["merged", "mixture"] = "merged"
    attention_router: RouterConfig = RouterConfig(kind="soft", top_k=1)
    kv: Literal["expert", "shared"] = "expert"
    tie: Literal["none", "layers", "sublayers", "skip"] = "none"
    placement: PlacementConfig = PlacementConfig()
    combine: CombineConfig = CombineConfig()
    merge: MergeConfig = MergeConfig()
    include_seed: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_bytes: int = 4_000_000_000
    prove: bool = True
    rng_seed: int = Field(default=1, ge=0)

    @property
    def inits(self) -> dict[str, InitConfig]:
        """How the routers that have weights start, by the setting they belong to."""
        tied = "router" if self.tie == "sublayers" else None
        return {name: one.init for name, one in self.routers.items() if not one.facts.weightless and name != tied}

    @property
    def routers(self) -> dict[str, RouterConfig]:
        """The routers of the mixture, by the setting they belong to."""
        return {"router": self.router} | (
            {"attention_router": self.attention_router} if self.attention == "mixture" else {}
        )

    @model_validator(mode="after")
    def _means_something(self):
        if self.attention == "merged":
            self._check_merged()
        if self.attention == "mixture" and self.attention_router.kind == "switch":
            raise ValueError(
                "attention_router.kind=switch: an attention expert attends over the whole sequence whatever the gates say, so "
                "a capacity saves nothing and only drops tokens; write kind=top_k with top_k=1, gate_order=softmax_topk"
            )
        if self.tie == "sublayers":
            self._check_sublayers()
        if self.tie != "none":
            self._check_tie()
        self._check_first()
        self.combine.check_beside(self)
        self.placement.check_beside(self)
        return self

    def _check_merged(self) -> None:
        if self.kv == "shared":
            raise ValueError(
                "kv=shared has no effect with attention=merged, which has one attention and so one set of keys and values; "
                "write kv=expert, or attention=mixture for attention experts that share keys and values"
            )
        if self.tie == "sublayers":
            raise ValueError(
                "tie=sublayers has no effect with attention=merged, which has no attention router; write tie=none"
            )
        if self.attention_router != RouterConfig(kind="soft", top_k=1):
            raise ValueError(
                "attention_router has no effect with attention=merged, which has one attention; leave it as it is by default, or "
                "write attention=mixture"
            )

    def _check_sublayers(self) -> None:
        """The feed-forward router takes the attention router's logits, and nothing of its own that makes logits is read."""
        router, plain = self.router, RouterConfig()
        for name, value, default in (
            ("trained", router.trained, plain.trained),
            ("noise.std", router.noise.std, plain.noise.std),
            ("noise.jitter", router.noise.jitter, plain.noise.jitter),
            ("init.kind", router.init.kind, plain.init.kind),
            ("init.std", router.init.std, plain.init.std),
        ):
            if value != default:
                raise ValueError(
                    f"router.{name}={shown(value)} has no effect with tie=sublayers, where feed-forward routers have the "
                    f"logits of attention routers and no weights; write router.{name}={shown(default)}, and "
                    f"attention_router.{name}"
                )
        for name, one in self.routers.items():
            if one.facts.weightless:
                raise ValueError(
                    f"tie=sublayers ties logits, and {name}.kind={one.kind} has none: {one.facts.weightless}; write tie=none"
                )

    def _check_tie(self) -> None:
        if all(one.facts.weightless for one in self.routers.values()):
            raise ValueError(
                f"tie={self.tie} has no effect on router.kind={self.router.kind}: {self.router.facts.weightless}; write tie=none"
            )
        for name, router in self.routers.items():
            if router.pool.per != "token" and self.tie != "layers":
                raise ValueError(
                    f"tie={self.tie} ties logits of single tokens, and {name}.pool.per={router.pool.per} averages them; "
                    "write pool.per=token, or tie=layers"
                )
            if router.kind == "sample_top1" and self.tie == "layers":
                raise ValueError(
                    f"tie=layers with {name}.kind=sample_top1, whose first layer is soft: it would decide so for all layers; write "
                    "tie=none, or kind=top_k"
                )
            if router.losses.similarity_coefficient and self.tie == "layers":
                raise ValueError(
                    f"{name}.losses.similarity_coefficient={router.losses.similarity_coefficient} has no effect with tie=layers, "
                    "where all layers decide alike; set it to 0"
                )

    def _check_first(self) -> None:
        """A first segment goes to the seed's own expert; there must be one."""
        named = self.placement.experts
        has_seed = (self.include_seed if named == "branches" else "seed" in named) and self.combine.base != "seed"
        for name, router in self.routers.items():
            if router.pool.per != "token" and router.pool.first == "seed" and not has_seed:
                raise ValueError(
                    f"{name}.pool.first=seed needs the seed among the experts, got include_seed={str(self.include_seed).lower()}, "
                    f"placement.experts={named}, combine.base={self.combine.base}; include it, or use pool.first=base with a base, uniform with kind=soft"
                )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """A mixture of the experiment: how it is assembled and how it is then trained, if it is (train).

    match: train's tokens are those that make it as good a bargain as the reference mixture, `data` by tokens of each domain,
    `compute` by FLOPs (launch.matching). scratch: the shape that `assemble` gives, with every weight drawn at random; with a
    match it is trained on the seed's and the branches' tokens too.
    """

    assemble: AssembleConfig
    train: TrainConfig | None
    match: Literal["none", "data", "compute"] = "none"
    scratch: bool = False

    @property
    def kind(self) -> str:
        """What the report calls it; "oracle": told the domain of every text, so no model that could win."""
        if "oracle" in (one.kind for one in self.assemble.routers.values()):
            return "oracle"
        return "bam" if self.assemble.attention == "mixture" else "btx"

    @model_validator(mode="after")
    def _means_something(self):
        if self.train is not None and "oracle" in (self.assemble.router.kind, self.assemble.attention_router.kind):
            raise ValueError(
                "assemble.router.kind=oracle is for evaluation only, where the domain of a text is known; train that mixture on "
                "0 tokens, +mixtures.NAME.train.tokens=0"
            )
        for name, router in self.assemble.routers.items():
            if self.train and router.pool.per != "token" and router.pool.tokens >= self.train.sequence_length:
                raise ValueError(
                    f"assemble.{name}.pool.tokens={router.pool.tokens} is no less than train.sequence_length="
                    f"{self.train.sequence_length}: a first segment is not decided about, so the router would never decide, nor "
                    "learn; lower pool.tokens"
                )
        if self.match != "none" and self.train is None:
            raise ValueError(
                f"match={self.match} says how long to train, and train.tokens=0 says not to; leave train.tokens out, or write "
                "match=none"
            )
        if self.scratch:
            self._check_scratch()
        return self

    def _check_scratch(self) -> None:
        """Nothing of a mixture from scratch may ask for weights or texts of the models it is not made of."""
        if self.train is None:
            raise ValueError("scratch=true draws every weight at random, and train.tokens=0 leaves it so; train it")
        if self.assemble.merge != MergeConfig():
            raise ValueError(
                f"scratch=true draws every weight at random, and assemble.merge={self.assemble.merge.words} merges weights; leave it out"
            )
        placement = self.assemble.placement
        for name, usual in (("experts", "branches"), ("match", "none")):
            if (given := getattr(placement, name)) != usual:
                raise ValueError(
                    f"scratch=true draws one feed-forward for each source, and assemble.placement.{name}={shown(given)} copies "
                    f"some of them: experts would be the same; write placement.{name}={usual}"
                )
        for name, init in self.assemble.inits.items():
            if init.needs_text:
                raise ValueError(
                    f"scratch=true draws every weight at random, and assemble.{name}.init.kind={init.kind} reads texts with "
                    "trained weights; write init.kind=normal"
                )
