"""Seed + branches -> one mixture directory, tensor by tensor, every tensor accounted for, then proved.

source tensor                        target tensor
MLP of every expert             ->   stacked                        (BTX, arXiv:2403.07816)
attention of every expert       ->   stacked as wide heads          (BAM, arXiv:2408.08274), or merged
everything else                 ->   merged
nothing                         ->   routers, drawn fresh
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from upcycle.attention import split_fused, stack_heads, unstack_heads
from upcycle.checkpoint import Checkpoint, CheckpointWriter, tensor_sha256
from upcycle.config import AssembleConfig
from upcycle.configuration import UpcycledConfig
from upcycle.directories import copy_tokenizer, tokenizer_sha256
from upcycle.durable import write_json
from upcycle.families import Family, family_of, key_value_heads
from upcycle.merge import METHODS
from upcycle.modeling import UpcycledForCausalLM

# What a mixture's directory needs to load where this package is not installed; also see `auto_map` in its config.
REMOTE_CODE = ("modeling.py", "configuration.py", "attention.py", "families.py", "losses.py", "routing.py")
# Fields of a config that may differ between a seed and its branches without making them other models.
FREE_FIELDS = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """How one target tensor is made. `sources` are the names of the tensors it takes from each checkpoint.

    stacked: `stack` takes the sources of every expert, [expert][source], and `unstack(target, expert)` undoes it.
    merged: `cut` takes the part of the one source that is merged (None: all of it). fresh: neither.
    """

    target: str
    origin: str
    sources: tuple[str, ...] = ()
    stack: Callable[[list[list[Tensor]]], Tensor] | None = None
    unstack: Callable[[Tensor, int], list[Tensor]] | None = None
    cut: Callable[[Tensor], Tensor] | None = None


def upcycled_config(seed, experts: Sequence[str], choice: AssembleConfig) -> UpcycledConfig:
    """The mixture's config: `choice` in the model's own terms."""
    router = choice.router
    return UpcycledConfig(
        seed=seed.to_dict(),
        experts=list(experts),
        num_experts_per_tok=router.top_k,
        router="soft" if router.kind == "soft" else router.gate_order,
        gate_scale=router.gate_scale,
        attention=choice.attention,
        kv=choice.kv,
        balance=router.balance,
        balance_coefficient=router.balance_coefficient,
        balance_scope=router.balance_scope,
        z_coefficient=router.z_coefficient,
        initializer_range=router.init_std,
    )


def plan_pieces(config: UpcycledConfig, source_names: Sequence[str]) -> list[Piece]:
    """One piece for every tensor of the mixture, in the order of its layers.

    Raises ValueError: a source tensor that no rule uses; a target tensor that no piece makes, or two make.
    """
    family = family_of(config.seed)
    pieces: list[Piece] = []
    rest = set(source_names)
    for layer in range(config.seed.num_hidden_layers):
        source, target = f"{family.decoder}.layers.{layer}.", f"model.decoder.layers.{layer}."
        pieces += _mlp_pieces(family, source + family.mlp, target + family.mlp, rest)
        if config.attention == "mixture":
            pieces += _attention_pieces(config, source + family.attention, target + family.attention, rest)
    taken = {name for piece in pieces for name in piece.sources}
    for name in source_names:
        if name not in taken:
            target = re.sub(rf"^{family.decoder}\.", "model.decoder.", name)
            pieces.append(Piece(target, "merged", (name,)))
    _check_targets(config, pieces)
    return pieces


def _mlp_pieces(family: Family, source: str, target: str, names: set[str]) -> list[Piece]:
    pieces = [Piece(f"{target}.router.weight", "fresh")]
    up = ([family.gate] if family.gate else []) + [family.up]
    stem = "gate_up_proj" if family.gate else "up_proj"
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        for parts, name in ((up, stem), ([family.down], "down_proj")):
            sources = tuple(f"{source}.{part}.{kind}" for part in parts)
            if sources[0] in names:
                unstack = partial(_unstack_rows, count=len(parts))
                pieces.append(Piece(f"{target}.experts.{name}{suffix}", "stacked", sources, _stack_rows, unstack))
    return pieces


def _stack_rows(experts: list[list[Tensor]]) -> Tensor:
    """(E, rows, ...): each expert's sources, one under the other (gate rows first, then up)."""
    return torch.stack([torch.cat(sources) for sources in experts])


