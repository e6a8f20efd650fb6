"""The tensors of a mixture with one expert more or less, and the record of what they came from. editing.py writes them.

Shapes: D hidden, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.checkpoint import Checkpoint, tensor_sha256
from upcycle.durable import write_json
from upcycle.families import family_of
from upcycle.kinds import FACTS
from upcycle.pieces import Piece, dense_names, placed_whole, plan_pieces
from upcycle.router_config import InitConfig
from upcycle.router_init import drawn_rows


@dataclass
class Edit:
    """A mixture and what it becomes. kept: for each expert that it will have, which one that is now; None is the branch.

    twins: experts whose own tensors have all been found equal to the branch's.
    """

    mixture: Checkpoint
    old: Any
    new: Any
    kept: Sequence[int | None]
    branch: Checkpoint | None = None
    router_row: str | None = None
    rng_seed: int = 1
    twins: set[int] = field(default_factory=set)

    def __post_init__(self):
        names = dense_names(self.old)
        before = plan_pieces(self.old, names)
        self.before = {piece.target: piece for piece in before}
        self.copied = {(piece.sources, piece.expert): piece for piece in before if piece.origin == "copied"}
        self.pieces = plan_pieces(self.new, names)
        self.twins = set(range(self.old.num_experts)) if self.branch else set()


def edited_tensors(edit: Edit, record: Record) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the edited mixture, one at a time; `record` then knows what they came from."""
    for piece in edit.pieces:
        yield piece.target, _tensor(edit, piece, record)


def _tensor(edit: Edit, piece: Piece, record: Record) -> Tensor:
    """One tensor of the edited mixture."""
    if piece.origin == "copied":
        index = edit.kept[piece.expert or 0]
        if index is None:
            like = edit.copied[piece.sources, 0]
            own = _own(edit, piece, edit.mixture.get(like.target).dtype)
            record.new(piece, like, own)
            _compare(edit, lambda twin: [edit.mixture.get(edit.copied[piece.sources, twin].target)], own)
            return own[0]
        before = edit.copied[piece.sources, index]
        record.keep(piece, before)
        return edit.mixture.get(before.target)
    before = edit.before[piece.target]
    now = edit.mixture.get(before.target)
    if piece.origin == "merged":
        record.keep(piece, before)
        return now
    if piece.origin == "fresh":
        record.keep(piece, before)
        rows = [_new_row(edit, piece.target, now) if index is None else now[index] for index in edit.kept]
        return torch.stack(rows)
    assert piece.origin == "stacked" and piece.stack and before.stack and before.unstack, piece
    parts = [before.unstack(now, index) for index in range(edit.old.num_experts)]
    if not torch.equal(before.stack(parts), now):
        raise ValueError(f"{edit.mixture.directory}: {piece.target} does not fall into the parts of its experts")
    if edit.branch is None:
        record.keep(piece, before)
        return piece.stack([parts[index] for index in edit.kept if index is not None])
    own = _own(edit, piece, now.dtype)
    record.keep(piece, before, own)
    _compare(edit, lambda twin: parts[twin], own)
    return piece.stack([own if index is None else parts[index] for index in edit.kept])


def _own(edit: Edit, piece: Piece, dtype: torch.dtype) -> list[Tensor]:
    """What the branch has of a piece, in the mixture's dtype.

    Raises ValueError: values that are not finite, or not in that dtype.
    """
    assert edit.branch is not None
    found = []
    for name in piece.sources:
        tensor = edit.branch.get(name)
        if not torch.isfinite(cast := tensor.to(dtype)).all():
            kind = str(dtype).removeprefix("torch.")
            why = f"are more than the mixture's {kind} can hold" if torch.isfinite(tensor).all() else "are not finite"
            raise ValueError(f"{edit.branch.directory}: {name} holds values that {why}; mend that checkpoint")
        found.append(piece.cut(cast))
    if piece.origin != "stacked":
        return found
    new = placed_whole(edit.new).of(piece.sublayer)[-1]
    return piece.carve(new, {new.source: found})


def _compare(edit: Edit, parts_of: Callable[[int], list[Tensor]], own: list[Tensor]) -> None:
    for twin in sorted(edit.twins):
        if not all(torch.equal(mine, theirs) for mine, theirs in zip(own, parts_of(twin), strict=True)):
            edit.twins.discard(twin)


# ------------------------------------------------------------------------------------------------------- router rows


def _new_row(edit: Edit, target: str, rows_ED: Tensor) -> Tensor:
    """The new expert's row (D,) of a router's weight, or its 0 in a bias on the selection."""
    if target.endswith(".bias"):
        return rows_ED.new_zeros(())
    how = row_kind(edit, "attention" if f".{family_of(edit.old.seed).attention}.router." in target else "ffn")
    if how == "mean":
        return rows_ED.float().mean(0).to(rows_ED.dtype)
    if how in edit.old.experts:
        return rows_ED[edit.old.experts.index(how)]
    init = InitConfig(kind="zeros") if how == "zeros" else InitConfig(std=edit.new.initializer_range)
    draw = f"{target}/{edit.new.experts[-1]}"  # each expert that is added has a draw of its own
    return drawn_rows((1, rows_ED.shape[1]), draw, init, edit.rng_seed)[0].to(rows_ED.dtype)


