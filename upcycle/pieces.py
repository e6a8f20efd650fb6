"""Which tensor of a mixture is made from which tensors of the seed and its branches; every tensor accounted for.

source tensor                        target tensor
MLP of every expert             ->   stacked                        (BTX, arXiv:2403.07816)
attention of every expert       ->   stacked as wide heads          (BAM, arXiv:2408.08274), or merged
query and key norms             ->   copied, one a head group, or merged with the keys they norm
everything else                 ->   merged
nothing                         ->   routers, drawn fresh
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from upcycle.attention import stack_heads, unstack_heads
from upcycle.configuration import UpcycledConfig
from upcycle.families import Family, family_of, key_value_heads, split_fused
from upcycle.modeling import UpcycledForCausalLM


@dataclass(frozen=True)
class Piece:
    """How one target tensor is made. `sources` are the names of the tensors it takes from each checkpoint.

    origin: "stacked", `stack` takes what `cut` leaves of the sources of every expert, [expert][source], and
    `unstack(target, expert)` undoes it; "copied", from the one expert with index `expert`; "merged", what `cut` leaves
    of the merged source; "fresh", from nothing. part: which rows of a fused source `cut` takes.
    """

    target: str
    origin: str
    sources: tuple[str, ...] = ()
    stack: Callable[[list[list[Tensor]]], Tensor] | None = None
    unstack: Callable[[Tensor, int], list[Tensor]] | None = None
    cut: Callable[[Tensor], Tensor] = lambda tensor: tensor
    part: str | None = None
    expert: int | None = None


def plan_pieces(config: UpcycledConfig, source_names: Sequence[str]) -> list[Piece]:
    """One piece for every tensor of the mixture, in the order of its layers.

    Raises ValueError: a source tensor that no rule uses; a target tensor that no piece makes, or two make.
    """
    family, names = family_of(config.seed), set(source_names)
    pieces: list[Piece] = []
    for layer in range(config.seed.num_hidden_layers):
        source = f"{family.decoder}.{family.layers}.{layer}."
        target = f"model.decoder.{family.layers}.{layer}."
        pieces += _mlp_pieces(family, source + family.mlp, target + family.mlp, names)
        if config.attention == "mixture":
            pieces += _attention_pieces(config, source + family.attention, target + family.attention, names)
    taken = {name for piece in pieces for name in piece.sources}
    for name in source_names:
        if name not in taken:
            pieces.append(Piece(_outside_layers(name, family), "merged", (name,)))
    _check_targets(config, pieces)
    return pieces


def _outside_layers(name: str, family: Family) -> str:
    inside = name.removeprefix(f"{family.decoder}.")
    return name if inside == name else f"model.decoder.{inside}"


def _linear(family: Family) -> Callable[[Tensor], Tensor]:
    """A stored weight as (out, in); biases have nothing to turn."""
    return (lambda tensor: tensor.t()) if family.conv1d else (lambda tensor: tensor)


def _mlp_pieces(family: Family, source: str, target: str, names: set[str]) -> Iterator[Piece]:
    yield Piece(f"{target}.router.weight", "fresh")
    stem = "gate_up_proj" if family.gated else "up_proj"
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        for parts, name in ((family.up, stem), ((family.down,), "down_proj")):
            sources = tuple(f"{source}.{part}.{kind}" for part in parts)
            if names.issuperset(sources):
                unstack = partial(_unstack_rows, count=len(parts))
                to = f"{target}.experts.{name}{suffix}"
                yield Piece(to, "stacked", sources, _stack_rows, unstack, _linear(family))


def _stack_rows(experts: list[list[Tensor]]) -> Tensor:
    """(E, rows, ...): each expert's sources, one under the other (gate rows first, then up)."""
    return torch.stack([torch.cat(sources) for sources in experts])


def _unstack_rows(stacked: Tensor, expert: int, count: int) -> list[Tensor]:
    return list(stacked[expert].chunk(count))


