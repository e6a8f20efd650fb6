"""Which experts a mixture has: whose feed-forward each one is, or which hidden units of whose, and in which layers. No torch.

A feed-forward is a sum over its hidden units, so the shards that it is cut into add up to it:

    down · act(up · x) + b = Σ_g (down_g · act(up_g · x) + b / G)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upcycle.combine_config import BASES
from upcycle.config import nearest
from upcycle.mixture_config import AssembleConfig
from upcycle.placement_config import PlacementConfig


@dataclass(frozen=True)
class Chunk:
    """Hidden units of one source's feed-forward: run `number` of the `of` equal ones that they are cut into."""

    source: str
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class Expert:
    """source: the model that it comes from; of a blend, all of them in one word. chunks: its hidden units, in order.

    row: which of the rows that are made for a router it has; shards of a virtual group share one.
    """

    name: str
    source: str
    chunks: tuple[Chunk, ...]
    row: int


@dataclass(frozen=True)
class Matched:
    """What makes BTX as large as BAM: the split, the number of shards, how many of them a token takes, and what came out."""

    split: int
    experts: int
    top_k: int
    note: str


@dataclass(frozen=True)
class Placed:
    """The experts of one mixture, as assembly.json keeps them.

    attention: its attention experts, whole ones; none where attention is merged. models: those that have an expert; the rest
    is merged of them. base: the one that nobody routes to, if it is a model's (CombineConfig). layers: those that are mixtures (None: all). split: hidden units of the seed's feed-forward over those
    of an expert. scale_weights, drop_fraction: PlacementConfig's. rng_seed: of the hidden units that are drawn anew.
    """

    experts: tuple[Expert, ...]
    attention: tuple[Expert, ...]
    models: tuple[str, ...]
    top_k: int
    layers: tuple[int, ...] | None = None
    split: int = 1
    scale_weights: bool = False
    drop_fraction: float = 0.0
    rng_seed: int = 0
    note: str = ""
    base: tuple[Expert, ...] = ()

    def of(self, part: str) -> tuple[Expert, ...]:
        """The experts of "ffn" or "attention", or the "base"."""
        return {"ffn": self.experts, "attention": self.attention, "base": self.base}[part]

    @property
    def rows(self) -> int:
        """How many different rows a feed-forward router starts with."""
        return max(expert.row for expert in self.experts) + 1


def dropped_count(width: int, fraction: float) -> int:
    """⌊r · F⌋ hidden units, up to rounding: 0.29 · 100 is 29, and in binary a little less."""
    return int(fraction * width + 1e-9)


def whole(names: Sequence[str], sources: Sequence[str]) -> tuple[Expert, ...]:
    """Experts that are their sources' feed-forwards, or attentions, as they are."""
    return tuple(
        Expert(name, source, (Chunk(source),), row)
        for row, (name, source) in enumerate(zip(names, sources, strict=True))
    )