def row_kind(edit: Edit, part: str) -> str:
    """Where the new expert's row comes from in the routers of `part`."""
    trained = edit.old.rule(part, edit.old.routed[0]).trained
    return edit.router_row or ("mean" if trained else "normal")


def rows_in_words(edit: Edit) -> str:
    kinds = {row_kind(edit, part) for part in edit.new.parts if _has_weights(edit, part)}
    return ", ".join(sorted(kinds)) or "none, they have no weights"


def _has_weights(edit: Edit, part: str) -> bool:
    return not FACTS[edit.new.rule(part, edit.new.routed[-1]).kind].weightless


def notes_on_rows(edit: Edit) -> list[str]:
    found = []
    for part in edit.new.parts:
        one = edit.new.rule(part, edit.new.routed[-1]).top_k == 1
        if _has_weights(edit, part) and one and row_kind(edit, part) == "mean":
            found.append(
                f"a mean row never has the largest logit, so the {part} routers, which take one expert, send the new one "
                "nothing until training has moved its row; router_row=normal, or the name of an expert like it, does"
            )
    return found


# ----------------------------------------------------------------------------------------------------- what came from where


class Record:
    """assembly.json of the edited mixture: the rows of before, the branch's files and hashes beside them, the edit."""

    def __init__(self, edit: Edit, said: dict[str, Any]):
        path = edit.mixture.directory / "assembly.json"
        self.edit, self.rows = edit, list[dict[str, Any]]()
        self.before: Any = json.loads(path.read_text()) if path.is_file() else None
        self.known = {row["target"]: row for row in self.before["tensors"]} if self.before else {}
        self.gone = {
            "sha256": set(edit.old.experts) - set(edit.new.experts),
            "files": set(edit.old.expert_sources) - set(edit.new.expert_sources),  # not while a copy is left
        }
        stage = edit.mixture.directory / "stage.json"
        trained = json.loads(stage.read_text()) if stage.is_file() else {}
        if trained.get("function") == "train_model":
            said = said | {"trained_before": f"{trained['stage']}-{trained['key'][:8]}"}
        self.edits = [*(self.before or {}).get("edits", []), said]

    def keep(self, piece: Piece, before: Piece, own: list[Tensor] | None = None) -> None:
        """A tensor that was there. own: the branch's part of it."""
        row: dict[str, Any] = self._row(before) | {"target": piece.target}
        if piece.origin == "stacked":  # of a merged one, the experts that it was merged from, whatever became of them
            for kind, values in (("files", self._files(piece, own)), ("sha256", self._hashes(own))):
                kept = {name: value for name, value in row.get(kind, {}).items() if name not in self.gone[kind]}
                row = row | {kind: kept | values}
        self.rows.append(row)

    def new(self, piece: Piece, like: Piece, own: list[Tensor]) -> None:
        """A tensor of the branch alone."""
        row = self._row(like) | {"target": piece.target}
        self.rows.append(row | {"files": self._files(piece, own), "sha256": self._hashes(own)})

    def _row(self, piece: Piece) -> dict[str, Any]:
        return self.known.get(piece.target, {"origin": piece.origin, "sources": list(piece.sources)})

    def _files(self, piece: Piece, own: list[Tensor] | None) -> dict[str, list[str]]:
        branch = self.edit.branch
        return {self.edit.new.experts[-1]: [branch.files[name] for name in piece.sources]} if own and branch else {}

    def _hashes(self, own: list[Tensor] | None) -> dict[str, list[str]]:
        return {self.edit.new.experts[-1]: [tensor_sha256(tensor) for tensor in own]} if own else {}

    def write(self, out: Path) -> list[str]:
        """Returns a note where there is nothing to write."""
        if self.before is None:
            return [
                "the mixture has no assembly.json: what its tensors came from is not known, and neither is it of these"
            ]
        write_json(
            out / "assembly.json",
            self.before
            | {"experts": self.edit.new.experts, "placed": self._placed(self.before["placed"])}
            | {"tensors": self.rows, "edits": self.edits},
        )
        return []

    def _placed(self, before: dict[str, Any]) -> dict[str, Any]:
        """The record of who is where: of before, without who is gone, with who is new."""
        now = asdict(placed_whole(self.edit.new))
        for part in ("experts", "attention"):
            known = {expert["name"]: expert for expert in before[part]}
            now[part] = [known.get(expert["name"], expert) for expert in now[part]]
        counted = not FACTS[self.edit.new.router].every  # a router that takes every expert has no top_k of its own
        return before | {key: now[key] for key in ("experts", "attention", *["top_k"] * counted)}
