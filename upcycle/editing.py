"""Experts put into a mixture that exists, or taken out of it; tensor by tensor, from directory to directory.

Whatever the experts share stays as it is, bit for bit: it may have been trained since the mixture was assembled.
Shapes: D hidden, E experts.
"""

from __future__ import annotations

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.assembly import REMOTE_CODE
from upcycle.checkpoint import Checkpoint, CheckpointWriter
from upcycle.config import nearest
from upcycle.configuration import UpcycledConfig
from upcycle.dense_reference import DenseReference
from upcycle.directories import check_new, check_room, copy_companions, resolve
from upcycle.durable import atomic_directory
from upcycle.edits import Edit, Record, edited_tensors, notes_on_rows, rows_in_words
from upcycle.experts import check_names
from upcycle.kinds import FACTS
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import check_tensors, dense_config, placed_whole
from upcycle.preflight import check_joins
from upcycle.proof import TOLERANCE, largest_difference, write_proof
from upcycle.router import RoutingTrace

ROWS = ("mean", "zeros", "normal")
# The fields of UpcycledConfig that are understood here; any other must be at its default.
KNOWN = {
    "seed", "experts", "num_experts_per_tok", "router", "gate_scale", "router_options", "attention", "attention_router",
    "kv", "tie", "balance", "balance_coefficient", "balance_scope", "z_coefficient", "similarity_coefficient",
    "entropy_coefficient", "attention_losses", "expert_sources", "one_per_source", "routed_layers", "initializer_range",
}  # fmt: skip


@dataclass(frozen=True)
class Edited:
    """What was written. notes: what else changed, or is worth knowing. difference: largest of the logits in the proof, as
    a share of the largest logit, fp32; None if nothing was compared."""

    path: Path
    experts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    difference: float | None = None


def add_expert(
    directory: str | Path,
    branch: str | Path,
    out: str | Path,
    name: str,
    router_row: str | None = None,
    rng_seed: int = 1,
    prove: bool = True,
    max_shard_bytes: int = 4_000_000_000,
) -> Edited:
    """Write into `out` the mixture in `directory` with the feed-forwards (BAM: and the attention) of `branch` as one more expert.

    router_row: the first weights of the new expert's row in every router. "mean", of the other rows: a fresh expert starts
    as an average one (the default where routers are trained); "zeros"; "normal", drawn with the config's
    initializer_range (the default where they stay as drawn); or an expert's name, for a copy of its row. The other rows,
    and everything that experts share, stay as they are; routers over every expert then take one more.
    prove: forced to any one of the old experts the logits must be those of before, forced to the new one those of a dense
    model with the branch's own parts; `out` appears only then. Memory: a few tensors; for the proof, one
    model in fp32 at a time (and a dense one).
    Raises ValueError: no mixture there, or of a layout not known here; a branch that is not its seed's model; a name that
    is taken; an unknown router_row; `out` is not new or empty.
    """
    mixture, config, out = open_mixture(directory, out)
    if not name or name in config.experts:
        raise ValueError(f"name={name!r}: expected one that is none of {', '.join(config.experts)}; choose another")
    check_names([name])
    if router_row not in (None, *ROWS, *config.experts):
        known = [*ROWS, *config.experts]
        raise ValueError(
            f"router_row={router_row!r} is not known; expected one of {', '.join(ROWS)}, or an expert whose row is copied "
            f"({', '.join(config.experts)}){nearest(router_row, known)}"
        )
    if router_row and all(FACTS[config.rule(part, config.routed[-1]).kind].weightless for part in config.parts):
        raise ValueError(
            f"router_row={router_row!r} has no effect: the mixture's routers have no weights; leave it out"
        )
    source = Checkpoint(resolve(branch))
    notes = check_joins(name, source, mixture, dense_config(config))
    new, changes = edited_config(config, [*config.experts, name], [*config.expert_sources, name])
    edit = Edit(mixture, config, new, [*range(config.num_experts), None], source, router_row, rng_seed)
    notes += changes + notes_on_rows(edit)
    return _write(edit, out, {"added": name, "router_row": rows_in_words(edit)}, notes, prove, max_shard_bytes)