def _unstack_rows(stacked: Tensor, expert: int, count: int) -> list[Tensor]:
    return list(stacked[expert].chunk(count))


def _attention_pieces(config: UpcycledConfig, source: str, target: str, names: set[str]) -> list[Piece]:
    family, experts, seed = family_of(config.seed), config.num_experts, config.seed
    shared_heads = key_value_heads(seed) if config.kv == "shared" else None
    pieces = [Piece(f"{target}.router.weight", "fresh")]
    for projection, role in family.projections.items():
        for kind in ("weight", "bias"):
            name = f"{source}.{projection}.{kind}"
            if name not in names:
                continue
            to = f"{target}.{projection}.{kind}"
            if role == "output":
                pieces.append(_output_piece(name, to, kind, experts, shared_heads))
            elif role == "fused" and shared_heads is not None:
                pieces += _shared_fused_pieces(name, target, kind, experts, seed.num_attention_heads)
            elif role in ("key", "value") and shared_heads is not None:
                pieces.append(Piece(to, "merged", (name,)))
            else:
                pieces.append(_rows_piece(name, to, experts, shared_heads))
    return pieces


def _rows_piece(source: str, target: str, experts: int, kv_heads: int | None, cut=None) -> Piece:
    return Piece(
        target,
        "stacked",
        (source,),
        lambda sources: stack_heads([cut(one) if cut else one for (one,) in sources], kv_heads),
        lambda stacked, expert: [unstack_heads(stacked, expert, experts, kv_heads)],
        cut=cut,
    )


def _output_piece(source: str, target: str, kind: str, experts: int, kv_heads: int | None) -> Piece:
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
    )


def _shared_fused_pieces(source: str, target: str, kind: str, experts: int, heads: int) -> list[Piece]:
    return [
        _rows_piece(source, f"{target}.query.{kind}", experts, heads, cut=lambda fused: split_fused(fused, heads)[0]),
        Piece(f"{target}.key_value.{kind}", "merged", (source,), cut=lambda fused: split_fused(fused, heads)[1]),
    ]


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


def check_alike(seed: Checkpoint, branches: dict[str, Checkpoint]) -> None:
    """Branches must be the seed's model with other weights: config, tokenizer, tensor names and shapes.

    Raises ValueError, naming both directories and both values.
    """
    if "seed" in branches:
        raise ValueError("a branch is called 'seed'; that name belongs to the seed's own expert, rename the branch")
    ours = AutoConfig.from_pretrained(seed.directory).to_dict()
    words = tokenizer_sha256(seed.directory)
    for name, branch in branches.items():
        where = f"branch {name!r} ({branch.directory}) against the seed ({seed.directory})"
        theirs = AutoConfig.from_pretrained(branch.directory).to_dict()
        for field in sorted((ours.keys() | theirs.keys()) - FREE_FIELDS):
            if ours.get(field) != theirs.get(field):
                raise ValueError(
                    f"{where}: {field} is {theirs.get(field)!r}, expected the seed's {ours.get(field)!r}; "
                    "branches must share it"
                )
        if words and (other := tokenizer_sha256(branch.directory)) and other != words:
            raise ValueError(f"{where}: tokenizer.json differs; experts must read the same tokens")
        if seed.names != branch.names:
            odd = sorted(set(seed.names) ^ set(branch.names))
            raise ValueError(
                f"{where}: tensors differ: {', '.join(odd[:5])} ({len(odd)} in all) are in only one of them"
            )
        for tensor in seed.names:
            if seed.shape(tensor) != branch.shape(tensor):
                raise ValueError(
                    f"{where}: {tensor} has shape {branch.shape(tensor)}, expected the seed's {seed.shape(tensor)}"
                )