def place(
    choice: AssembleConfig, branches: Sequence[str], layers: int, width: int, matched: Matched | None = None
) -> Placed:
    """The experts that `choice` makes of the seed and `branches`. layers, width: the seed's, of hidden units a layer.

    Raises ValueError: settings that the number of branches, the layers or the width do not allow.
    """
    placement = choice.placement
    check_names(branches)
    base = choice.combine.model
    if choice.combine.base in BASES and choice.combine.base in branches:
        raise ValueError(
            f"combine.base={choice.combine.base} is no model's name, and a branch is called so; rename that branch"
        )
    copies = [name for name in _copies(choice, branches) if name != base]
    if len(copies) < 2:
        beside = f" beside the base {base}" if base else ""
        raise ValueError(
            f"placement: a mixture needs two experts or more{beside}, got {', '.join(copies) or 'none'}; add a branch"
        )
    if base not in (None, "seed", *branches):
        known = [*BASES, "seed", *branches]
        raise ValueError(f"combine.base={base} is not known, expected one of {', '.join(known)}{nearest(base, known)}")
    split = matched.split if matched else placement.split
    named = _named(copies)
    if placement.blend:
        experts = _blended(copies, width)
    else:
        if width % split:
            raise ValueError(
                f"placement.split={split} does not divide the {width} hidden units of a feed-forward, expected one of "
                f"{_divisors(width)}"
            )
        if matched:
            named = _named(copies + _extra(placement, copies, -(-matched.experts // split) - len(copies)))
        experts = _shards(named, split, placement.grouped)[: matched.experts if matched else None]
    if placement.drop_fraction and dropped_count(width // split, placement.drop_fraction) == 0:
        raise ValueError(
            f"placement.drop_fraction={placement.drop_fraction} of an expert's {width // split} hidden units is none; raise it, "
            "or set it to 0"
        )
    if placement.one_per_domain:
        _check_one_per_domain(choice, copies)
    whole_ones = whole(*zip(*named, strict=True)) if choice.attention == "mixture" else ()
    return Placed(
        experts=experts,
        attention=whole_ones,
        models=tuple(name for name in ("seed", *branches) if name in copies or name == base),
        top_k=matched.top_k if matched else choice.router.top_k,
        layers=routed_layers(placement.layers, layers),
        split=split,
        scale_weights=placement.scale_weights,
        drop_fraction=placement.drop_fraction,
        rng_seed=choice.rng_seed,
        note=matched.note if matched else "",
        base=whole([base], [base]) if base else (),
    )


def _copies(choice: AssembleConfig, branches: Sequence[str]) -> list[str]:
    """Of each whole feed-forward that experts are made of, its source."""
    named, every = choice.placement.experts, ["seed"] * choice.include_seed + list(branches)
    if named == "branches":
        return every
    if named == "seed":
        return ["seed"] * len(every)
    known = ["seed", *branches]
    for name in named:
        if name not in known:
            raise ValueError(
                f"placement.experts names {name!r}, expected seed or one of the branches ({', '.join(branches)})"
                f"{nearest(name, known)}"
            )
    if idle := [name for name in branches if name not in named and name != choice.combine.base]:
        raise ValueError(
            f"placement.experts={list(named)} leaves out {', '.join(idle)}: those branches would be trained, or read, in vain; "
            "name them too, or take them out of the branches"
        )
    return list(named)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: a name that could be mistaken for a shard's (code/1) or a copy's (code:2)."""
    for name in names:
        if "/" in name or ":" in name:
            raise ValueError(
                f"name={name!r}: expected one without / and :, which mark shards and copies; choose another"
            )


def _named(copies: Sequence[str]) -> list[tuple[str, str]]:
    """(name, source) of every copy: code, code:2, code:3."""
    return [
        (source if (count := copies[: place + 1].count(source)) == 1 else f"{source}:{count}", source)
        for place, source in enumerate(copies)
    ]


def _shards(named: Sequence[tuple[str, str]], split: int, grouped: bool) -> tuple[Expert, ...]:
    """code/1 to code/G of every feed-forward, one feed-forward after the other."""
    experts: list[Expert] = []
    for copy, (name, source) in enumerate(named):
        for number in range(split):
            own = f"{name}/{number + 1}" if split > 1 else name
            row = copy if grouped else len(experts)
            experts.append(Expert(own, source, (Chunk(source, number, split),), row))
    return tuple(experts)


def _blended(copies: Sequence[str], width: int) -> tuple[Expert, ...]:
    """BTX's blending (arXiv:2403.07816, section 4.3): expert n is the n-th of N chunks of every feed-forward."""
    count = len(copies)
    if width % count:
        raise ValueError(
            f"placement.blend=true cuts each feed-forward into as many chunks as there are sources, {count}, which does not "
            f"divide its {width} hidden units; use another number of sources, one of {_divisors(width)}"
        )
    return tuple(
        Expert(f"blend/{number + 1}", "+".join(copies), tuple(Chunk(one, number, count) for one in copies), number)
        for number in range(count)
    )


def _extra(placement: PlacementConfig, copies: Sequence[str], count: int) -> list[str]:
    """Sources of the feed-forwards that matching adds: whole copies one after the other; the last may lack shards."""
    return ["seed" if placement.match == "seed" else copies[number % len(copies)] for number in range(count)]


def _check_one_per_domain(choice: AssembleConfig, copies: Sequence[str]) -> None:
    sources = list(dict.fromkeys(copies))
    if len(sources) == len(copies):
        raise ValueError(
            f"placement.one_per_domain=true has no effect: each source has one expert ({', '.join(sources)}); name some twice "
            "in placement.experts, or set it to false"
        )
    routers = {"router": choice.router}
    routers |= {"attention_router": choice.attention_router} if choice.attention == "mixture" else {}
    for name, router in routers.items():
        if router.kind == "top_k" and router.top_k > len(sources):
            raise ValueError(
                f"{name}.top_k={router.top_k} exceeds the {len(sources)} sources ({', '.join(sources)}), and with "
                "placement.one_per_domain=true a token takes one expert of each at most; lower top_k"
            )


def routed_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """The layers that are mixtures, in order, from 0; None if all `count` are.

    Raises ValueError: one that the model does not have, or that is named twice.
    """
    if layers is None:
        return None
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(
                f"placement.layers={list(layers)}: the seed has {count} layers and no layer {layer}; expected 0 to {count - 1}, or "
                f"-1 to -{count} from the end"
            )
    found = sorted(layer % count for layer in layers)
    if len(set(found)) < len(found):
        raise ValueError(
            f"placement.layers={list(layers)} names a layer twice: of {count} layers they are {found}; name each once"
        )
    return None if len(found) == count else tuple(found)


def _divisors(number: int) -> str:
    found = [str(one) for one in range(1, number + 1) if number % one == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")
