"""Seed + branches -> one mixture directory, tensor by tensor: the pieces of pieces.py, read, merged or stacked, written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from upcycle.adoption import with_family
from upcycle.ahead import in_order, threads_for
from upcycle.batches import run_key
from upcycle.checkpoint import Checkpoint, CheckpointWriter, Stored, finite, tensor_sha256
from upcycle.configuration import UpcycledConfig
from upcycle.cost import Shape, placed
from upcycle.directories import copy_companions
from upcycle.durable import write_json
from upcycle.experts import Placed
from upcycle.families import family_of, is_listed
from upcycle.kronecker_map import start
from upcycle.merge import statistics_of
from upcycle.merger import Merger, Statistics
from upcycle.mixture_config import AssembleConfig
from upcycle.pieces import Piece, dense_config, plan_pieces
from upcycle.preflight import check_alike
from upcycle.router_config import RouterConfig
from upcycle.router_init import drawn_rows
from upcycle.store import ignore
from upcycle.text_rows import said, texts_of_routers, write_text_rows

# What a mixture's directory needs to load where this package is not installed; also see `auto_map` in its config.
REMOTE_CODE = (
    "modeling.py",
    "configuration.py",
    "attention.py",
    "camex.py",
    "families.py",
    "kernels.py",
    "kinds.py",
    "kronecker.py",
    "kronecker_map.py",
    "losses.py",
    "plans.py",
    "router.py",
    "routing.py",
    "soft_merging.py",
)


APART = 0.01  # how far the rows of one group's shards lie from one another, as a share of a drawn row


def placed_experts(seed, branches: Sequence[str], choice: AssembleConfig) -> Placed:
    """The experts of the mixture of a seed of this config and its branches. Raises ValueError: see `cost.placed`."""
    return placed(Shape.of_config(seed.to_dict()), choice, branches)


def upcycled_config(seed, found: Placed, choice: AssembleConfig) -> UpcycledConfig:
    """The mixture's config: `choice` and the experts that it makes, in the model's own terms.

    Raises ValueError: a seed whose family is neither listed nor adopted (adoption.py).
    """
    router, attention, placement = choice.router, choice.attention_router, choice.placement
    names, wide = [expert.name for expert in found.experts], [expert.name for expert in found.attention]
    return UpcycledConfig(
        seed=with_family(seed).to_dict(),
        experts=names,
        expert_sources=[expert.source for expert in found.experts],
        one_per_source=placement.one_per_domain,
        attention_experts=wide if wide and wide != names else None,
        attention_sources=[expert.source for expert in found.attention] if wide and wide != names else None,
        split=found.split,
        shared_expert=placement.shared_expert,
        shared_gate=placement.shared_gate,
        routed_layers=None if found.layers is None else list(found.layers),
        num_experts_per_tok=found.top_k,
        router=router.form,
        gate_scale=router.gate_scale,
        router_options=_options(router),
        attention=choice.attention,
        attention_router={"kind": attention.form, "top_k": attention.top_k, "gate_scale": attention.gate_scale}
        | _options(attention),
        kv=choice.kv,
        tie=choice.tie,
        attention_losses=asdict(attention.losses),
        initializer_range=router.init.std,
        combine=asdict(choice.combine),
        **asdict(router.losses),
    )


def _options(router: RouterConfig) -> dict:
    """The fields of `routing.Rule` that are no fields of the config itself."""
    return {
        "trained": router.trained,
        "capacity_factor": router.capacity_factor,
        "bias_rate": router.bias_rate,
        "per": router.pool.per,
        "tokens": router.pool.tokens,
        "first": router.pool.first,
        "noise_std": router.noise.std,
        "jitter": router.noise.jitter,
    }


def fresh(config: UpcycledConfig, found: Placed, piece: Piece, choice: AssembleConfig) -> Tensor:
    """What is made from nothing, in fp32: a curvature, the identity; a router's first weights, or its bias."""
    if "curvature_" not in piece.target:
        return fresh_router(config, found, piece.target, choice)
    generator = torch.Generator().manual_seed(run_key("curvature", choice.rng_seed, piece.target) % 2**63)
    return start(piece.target, piece.shape, generator)


def fresh_router(config: UpcycledConfig, found: Placed, target: str, choice: AssembleConfig) -> Tensor:
    """Shards of a virtual group have one row. Zeros where the texts will say (text_rows.py)."""
    part = "attention" if f".{family_of(config.seed).attention}.router." in target else "ffn"
    rows = [expert.row for expert in found.of(part)]
    if target.endswith(".bias"):
        return torch.zeros(len(rows))
    init = choice.attention_router.init if part == "attention" else choice.router.init
    if init.needs_text:
        return torch.zeros(len(rows), config.hidden_size)
    drawn = drawn_rows((max(rows) + 1, config.hidden_size), target, init, choice.rng_seed)[rows]
    if part == "ffn" and config.num_experts_per_tok % found.split and drawn.shape[0] > max(rows) + 1:
        # A token takes part of its last group: which part must not be for rounding to say, which differs with batch and cache.
        drawn = drawn + APART * drawn_rows(drawn.shape, f"{target}/apart", init, choice.rng_seed)
    return drawn


