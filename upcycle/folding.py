"""A CAMEx mixture without its curvature: the map goes into the experts that it bends, and plain soft merging is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.assembly import REMOTE_CODE
from upcycle.checkpoint import Checkpoint, CheckpointWriter
from upcycle.configuration import UpcycledConfig
from upcycle.directories import check_new, check_room, copy_companions, resolve
from upcycle.durable import atomic_directory, write_json
from upcycle.editing import Edited
from upcycle.families import family_of
from upcycle.kinds import BENDING, COMBINE
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import check_tensors
from upcycle.proof import TOLERANCE, write_proof
from upcycle.router import RoutingTrace


def fold(directory: str | Path, out: str | Path, prove: bool = True, max_shard_bytes: int = 4_000_000_000) -> Edited:
    """Write into `out` the mixture in `directory` with each expert as its curvature leaves it: E_e' = B + α M_e τ_e.

        B + α Σ s_e M_e τ_e = B + Σ s_e (E_e' − B)

    for any α and any scores, so the result is soft merging of the E_e', without a curvature; a base that travels is written
    down in every layer, and left out where scores sum to 1 everywhere, since it cancels. prove: `out` appears only when both
    mixtures' logits are equal in fp32, with each expert alone too. Memory: the mixture in fp32, for the proof twice.
    Raises ValueError: no mixture there, or one without anything to fold; `update: previous_merged`, whose base is what a text's
    own decisions made of the layer before; a base of zeros that travels beside scores that do not sum to 1; `out` is not new or empty.
    """
    directory, out = resolve(directory), Path(out)
    check_new(out)
    mixture = Checkpoint(directory)
    if mixture.config.get("model_type") != UpcycledConfig.model_type:
        raise ValueError(
            f"{directory}: model_type is {mixture.config.get('model_type')!r}, expected {UpcycledConfig.model_type!r}"
        )
    config: Any = UpcycledConfig.from_pretrained(directory)
    new = _folded_config(config, directory)
    check_room(out, mixture.size_bytes())
    mixture.check()
    check_tensors(mixture, config)
    model: Any = UpcycledForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    before = _logits(model) if prove else []
    changed = _folded_tensors(model)
    difference = _difference(model, new, changed, before) if prove else None
    with atomic_directory(out) as partial:
        _write(mixture, new, changed, partial, max_shard_bytes)
        _copy_record(directory, partial, config)
        if difference is not None:
            write_proof(partial, {"one_hot_errors": {}, "fold_error": difference})
    return Edited(out, tuple(new.experts), (), difference)


def _folded_config(config: Any, directory: Path) -> UpcycledConfig:
    combine = config.combine
    if not config.merges_weights or not config.bends:
        raise ValueError(f"{directory}: its experts have no curvature, nothing to fold; use it as it is")
    if combine["update"] == "previous_merged":
        raise ValueError(
            f"{directory}: with update=previous_merged a layer's base is what the text's own decisions made of the layer before, so "
            "no fixed experts are equal to it; keep the curvature"
        )
    needs_base = config.rule("ffn", config.routed[0]).first == "base" or not config.gates_sum_to_one
    if needs_base and combine["update"] == "travel" and combine["base"] == "zeros":
        raise ValueError(
            f"{directory}: base=zeros travels, and with scores that do not sum to 1 later layers need what it becomes, which has no "
            "name in a config; keep the curvature"
        )
    kept = {name: value for name, value in combine.items() if name in ("of", "base", "train_base")}
    folded = COMBINE | (kept if needs_base else {"of": "weights"})
    return UpcycledConfig.from_dict(config.to_dict() | {"combine": folded, "auto_map": UpcycledConfig().auto_map})


@torch.no_grad()
def _folded_tensors(model: Any) -> dict[str, Tensor]:
    """{name: tensor} of every layer's experts and base, computed in float64."""
    config, found, trace = model.config, {}, RoutingTrace()
    family = family_of(config.seed)
    if model.model.curvature is not None:
        trace.curvature = model.model.curvature.double()()
    for layer in config.routed:
        experts = getattr(getattr(model.model.decoder, family.layers)[layer], family.mlp).experts.double()
        base, delta = experts.weights(trace)
        stem = f"model.decoder.{family.layers}.{layer}.{family.mlp}.experts."
        for name, bent in delta.items():
            found[f"{stem}{name}"] = bent if base is None else base[name] + bent
            if base is not None:
                found[f"{stem}base_{name}"] = base[name]
    return found


def _write(
    mixture: Checkpoint, config: UpcycledConfig, changed: dict[str, Tensor], out: Path, max_shard_bytes: int
) -> None:
    with torch.device("meta"):
        names = list(UpcycledForCausalLM._from_config(config).state_dict())
    writer, there = CheckpointWriter(out, max_shard_bytes), set(mixture.names)
    for name in names:
        if name in changed:
            writer.add(name, changed[name].to(mixture.dtype()))
        elif name in there:  # an embedding that is the head too has one name
            writer.add(name, mixture.get(name))
    writer.close()
    config.dtype = mixture.dtype()
    config.save_pretrained(out)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).parent / name, out / name)
    copy_companions(mixture.directory, out)
    check_tensors(Checkpoint(out), config)


def _copy_record(directory: Path, out: Path, config: Any) -> None:
    """assembly.json, without the hashes of what is no longer any branch's, and with what was folded."""
    if not (directory / "assembly.json").is_file():
        return
    record = json.loads((directory / "assembly.json").read_text())
    rows = [row for row in record["tensors"] if "curvature_" not in row["target"]]
    rows = [{k: v for k, v in row.items() if k != "sha256" or ".experts." not in row["target"]} for row in rows]
    folded = {name: config.combine[name] for name in (*BENDING, "base", "rank", "share")}
    write_json(out / "assembly.json", record | {"tensors": rows, "folded": folded})


@torch.no_grad()
def _logits(model: Any) -> list[Tensor]:
    """Of tokens with two whole segments and more, as far as the model's positions reach, and with each expert alone: where a decision is
    never made, nothing else would ask for the curvature."""
    config = model.config
    positions = getattr(config.seed, "max_position_embeddings", None) or 2**20
    length = min(2 * config.rule("ffn", config.routed[0]).tokens + 8, positions)
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    alone = [RoutingTrace(forced={"ffn": expert}) for expert in range(config.num_experts)]
    return [model(tokens).logits, *(model(tokens[:, :16], trace=trace).logits for trace in alone)]


def _difference(model: Any, config: UpcycledConfig, changed: dict[str, Tensor], before: list[Tensor]) -> float:
    """Of the logits, as a share of the largest, before the folded experts are rounded to the checkpoint's dtype. model: is used up."""
    folded: Any = UpcycledForCausalLM._from_config(config).float().eval()
    state = model.state_dict() | {name: tensor.float() for name, tensor in changed.items()}
    folded.load_state_dict({name: state[name] for name in folded.state_dict()})
    pairs = zip(_logits(folded), before, strict=True)
    found = max(((after - old).abs().max() / old.abs().max()).item() for after, old in pairs)
    if not found <= TOLERANCE:
        raise ValueError(
            f"the folded mixture's logits differ by {found:.2e} of the largest, expected at most {TOLERANCE}; keep the curvature"
        )
    return found