def _attention_pieces(config: UpcycledConfig, source: str, target: str, names: set[str]) -> Iterator[Piece]:
    family, shared = family_of(config.seed), config.kv == "shared"
    yield Piece(f"{target}.router.weight", "fresh")
    for projection, role in family.projections.items():
        for kind in ("weight", "bias"):
            name, to = f"{source}.{projection}.{kind}", f"{target}.{projection}.{kind}"
            if name not in names:
                continue
            if role == "output":
                yield _output_piece(config, name, to, kind)
            elif role == "fused":
                for part in ("query", "key", "value"):
                    yield _fused_piece(config, name, f"{target}.{projection}.{part}.{kind}", part)
            elif role in ("key", "value") and shared:
                yield Piece(to, "merged", (name,))
            else:
                yield _rows_piece(config, name, to)
    for norm, role in family.norms.items():
        for name in sorted(name for name in names if name.startswith(f"{source}.{norm}.")):
            suffix = name.removeprefix(f"{source}.{norm}.")
            if role == "key" and shared:
                yield Piece(f"{target}.{norm}.{suffix}", "merged", (name,))
                continue
            for expert in range(config.num_experts):
                yield Piece(f"{target}.{norm}.norms.{expert}.{suffix}", "copied", (name,), expert=expert)


def _shared_heads(config: UpcycledConfig) -> int | None:
    return key_value_heads(config.seed) if config.kv == "shared" else None


def _rows_piece(config: UpcycledConfig, source: str, target: str, cut=None, part: str | None = None) -> Piece:
    experts, kv_heads = config.num_experts, _shared_heads(config)
    return Piece(
        target,
        "stacked",
        (source,),
        lambda sources: stack_heads([rows for (rows,) in sources], kv_heads),
        lambda stacked, expert: [unstack_heads(stacked, expert, experts, kv_heads)],
        cut or (lambda tensor: tensor),
        part,
    )


def _fused_piece(config: UpcycledConfig, source: str, target: str, part: str) -> Piece:
    family = family_of(config.seed)
    linear = _linear(family)

    def cut(fused: Tensor) -> Tensor:
        return split_fused(linear(fused), family, config.seed)[part]

    if part != "query" and config.kv == "shared":
        return Piece(target, "merged", (source,), cut=cut, part=part)
    return _rows_piece(config, source, target, cut, part)


def _output_piece(config: UpcycledConfig, source: str, target: str, kind: str) -> Piece:
    experts, kv_heads = config.num_experts, _shared_heads(config)
    if kind == "bias":  # (E, D)
        return Piece(
            target, "stacked", (source,), lambda s: torch.stack([one for (one,) in s]), lambda t, expert: [t[expert]]
        )
    return Piece(
        target,
        "stacked",
        (source,),
        lambda sources: stack_heads([one.T for (one,) in sources], kv_heads).T,
        lambda stacked, expert: [unstack_heads(stacked.T, expert, experts, kv_heads).T],
        _linear(family_of(config.seed)),
    )


def _check_targets(config: UpcycledConfig, pieces: list[Piece]) -> None:
    with torch.device("meta"):
        model = UpcycledForCausalLM._from_config(config)
    wanted = set(model.state_dict())
    if config.tie_word_embeddings:
        wanted.discard("lm_head.weight")
    made = [piece.target for piece in pieces]
    problems = {
        "no rule for these tensors of the checkpoints": sorted(set(made) - wanted),
        "nothing makes these tensors of the mixture": sorted(wanted - set(made)),
        "made twice": sorted({target for target in made if made.count(target) > 1}),
    }
    for problem, tensors in problems.items():
        if tensors:
            shown = ", ".join(tensors[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
            raise ValueError(
                f"{config.seed.model_type}: {problem}: {shown}. The checkpoints do not have the parts that "
                "upcycle/families.py describes; assembling would lose or invent weights"
            )