def write_mixture(
    seed_dir: Path,
    branch_dirs: dict[str, Path],
    out: Path,
    choice: AssembleConfig,
    advance: Callable[..., None] = ignore,
    data: Mapping[str, Path] | None = None,
    statistics: Mapping[str, Sequence[Path]] | None = None,
) -> UpcycledConfig:
    """Assemble into `out` (an existing directory). Memory: a few tensors of every checkpoint; if routers start from texts, then
    the whole mixture in fp32.

    data: token arrays by domain, for routers that start from training text (init.kind=domain_centroid). statistics: the
    curvature of models by name, as `stages.measure_curvature` leaves it, for merges that read it.
    Raises ValueError: checkpoints that do not fit together (`check_alike`), non-finite weights, texts (`texts_of_routers`),
    settings of the merge or curvature that does not fit (`Merger`).
    """
    seed, branches = Checkpoint(seed_dir), {name: Checkpoint(path) for name, path in branch_dirs.items()}
    check_alike(seed, branches)
    seed_config = AutoConfig.from_pretrained(seed_dir)
    seed_config.name_or_path = ""  # where the seed lay is no part of the result
    found = placed_experts(seed_config, list(branches), choice)
    config = upcycled_config(seed_config, found, choice)
    pieces, texts = plan_pieces(config, seed.names, found), texts_of_routers(config, choice, seed_dir, data or {})
    dtype = getattr(torch, choice.dtype) if choice.dtype else seed.dtype()
    curvature = {name: Statistics(*paths) for name, paths in (statistics or {}).items()}
    merger = Merger(choice.merge, seed, dense_config(config), list(found.models), curvature)
    merger.check_statistics()
    merger.check_roles(piece.sources[0] for piece in pieces if piece.origin == "merged")
    total_bytes = Shape.of_config(config.to_dict()).parameters * dtype.itemsize if is_listed(config.seed) else 0
    writer, rows = CheckpointWriter(out, choice.max_shard_bytes, total_bytes), []

    def make(piece: Piece) -> tuple[Tensor, dict]:
        return _make(piece, config, found, {"seed": seed} | branches, choice, dtype, merger)

    made = in_order(
        make, pieces, most=1 if statistics_of(choice.merge) else threads_for(1 + len(branches))
    )  # as in `dense_merge`
    for number, (piece, (tensor, row)) in enumerate(zip(pieces, made, strict=True)):
        writer.add(piece.target, tensor)
        rows.append(row)
        advance(number + 1, len(pieces))
    writer.close()
    config.dtype = dtype
    config.architectures = ["UpcycledForCausalLM"]
    config.save_pretrained(out)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / name, out / name)
    copy_companions(seed_dir, out)
    if texts:
        write_text_rows(out, choice, texts)
    record: dict = {"experts": config.experts, "merge": choice.merge.record, "placed": asdict(found)}
    record |= {"curvature": {name: one.about for name, one in curvature.items()}} if curvature else {}
    record |= {"averaged": dict(merger.averaged)} if merger.averaged else {}
    record |= {"unconverged": merger.unconverged} if merger.unconverged else {}
    record |= {"router_init": said(choice, texts), "tensors": rows}
    write_json(out / "assembly.json", record)
    return config


def _make(
    piece: Piece,
    config: UpcycledConfig,
    found: Placed,
    checkpoints: dict[str, Checkpoint],
    choice: AssembleConfig,
    dtype: torch.dtype,
    merger: Merger,
) -> tuple[Tensor, dict]:
    row: dict = {"target": piece.target, "origin": piece.origin, "sources": list(piece.sources)}
    if piece.origin == "fresh":
        return fresh(config, found, piece, choice), row
    models = piece.models(found)
    if piece.origin == "merged" and merger.keeps_seed(piece.sources[0]):
        models, row["origin"] = ["seed"], "seed"
    row["files"] = {name: [checkpoints[name].files[s] for s in piece.sources] for name in models}
    if row["origin"] == "merged":
        (source,) = piece.sources
        if (method := merger.method(source)) != choice.merge.method:
            row["method"] = method
        stored = {name: Stored(checkpoints[name], source) for name in models}
        return piece.cut(merger.merged(source, stored, dtype)), row
    sources = {name: [finite(checkpoints[name], s, dtype) for s in piece.sources] for name in models}
    cuts = {name: [piece.cut(tensor.to(dtype)) for tensor in tensors] for name, tensors in sources.items()}
    if row["origin"] in ("copied", "seed"):
        ((tensor,),) = cuts.values()
        whose = models[0] if piece.expert is None else config.names_of("attention")[piece.expert]
        row["sha256"] = {whose: [tensor_sha256(tensor)]}
        return tensor.clone(), row  # two copies of one source would share its memory
    assert piece.stack is not None
    if row["origin"] == "mean":
        return piece.stack([piece.carve(expert, cuts) for expert in found.of(piece.sublayer)]), row
    made = {expert.name: piece.carve(expert, cuts) for expert in found.of(piece.sublayer)}
    if found.scale_weights and not all(torch.isfinite(one).all() for tensors in made.values() for one in tensors):
        raise ValueError(
            f"{piece.target}: placement.scale_weights makes weights larger than {str(dtype).removeprefix('torch.')} can hold; "
            "choose assemble.dtype=bfloat16 or float32"
        )
    row["sha256"] = {name: [tensor_sha256(tensor) for tensor in tensors] for name, tensors in made.items()}
    return piece.stack(list(made.values())), row
