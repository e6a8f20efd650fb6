"""Which experts a mixture has and where they sit, as settings. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlacementConfig:
    """Which experts a mixture has and where they sit (experts.py).

    layers: the layers that become mixtures, counted from 0, below 0 from the end; the others are merged.
    experts: "branches", each source once; "seed", as many copies of the seed; or sources by name, repeated at will. What
    is no expert is merged of the models that have one.
    shared_expert: a feed-forward that every token takes beside the routed ones, the seed's or the merge of all.
    shared_gate: "half", ½ shared + ½ routed, so that copies of the seed stay the seed; "sum", as published.
    split: each feed-forward cut into so many experts (granularity G); router.top_k counts these shards.
    virtual_groups: the shards of one feed-forward start with one router row, so a token takes all of them
    (arXiv:2410.07524). scale_weights: their down projections are scaled so that copies of the seed stay the seed.
    blend: expert n is the n-th chunk of every source. Experts of attention stay whole.
    drop_fraction: that share of every expert's hidden units is drawn anew (Drop-Upcycling, arXiv:2502.19261).
    one_per_domain: a token takes at most one of the experts that come from one source.
    match: "seed" or "branches": a split, more shards, of copies of the seed or of every source in turn, and a top_k in
    place of router.top_k, until total and active parameters are those of a BAM mixture of the same sources (cost.py);
    the shards of one feed-forward start as virtual groups.
    """

    layers: tuple[int, ...] | None = None
    experts: Literal["branches", "seed"] | tuple[str, ...] = "branches"
    shared_expert: Literal["none", "seed", "merged"] = "none"
    shared_gate: Literal["half", "sum"] = "half"
    split: int = Field(default=1, ge=1)
    virtual_groups: bool = False
    scale_weights: bool = False
    blend: bool = False
    drop_fraction: float = Field(default=0.0, ge=0, lt=1)
    one_per_domain: bool = False
    match: Literal["none", "seed", "branches"] = "none"

    @model_validator(mode="after")
    def _means_something(self):
        for name in ("virtual_groups", "scale_weights"):
            if getattr(self, name) and self.split == 1 and self.match == "none":
                raise ValueError(f"{name}=true has no effect with split=1: there are no shards; set split=2 or more")
        if self.blend and (self.split > 1 or self.match != "none"):
            raise ValueError(
                f"blend=true cuts feed-forwards its own way, got split={self.split} and match={self.match}; use one of them"
            )
        if self.match != "none" and self.split > 1:
            raise ValueError(f"match={self.match} works out the split itself, got split={self.split}; leave split=1")
        if self.match != "none" and self.experts != "branches":
            raise ValueError(f"match={self.match} starts from every source once; write experts=branches")
        if self.shared_expert == "none" and self.shared_gate != "half":
            raise ValueError(
                f"shared_gate={self.shared_gate} has no effect with shared_expert=none; leave shared_gate=half"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(
                f"layers={list(self.layers)}: expected at least one layer and none twice; write layers=null for all"
            )
        if isinstance(self.experts, tuple) and len(self.experts) < 2:
            raise ValueError(
                f"experts={list(self.experts)}: expected two sources by name or more, such as [seed, code, code]; or branches, "
                "or seed"
            )
        if self.one_per_domain and (self.split > 1 or self.blend or self.match != "none"):
            raise ValueError(
                "one_per_domain=true chooses between whole copies of a source; shards and blends of one source belong "
                "together: set one_per_domain=false"
            )
        return self

    @property
    def changes_experts(self) -> str:
        """The setting by which an expert is not its source's feed-forward as it was; "" if none is set."""
        found = {
            f"split={self.split}": self.split > 1,
            "blend=true": self.blend,
            f"drop_fraction={self.drop_fraction:g}": self.drop_fraction > 0,
            f"match={self.match}": self.match != "none",
        }
        return next((name for name, is_set in found.items() if is_set), "")

    @property
    def grouped(self) -> bool:
        """Whether the shards of one feed-forward start with one router row."""
        return self.virtual_groups or self.match != "none"

    def check_beside(self, choice: Any) -> None:
        """What of an AssembleConfig these settings do not go with, or would do nothing beside."""
        router = choice.router
        if self.match != "none" and (choice.attention != "merged" or router.kind != "top_k"):
            raise ValueError(
                f"placement.match={self.match} makes a mixture with one merged attention as large as BAM, got "
                f"attention={choice.attention}, router.kind={router.kind}; write attention=merged, kv=expert and "
                "router.kind=top_k (its top_k is worked out)"
            )
        if self.virtual_groups and router.kind not in ("top_k", "soft", "expert_choice"):
            raise ValueError(
                f"placement.virtual_groups=true needs a learned router that can take all shards of a feed-forward, got "
                f"router.kind={router.kind}; write kind=top_k or soft"
            )
        if self.virtual_groups and self.match == "none" and router.kind != "soft" and router.top_k % self.split:
            raise ValueError(
                f"router.top_k={router.top_k} counts shards and is no multiple of placement.split={self.split}: with "
                "virtual_groups=true a token takes whole feed-forwards; write top_k as so many times split"
            )
        self._check_routers(choice)
        self._check_sources(choice)
        if self.one_per_domain and (router.kind != "top_k" or router.top_k == 1):
            raise ValueError(
                f"placement.one_per_domain=true has no effect with router.kind={router.kind}, top_k={router.top_k}: it "
                "chooses among the experts of one source when a token takes several; write kind=top_k with top_k=2 or more"
            )
        if choice.tie == "sublayers" and (self.split > 1 or self.blend):
            raise ValueError(
                f"tie=sublayers gives feed-forward routers the logits of attention routers, and with placement.{self.changes_experts} "
                "feed-forward experts are not those of attention; write split=1 and blend=false, or tie=none"
            )
        if router.pool.per != "token" and router.pool.first == "seed" and self.changes_experts:
            raise ValueError(
                f"router.pool.first=seed sends the first segment to the seed's own feed-forward, and with "
                f"placement.{self.changes_experts} no expert is it; use pool.first=uniform with kind=soft"
            )

    def _check_routers(self, choice: Any) -> None:
        """Routers that need whole experts have them, and those of virtual groups cannot tear one apart."""
        cut = self.split > 1 or self.blend or self.match != "none"
        for name, router in choice.routers.items():
            if cut and router.init.needs_text:
                raise ValueError(
                    f"{name}.init.kind={router.init.kind} points to what texts look like in a whole expert, and with "
                    f"placement.{self.changes_experts} no feed-forward expert is whole; write {name}.init.kind=normal"
                )
            if cut and router.kind == "oracle":
                raise ValueError(
                    f"{name}.kind=oracle sends a domain's text to that domain's expert, and with placement.{self.changes_experts} it "
                    "has none of its own; write kind=top_k, or split=1 and blend=false"
                )
            if (
                router.init.needs_text
                and isinstance(self.experts, tuple)
                and len(set(self.experts)) < len(self.experts)
            ):
                raise ValueError(
                    f"{name}.init.kind={router.init.kind} makes one row of each source's texts, so that copies of one source, in "
                    f"placement.experts={list(self.experts)}, would start alike and never part; write {name}.init.kind=normal"
                )
        if self.grouped and choice.router.init.kind == "zeros" and choice.router.kind != "soft":
            raise ValueError(
                "router.init.kind=zeros makes all shards alike, so that a token takes parts of several feed-forwards, which "
                "virtual groups are to prevent; write router.init.kind=normal"
            )
        if self.grouped and choice.router.noise.std:
            raise ValueError(
                f"router.noise.std={choice.router.noise.std} is drawn for each shard, and would tear virtual groups apart; set it "
                "to 0 (noise.jitter, on the router's input, leaves them together)"
            )

    def _check_sources(self, choice: Any) -> None:
        """Nothing about sources is said twice, or in vain."""
        if self.match != "none" and not choice.include_seed:
            raise ValueError(
                f"placement.match={self.match} is against BAM of the seed and its branches, got include_seed=false; write "
                "include_seed=true"
            )
        default = type(choice.router).__dataclass_fields__["top_k"].default.default
        if self.match != "none" and choice.router.top_k != default:
            raise ValueError(
                f"router.top_k={choice.router.top_k} has no effect with placement.match={self.match}, which works it out; leave "
                f"router.top_k={default}"
            )
        if isinstance(self.experts, tuple) and not choice.include_seed:
            raise ValueError(
                f"include_seed=false has no effect with placement.experts={list(self.experts)}, which says whether the seed is "
                "among them; leave include_seed=true"
            )
        if self.shared_expert == "merged" and choice.merge.of("mlp").method == "seed":
            raise ValueError(
                "placement.shared_expert=merged with merge=seed is the seed's own; write shared_expert=seed"
            )