def remove_expert(
    directory: str | Path, name: str, out: str | Path, prove: bool = True, max_shard_bytes: int = 4_000_000_000
) -> Edited:
    """Write into `out` the mixture in `directory` without the expert `name`: its tensors and its rows in the routers.

    A top_k above the number of experts left is lowered, and said. prove: forced to any one of the experts left the logits
    must be those of before. Memory: as `add_expert`.
    Raises ValueError: no mixture there, or of a layout not known here; no such expert; one of the last two; an expert
    that a router needs; `out` is not new or empty.
    """
    mixture, config, out = open_mixture(directory, out)
    gone = index_of(name, config)
    if config.num_experts < 3:
        raise ValueError(
            f"name={name!r}: the mixture has {config.num_experts} experts ({', '.join(config.experts)}), and one alone is no "
            "mixture; write the other one as a dense model with to_dense (upcycle dense)"
        )
    kept = [index for index in range(config.num_experts) if index != gone]
    sources = [config.expert_sources[index] for index in kept]
    if "seed" not in sources:
        _check_first_segments(config, name)
    new, notes = edited_config(config, [config.experts[index] for index in kept], sources)
    return _write(Edit(mixture, config, new, list(kept)), out, {"removed": name}, notes, prove, max_shard_bytes)


# ------------------------------------------------------------------------------------------------------------- checks


def open_mixture(directory: str | Path, out: str | Path) -> tuple[Checkpoint, Any, Path]:
    """The mixture, its config, and where to write.

    Raises ValueError: no mixture there, or not one that this code can take apart; `out` is not new or empty.
    """
    directory, out = resolve(directory), Path(out)
    check_new(out)
    mixture = Checkpoint(directory)
    if (found := mixture.config.get("model_type")) != UpcycledConfig.model_type:
        raise ValueError(
            f"{directory}: model_type is {found!r}, expected {UpcycledConfig.model_type!r}; only a mixture that `upcycle` "
            "assembled or trained can be edited"
        )
    config: Any = UpcycledConfig.from_pretrained(directory)
    if config.merges_weights:
        raise ValueError(
            f"{directory}: its experts are merged in weight space (combine.of=weights), and editing knows mixtures of outputs only; expected combine.of=outputs; "
            "assemble the mixture anew with the experts that it is to have"
        )
    plain = UpcycledConfig()
    for field_name in inspect.signature(UpcycledConfig.__init__).parameters:
        if field_name in {*KNOWN, "self", "kwargs"}:
            continue
        value, expected = getattr(config, field_name), getattr(plain, field_name)
        if value != expected:
            raise ValueError(
                f"{directory}: {field_name}={value!r}, and editing knows no mixture with that, expected "
                f"{expected!r}; assemble the mixture anew with the experts that it is to have"
            )
    mixture.check()
    check_tensors(mixture, config)
    return mixture, config, out


def index_of(expert: str, config: Any) -> int:
    """Raises ValueError: no such expert."""
    if expert not in config.experts:
        raise ValueError(
            f"expert {expert!r} is not in the mixture, expected one of {', '.join(config.experts)}"
            f"{nearest(expert, config.experts)}"
        )
    return config.experts.index(expert)


def _check_first_segments(config: Any, name: str) -> None:
    for part in config.parts:
        rule = config.rule(part, config.routed[0])
        if rule.per != "token" and rule.first == "seed":
            raise ValueError(
                f"name={name!r}: the {part} routers decide per {rule.per}, and the first one goes to the seed's expert; keep "
                "that expert, or assemble the mixture anew with pool.first=uniform"
            )


