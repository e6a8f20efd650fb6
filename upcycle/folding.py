"""A CAMEx mixture without its curvature: the map goes into the experts that it bends, and plain soft merging is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.assembly import REMOTE_CODE
from upcycle.checkpoint import Checkpoint, CheckpointWriter
from upcycle.configuration import UpcycledConfig
from upcycle.directories import check_new, check_room, copy_companions, resolve
from upcycle.durable import atomic_directory, read_object, reading, write_json
from upcycle.editing import Edited
from upcycle.families import family_of
from upcycle.kinds import BENDING, COMBINE
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import check_tensors
from upcycle.proof import TOLERANCE, write_proof
from upcycle.router import RoutingTrace

WITHOUT = "copy it again, or take it away: a mixture folds without it"


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
            f"{directory}: model_type is {mixture.config.get('model_type')!r}, expected {UpcycledConfig.model_type!r}; fold a CAMEx mixture, as "
            "assemble=camex_layer makes one"
        )
    config: Any = UpcycledConfig.from_pretrained(directory)
    new, record = _folded_config(config, directory), _read_record(directory)
    check_room(out, mixture.size_bytes())
    mixture.check()
    check_tensors(mixture, config)
    model: Any = UpcycledForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    before = _logits(model) if prove else []
    changed = _folded_tensors(model, directory)
    difference = _difference(model, new, changed, before) if prove else None
    with atomic_directory(out) as partial:
        _write(mixture, new, changed, partial, max_shard_bytes)
        if record is not None:
            _write_record(record, directory, partial, config)
        if difference is not None:
            write_proof(partial, {"one_hot_errors": {}, "fold_error": difference})
    rounded = f"the comparison is in fp32; stored in {str(mixture.dtype()).removeprefix('torch.')}, both mixtures are rounded, each in its own way"
    notes = (rounded,) if prove and mixture.dtype() != torch.float32 else ()
    return Edited(out, tuple(new.experts), notes, difference)


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
def _folded_tensors(model: Any, directory: Path) -> dict[str, Tensor]:
    """{name: tensor} of every layer's experts and base, computed in float64. Raises ValueError: a weight is no number."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{directory}: {name} holds NaN or infinity, expected finite weights; fold a checkpoint from before that"
            )
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


def _read_record(directory: Path) -> dict[str, Any] | None:
    """assembly.json, where there is one. Raises ValueError: it is damaged."""
    path = directory / "assembly.json"
    if not path.is_file():
        return None
    record = read_object(path, "tensors", fix=WITHOUT)
    with reading(path, WITHOUT):
        _ = [row["target"] for row in record["tensors"]]
    return record


def _write_record(record: dict[str, Any], directory: Path, out: Path, config: Any) -> None:
    """assembly.json of the folded mixture: a row for each of its tensors, without the hashes of what is no longer any branch's, and what was folded."""
    rows = {row["target"]: row for row in record["tensors"]}
    bases = {name.rpartition(".")[2]: row for name, row in rows.items() if ".experts.base_" in name}
    found = []
    for name in Checkpoint(out).names:
        row = rows.get(name) or bases.get(
            name.rpartition(".")[2]
        )  # a base that travelled is written down in every layer
        if row is not None:
            found.append({k: v for k, v in row.items() if k != "sha256" or ".experts." not in name} | {"target": name})
    folded = {name: config.combine[name] for name in (*BENDING, "base", "rank", "share")}
    stage = directory / "stage.json"
    trained = read_object(stage, "function", "stage", "key", fix="copy it again") if stage.is_file() else {}
    if trained.get("function") == "train_model":
        folded["trained_before"] = f"{trained['stage']}-{trained['key'][:8]}"
    write_json(out / "assembly.json", record | {"tensors": found, "folded": folded})


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
