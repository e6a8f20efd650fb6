"""Which tensor of a mixture is made from which tensors of the seed and its branches; every tensor accounted for.

source tensor                        target tensor
MLP of every expert             ->   stacked                        (BTX, arXiv:2403.07816), whole or its share (shards.py)
MLP of the seed, or all         ->   the shared expert, copied or merged, where there is one
attention of every expert       ->   stacked as wide heads          (BAM, arXiv:2408.08274), or merged
query and key norms             ->   copied, one a head group, or merged with the keys they norm
everything else                 ->   merged
nothing                         ->   routers, drawn fresh
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from upcycle.attention import stack_heads, unstack_heads
from upcycle.checkpoint import Checkpoint
from upcycle.combine_config import BASES
from upcycle.configuration import UpcycledConfig
from upcycle.experts import Expert, Placed, whole
from upcycle.families import Family, family_of, key_value_heads, split_fused
from upcycle.modeling import UpcycledForCausalLM
from upcycle.routing import gates_sum_to_one
from upcycle.shards import chosen_units, dropped_units, matrices, redrawn, scaled, shared_out


def as_it_is(expert: Expert, cuts: Mapping[str, list[Tensor]]) -> list[Tensor]:
    """What an expert that is whole takes of the models' tensors."""
    return cuts[expert.source]


@dataclass(frozen=True)
class Piece:
    """How one target tensor is made. `sources` are the names of the tensors it takes from each checkpoint.

    origin: "stacked", of every expert of `sublayer`, "ffn" or "attention", `carve` takes its share of what `cut` leaves of
    the models' sources; `stack` takes these, [expert][matrix], and `unstack(target, expert)` undoes it; "copied", from the
    one `model` (for the attention expert with index `expert`, or for all); "merged", what `cut` leaves of the merged source;
    "mean", like "stacked", what `stack` makes of all experts together; "fresh", from nothing, of this `shape`. part: which rows of a fused source `cut` takes. axis: along which hidden units of a feed-forward
    lie in a matrix; None: nowhere.
    """

    target: str
    origin: str
    sources: tuple[str, ...] = ()
    stack: Callable[[list[list[Tensor]]], Tensor] | None = None
    unstack: Callable[[Tensor, int], list[Tensor]] | None = None
    cut: Callable[[Tensor], Tensor] = lambda tensor: tensor
    part: str | None = None
    expert: int | None = None
    model: str | None = None
    sublayer: str = "attention"
    carve: Callable[[Expert, Mapping[str, list[Tensor]]], list[Tensor]] = as_it_is
    axis: int | None = None
    shape: tuple[int, ...] = ()

    def models(self, placed: Placed) -> list[str]:
        """The checkpoints that it is made of."""
        if self.origin == "fresh":
            return []
        if self.model is not None:
            return [self.model]
        if self.origin == "merged":
            return list(placed.models)
        return list(dict.fromkeys(one.source for expert in placed.of(self.sublayer) for one in expert.chunks))


def placed_whole(config: UpcycledConfig) -> Placed:
    """What a config alone tells: every expert the whole of its source."""
    attention = whole(config.names_of("attention"), config.sources_of("attention"))
    base = config.combine["base"] if config.combine["base"] not in BASES else None
    return Placed(
        experts=whole(config.experts, config.expert_sources),
        attention=attention if config.attention == "mixture" else (),
        models=tuple(dict.fromkeys(config.expert_sources)),
        base=whole([base], [base]) if base else (),
        top_k=config.num_experts_per_tok,
        layers=None if config.routed_layers is None else tuple(config.routed),
    )