def fresh_router(shape: Sequence[int], target: str, choice: AssembleConfig) -> Tensor:
    """A router's first weights, fp32; normal draws depend on (rng_seed, tensor name) only, not on order."""
    if choice.router.init == "zeros":
        return torch.zeros(*shape)
    key = hashlib.sha256(f"{choice.rng_seed}/{target}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    return torch.randn(*shape, generator=generator) * choice.router.init_std


def write_mixture(
    seed_dir: Path, branch_dirs: dict[str, Path], out: Path, choice: AssembleConfig, advance=lambda done, total: None
) -> UpcycledConfig:
    """Assemble into `out` (an existing directory). Memory: one shard plus one tensor of every checkpoint.

    Raises ValueError: checkpoints that do not fit together (`check_alike`), non-finite weights.
    """
    seed, branches = Checkpoint(seed_dir), {name: Checkpoint(path) for name, path in branch_dirs.items()}
    check_alike(seed, branches)
    experts = ({"seed": seed} if choice.include_seed else {}) | branches
    seed_config = AutoConfig.from_pretrained(seed_dir)
    seed_config.name_or_path = ""  # where the seed lay is no part of the result
    config = upcycled_config(seed_config, list(experts), choice)
    pieces = plan_pieces(config, seed.names)
    dtype = getattr(torch, choice.dtype) if choice.dtype else seed.dtype()
    writer, rows = CheckpointWriter(out, choice.max_shard_bytes), []
    for number, piece in enumerate(pieces):
        tensor, row = _make(piece, config, experts, choice, dtype)
        writer.add(piece.target, tensor)
        rows.append(row)
        advance(number + 1, len(pieces))
    writer.close()
    config.dtype = dtype
    config.architectures = ["UpcycledForCausalLM"]
    config.save_pretrained(out)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / name, out / name)
    copy_tokenizer(seed_dir, out)
    write_json(out / "assembly.json", {"experts": list(experts), "merge": choice.merge, "tensors": rows})
    return config


def _make(
    piece: Piece, config: UpcycledConfig, experts: dict[str, Checkpoint], choice: AssembleConfig, dtype: torch.dtype
) -> tuple[Tensor, dict]:
    row: dict = {"target": piece.target, "origin": piece.origin, "sources": list(piece.sources)}
    if piece.origin == "fresh":
        return fresh_router((config.num_experts, config.hidden_size), piece.target, choice), row
    sources = {name: [checkpoint.get(s) for s in piece.sources] for name, checkpoint in experts.items()}
    for name, tensors in sources.items():
        for source, tensor in zip(piece.sources, tensors, strict=True):
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{experts[name].directory}: {source} holds NaN or infinite values; mend that checkpoint"
                )
    if piece.origin == "merged":
        return _merged(piece, [tensors[0] for tensors in sources.values()], choice).to(dtype), row
    assert piece.stack is not None
    cut = piece.cut or (lambda tensor: tensor)
    cast = {name: [tensor.to(dtype) for tensor in tensors] for name, tensors in sources.items()}
    row["sha256"] = {name: [tensor_sha256(cut(tensor)) for tensor in tensors] for name, tensors in cast.items()}
    return piece.stack(list(cast.values())), row


def _merged(piece: Piece, tensors: list[Tensor], choice: AssembleConfig) -> Tensor:
    merged = METHODS[choice.merge](tensors)
    return piece.cut(merged) if piece.cut else merged


def write_merged(
    seed_dir: Path,
    branch_dirs: dict[str, Path],
    out: Path,
    method: str,
    include_seed: bool,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Merge dense models of one seed into one, tensor by tensor, with a method of `merge.METHODS`.

    Raises ValueError: checkpoints that do not fit together (`check_alike`).
    """
    seed, branches = Checkpoint(seed_dir), {name: Checkpoint(path) for name, path in branch_dirs.items()}
    check_alike(seed, branches)
    models = ([seed] if include_seed else []) + list(branches.values())
    writer = CheckpointWriter(out, max_shard_bytes)
    for name in seed.names:
        tensor = METHODS[method]([model.get(name) for model in models])
        writer.add(name, tensor.to(seed.get(name).dtype))
    writer.close()
    AutoConfig.from_pretrained(seed_dir).save_pretrained(out)
    copy_tokenizer(seed_dir, out)