def edited_config(config: Any, experts: list[str], sources: list[str]) -> tuple[Any, list[str]]:
    """The same mixture's config with these experts, and notes on what else had to change."""
    limit, notes = len(set(sources)) if config.one_per_source else len(experts), []
    fields = config.to_dict() | {"experts": experts, "expert_sources": sources}
    fields["auto_map"] = UpcycledConfig().auto_map  # one from the Hub would point there
    fields["_name_or_path"] = ""
    places = {"ffn": (config.router, config.num_experts_per_tok)}
    if config.attention == "mixture":
        places["attention"] = (config.attention_router["kind"], config.attention_router["top_k"])
    for part, (kind, top_k) in places.items():
        if FACTS[kind].every or top_k <= limit:
            continue
        constant = limit == 1 and config.rule(part, config.routed[-1]).kind == "topk_softmax"
        notes.append(
            f"top_k of the {part} routers is lowered from {top_k} to {limit}: a token cannot have more"
            + ("; the gate is then the constant 1, and training teaches these routers nothing" if constant else "")
        )
        if part == "ffn":
            fields["num_experts_per_tok"] = limit
        else:
            fields["attention_router"] = fields["attention_router"] | {"top_k": limit}
    for part, (kind, top_k) in places.items():
        every = FACTS[kind].every or min(top_k, limit) == len(experts)
        if config.losses(part)["balance"] == "switch" and every:
            off = {"balance": "none", "balance_coefficient": 0.0}
            fields |= off if part == "ffn" else {"attention_losses": fields["attention_losses"] | off}
            notes.append(
                f"the switch balance of the {part} routers is switched off: where a token takes every expert it is constant"
            )
    if "hash" in [kind for kind, _ in places.values()]:
        notes.append(
            "the hash router deals all tokens anew over the experts: each expert gets tokens it was not trained on"
        )
    return UpcycledConfig.from_dict(fields), notes


# ------------------------------------------------------------------------------------------------------------ writing


def _write(edit: Edit, out: Path, said: dict[str, Any], notes: list[str], prove: bool, max_shard_bytes: int) -> Edited:
    size, (few, many) = edit.mixture.size_bytes(), sorted((edit.old.num_experts, edit.new.num_experts))
    check_room(out, size * many // few if edit.branch else size)
    record = Record(edit, said)
    with atomic_directory(out) as partial:
        writer = CheckpointWriter(partial, max_shard_bytes)
        for name, tensor in edited_tensors(edit, record):
            writer.add(name, tensor)
        writer.close()
        edit.new.save_pretrained(partial)
        for name in REMOTE_CODE:
            shutil.copyfile(Path(__file__).parent / name, partial / name)
        copy_companions(edit.mixture.directory, partial)
        notes = notes + record.write(partial) + [_twin_note(edit, twin) for twin in sorted(edit.twins)]
        check_tensors(Checkpoint(partial), edit.new)
        errors = _prove(edit, partial) if prove else {}
    return Edited(out, tuple(edit.new.experts), tuple(notes), max(errors.values()) if errors else None)


def _twin_note(edit: Edit, twin: int) -> str:
    return f"the new expert's tensors are those of {edit.old.experts[twin]!r}, all of them: it is a copy"


# -------------------------------------------------------------------------------------------------------------- proof


def _prove(edit: Edit, out: Path) -> dict[str, float]:
    """The largest difference of logits of each expert alone, as a share of the largest; also in proof.json.

    Raises ValueError: one is above TOLERANCE.
    """
    tokens = torch.randint(0, edit.old.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    model: Any = UpcycledForCausalLM.from_pretrained(edit.mixture.directory, dtype=torch.float32).eval()
    expected = {index: forced_logits(model, tokens, index) for index in edit.kept if index is not None}
    model = UpcycledForCausalLM.from_pretrained(out, dtype=torch.float32).eval()  # the first one is freed by now
    errors = {}
    for index, (name, before) in enumerate(zip(edit.new.experts, edit.kept, strict=True)):
        if before is not None:
            found = forced_logits(model, tokens, index)
            errors[name] = ((found - expected[before]).abs().max() / expected[before].abs().max()).item()
        elif edit.branch is not None:
            dense = DenseReference(Checkpoint(out), edit.pieces, edit.new, placed_whole(edit.new), {name: edit.branch})
            dense.take(index)
            errors[name] = largest_difference(model, dense, tokens, index)
        if not errors[name] <= TOLERANCE:
            raise ValueError(
                f"{edit.mixture.directory}: forced to expert {name!r} the edited mixture's logits differ by {errors[name]:.2e} of "
                f"the largest from what they should be, expected at most {TOLERANCE}; nothing was written"
            )
    write_proof(out, {"one_hot_errors": errors})
    return errors


@torch.no_grad()
def forced_logits(model: Any, tokens_BS: Tensor, expert: int) -> Tensor:
    """With every router of the mixture forced to one expert."""
    return model(tokens_BS, trace=RoutingTrace(forced=expert)).logits