def plan_pieces(config: UpcycledConfig, source_names: Sequence[str], placed: Placed | None = None) -> list[Piece]:
    """One piece for every tensor of the mixture, in the order of its layers. placed: None, all experts are whole.

    Raises ValueError: a source tensor that no rule uses; a target tensor that no piece makes, or two make.
    """
    family, names, wanted = family_of(config.seed), set(source_names), _tensors_of(config)
    placed = placed_whole(config) if placed is None else placed
    pieces: list[Piece] = []
    for layer in config.routed:
        source = f"{family.decoder}.{family.layers}.{layer}."
        target = f"model.decoder.{family.layers}.{layer}."
        pieces += _mlp_pieces(config, placed, layer, names)
        if config.attention == "mixture":
            pieces += _attention_pieces(config, source + family.attention, target + family.attention, names)
        pieces += [_fresh(name, wanted) for name in wanted if name.startswith(target) and is_fresh(name)]
    pieces += [_fresh(name, wanted) for name in wanted if name.startswith("model.curvature.")]
    taken = {name for piece in pieces for name in piece.sources}
    for name in source_names:
        if name not in taken:
            pieces.append(Piece(_outside_layers(name, family), "merged", (name,)))
    _check_targets(config, pieces, set(wanted))
    return pieces


def is_fresh(name: str) -> bool:
    """Whether a tensor of a mixture's layer is made from nothing."""
    return ".router." in name or ".curvature_" in name


def _fresh(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Piece:
    return Piece(name, "fresh", shape=shapes[name])


def _outside_layers(name: str, family: Family) -> str:
    inside = name.removeprefix(f"{family.decoder}.")
    return name if inside == name else f"model.decoder.{inside}"


def _linear(family: Family) -> Callable[[Tensor], Tensor]:
    """A stored weight as (out, in); biases have nothing to turn."""
    return (lambda tensor: tensor.t()) if family.conv1d else (lambda tensor: tensor)


def _mlp_pieces(config: UpcycledConfig, placed: Placed, layer: int, names: set[str]) -> Iterator[Piece]:
    family = family_of(config.seed)
    source = f"{family.decoder}.{family.layers}.{layer}.{family.mlp}"
    target = f"model.decoder.{family.layers}.{layer}.{family.mlp}"
    stem = "gate_up_proj" if family.gated else "up_proj"
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        for parts, name in ((family.up, stem), ((family.down,), "down_proj")):
            sources = tuple(f"{source}.{part}.{kind}" for part in parts)
            if not names.issuperset(sources):
                continue
            to, up = f"{target}.experts.{name}{suffix}", name == stem
            axis = 0 if up else 1 if kind == "weight" else None
            unstack = partial(_unstack_rows, count=2 if up and family.gated else 1)
            carve = partial(_share_of, config=config, placed=placed, layer=layer, target=to, axis=axis)
            yield Piece(
                to, "stacked", sources, _stack_rows, unstack, _linear(family), sublayer="ffn", carve=carve, axis=axis
            )
            if config.has_base(layer):
                yield _base_piece(config, f"{target}.experts.base_{name}{suffix}", sources)
            for one in sources if config.shared_expert != "none" else ():
                own = f"{target}.shared_expert.{one.removeprefix(source + '.')}"
                if config.shared_expert == "seed":
                    yield Piece(own, "copied", (one,), model="seed")
                else:
                    yield Piece(own, "merged", (one,))


def _base_piece(config: UpcycledConfig, target: str, sources: tuple[str, ...]) -> Piece:
    """The base expert: one model's whole feed-forward, or the mean of the experts'."""
    cut = _linear(family_of(config.seed))
    if config.combine["base"] == "mean":
        return Piece(target, "mean", sources, _mean_rows, cut=cut, sublayer="ffn")

    def unstack(rows: Tensor, _expert: int) -> list[Tensor]:
        return list(rows.chunk(len(sources)))

    return Piece(target, "stacked", sources, lambda base: torch.cat(base[0]), unstack, cut, sublayer="base")


def _mean_rows(experts: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat(sources).double() for sources in experts]).mean(0).to(experts[0][0].dtype)


def _share_of(
    expert: Expert,
    cuts: Mapping[str, list[Tensor]],
    *,
    config: UpcycledConfig,
    placed: Placed,
    layer: int,
    target: str,
    axis: int | None,
) -> list[Tensor]:
    """The matrices (or biases) of one expert: its hidden units of its sources', drawn anew in part, scaled."""
    gated = axis == 0 and family_of(config.seed).gated
    of_sources = {name: matrices(stored, gated) for name, stored in cuts.items()}
    found: list[Tensor] = []
    for place in range(2 if gated else 1):
        tensor_of = {name: tensors[place] for name, tensors in of_sources.items()}
        if axis is None:
            found.append(shared_out(tensor_of, expert.chunks))
            continue
        tensor = chosen_units(tensor_of, expert.chunks, axis)
        if placed.drop_fraction:
            key = f"{placed.rng_seed}/{expert.name}/"
            units = dropped_units(tensor.shape[axis], placed.drop_fraction, f"{key}{layer}")
            tensor = redrawn(tensor, axis, units, f"{key}{target}/{place}")
        found.append(tensor)
    if axis != 0 and placed.scale_weights:
        return [scaled(tensor, weight_scale(config, layer)) for tensor in found]
    return found


