"""Seed + branches -> one mixture directory, tensor by tensor: the pieces of pieces.py, read, merged or stacked, written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from upcycle.adoption import with_family
from upcycle.checkpoint import Checkpoint, CheckpointWriter, tensor_sha256
from upcycle.config import AssembleConfig
from upcycle.configuration import UpcycledConfig
from upcycle.cost import Shape
from upcycle.directories import copy_companions
from upcycle.durable import write_json
from upcycle.families import is_listed
from upcycle.merge import METHODS
from upcycle.pieces import Piece, plan_pieces
from upcycle.preflight import check_alike

# What a mixture's directory needs to load where this package is not installed; also see `auto_map` in its config.
REMOTE_CODE = ("modeling.py", "configuration.py", "attention.py", "families.py", "losses.py", "routing.py")


def upcycled_config(seed, experts: Sequence[str], choice: AssembleConfig) -> UpcycledConfig:
    """The mixture's config: `choice` in the model's own terms.

    Raises ValueError: a seed whose family is neither listed nor adopted (adoption.py).
    """
    router = choice.router
    return UpcycledConfig(
        seed=with_family(seed).to_dict(),
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
    total_bytes = Shape.of_config(config.to_dict()).parameters * dtype.itemsize if is_listed(config.seed) else 0
    writer, rows = CheckpointWriter(out, choice.max_shard_bytes, total_bytes), []
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
    copy_companions(seed_dir, out)
    write_json(out / "assembly.json", {"experts": list(experts), "merge": choice.merge, "tensors": rows})
    return config


def _make(
    piece: Piece, config: UpcycledConfig, experts: dict[str, Checkpoint], choice: AssembleConfig, dtype: torch.dtype
) -> tuple[Tensor, dict]:
    row: dict = {"target": piece.target, "origin": piece.origin, "sources": list(piece.sources)}
    if piece.origin == "fresh":
        return fresh_router((config.num_experts, config.hidden_size), piece.target, choice), row
    if piece.expert is not None:
        name = config.experts[piece.expert]
        experts = {name: experts[name]}
    row["files"] = {name: [checkpoint.files[s] for s in piece.sources] for name, checkpoint in experts.items()}
    sources = {name: [_finite(checkpoint, s, dtype) for s in piece.sources] for name, checkpoint in experts.items()}
    if piece.origin == "merged":
        return piece.cut(METHODS[choice.merge]([tensors[0] for tensors in sources.values()])).to(dtype), row
    cuts = {name: [piece.cut(tensor.to(dtype)) for tensor in tensors] for name, tensors in sources.items()}
    row["sha256"] = {name: [tensor_sha256(tensor) for tensor in tensors] for name, tensors in cuts.items()}
    if piece.origin == "copied":
        ((tensor,),) = cuts.values()
        return tensor, row
    assert piece.stack is not None
    return piece.stack(list(cuts.values())), row


def _finite(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    tensor = checkpoint.get(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{checkpoint.directory}: {name} holds NaN or infinite values; mend that checkpoint")
    if not torch.isfinite(tensor.to(dtype)).all():
        kind, largest = str(dtype).removeprefix("torch."), tensor.abs().max().item()
        raise ValueError(
            f"{checkpoint.directory}: {name} holds {largest:.4g}, more than {kind} can; choose assemble.dtype=bfloat16 or float32"
        )
    return tensor


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
    copy_companions(seed_dir, out)