def weight_scale(config: UpcycledConfig, layer: int) -> float:
    """By what the down projections of shards are multiplied so that copies of the seed stay the seed.

        a = G                 where the gates of a token sum to 1, or do with a fresh router (`compensate`)
        a = E · G² / T        for bare probabilities, which sum to about T / (E · G)      (arXiv:2410.07524, section 4.2)

    G shards of one feed-forward, E feed-forwards, T shards a token. Exact where gates sum to 1 and a token takes whole
    feed-forwards with equal gates (virtual groups). Differs: the paper scales fc1 and fc2, which is not exact under SiLU.
    """
    rule, shards = config.rule("ffn", layer), config.num_experts
    if gates_sum_to_one(rule, shards) or rule.gate_scale == "compensate":
        return config.split
    return shards * config.split / rule.top_k


def _stack_rows(experts: list[list[Tensor]]) -> Tensor:
    """(E, rows, ...): each expert's sources, one under the other (gate rows first, then up)."""
    return torch.stack([torch.cat(sources) for sources in experts])


def _unstack_rows(stacked: Tensor, expert: int, count: int) -> list[Tensor]:
    return list(stacked[expert].chunk(count))


def _attention_pieces(config: UpcycledConfig, source: str, target: str, names: set[str]) -> Iterator[Piece]:
    family, shared = family_of(config.seed), config.kv == "shared"
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
            for expert, model in enumerate(config.sources_of("attention")):
                yield Piece(f"{target}.{norm}.norms.{expert}.{suffix}", "copied", (name,), expert=expert, model=model)


def _shared_heads(config: UpcycledConfig) -> int | None:
    return key_value_heads(config.seed) if config.kv == "shared" else None


def _rows_piece(config: UpcycledConfig, source: str, target: str, cut=None, part: str | None = None) -> Piece:
    experts, kv_heads = config.num_attention_experts, _shared_heads(config)
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
    experts, kv_heads = config.num_attention_experts, _shared_heads(config)
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


def _tensors_of(config: UpcycledConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of the mixture and their shapes; which routers have weights, and which a bias, is the model's business."""
    with torch.device("meta"):
        state = UpcycledForCausalLM._from_config(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def dense_config(config: UpcycledConfig) -> PretrainedConfig:
    """The seed's config as a dense model has it, without what assembly (parts_of) and a live mixture wrote into it."""
    return AutoConfig.for_model(**{name: value for name, value in config.seed.to_dict().items() if name != "parts_of"})


def dense_names(config: UpcycledConfig) -> list[str]:
    """The names of the tensors of the seed's own class: what `plan_pieces` takes where there is no checkpoint of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense_config(config))
    return sorted(set(model.state_dict()) - set(model.all_tied_weights_keys))


def check_tensors(mixture: Checkpoint, config: UpcycledConfig) -> None:
    """Raises ValueError: a tensor that the model class lacks, or has in another shape, or that is absent."""
    with torch.device("meta"):
        model = UpcycledForCausalLM._from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: mixture.shape(name) for name in mixture.names}
    if config.tie_word_embeddings:  # the embedding, under a second name
        for names in (expected, found):
            names.pop("lm_head.weight", None)
    if odd := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        one, wanted = found.get(odd[0]), expected.get(odd[0])
        problem = (
            "is missing"
            if one is None
            else f"has shape {one}, expected {wanted or 'no such tensor with this config.json'}"
        )
        raise ValueError(
            f"{mixture.directory}: {odd[0]} {problem} ({len(odd)} such tensors in all); assemble the mixture again"
        )


def _check_targets(config: UpcycledConfig, pieces: list[Piece], wanted: set[str]) -> None:
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
