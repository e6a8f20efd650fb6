"""One row of the table: ours against a peer, measured in rounds that alternate, and the ratio that is to be reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

# The ratio to reach, by a row's name; more is better but in AT_MOST. A name that is not here has none: it is reported.
TARGETS: dict[str, float] = {
    "train_btx_default": 2.7,
    "train_btx_tuned": 1.4,
    "train_btx_dense": 0.90,
    "train_btx_compiled": 0.90,
    "train_btx_compile_gain": 1.15,
    "train_bam_dense": 0.95,
    "train_dense_peak": 0.5,
    "memory_logits": 0.6,
    "decode_bam_shared_kv": 0.8,
    "assembly_mergekit": 2.5,
    "ties_mergekit": 3.0,
    "assembly_cp": 0.5,
    "ties_cp": 0.25,
    "tokenize": 0.8,
    "ranks_ddp": 1.7,
    "ranks_zero2": 1.7,
    "start_plan": 1.0,
}
AT_MOST = {"memory_logits", "memory_logits_checkpointed"}  # whose ratio is ours / peer and is to be small

REMARK = "limit or remark"


@dataclass(frozen=True, kw_only=True)
class Row:
    """ours, peer: medians in `unit`, over rounds. ratio > 1: ours is better; of AT_MOST, ours / peer. spread: the lowest and the
    highest ratio of a round. case: which of several measurements of one name. met: None without a target, and where nothing
    could be compared. rounds: measurements of ours. checked: in what ours and the peer were found to be the same.
    limit: how near which limit is, as measured. problem: why there is no ratio.
    """

    name: str
    case: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    target: float | None = None
    met: bool | None = None
    spread: tuple[float, float] | None = None
    rounds: int | None = None
    checked: str = ""
    limit: str = ""
    note: str = ""
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared(
    name: str, case: str, ours: Sequence[float], peer: Sequence[float], unit: str, *, less_is_better: bool = False,
    checked: str = "", limit: str = "", note: str = "",
) -> Row:  # fmt: skip
    """A row of what alternate rounds measured: ours[i] ran beside peer[i]."""
    assert ours and len(ours) == len(peer), f"{name}: {len(ours)} rounds of ours, {len(peer)} of the peer"
    inverted = less_is_better and name not in AT_MOST

    def ratio(one: float, other: float) -> float:
        return other / one if inverted else one / other

    rounds = [ratio(one, other) for one, other in zip(ours, peer, strict=True)]
    found, target = ratio(median(ours), median(peer)), TARGETS.get(name)
    met = None if target is None else found <= target if name in AT_MOST else found >= target
    return Row(
        name=name, case=case, unit=unit, ours=median(ours), peer=median(peer), ratio=found, target=target, met=met,
        spread=(min(rounds), max(rounds)), rounds=len(rounds), checked=checked, limit=limit, note=note,
    )  # fmt: skip


def unscored(name: str, case: str, unit: str, problem: str) -> Row:
    """A row without a ratio: a side failed, or did not compute the same."""
    return Row(name=name, case=case, unit=unit, target=TARGETS.get(name), problem=problem)


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The cells of each row, as text; the first line is the titles."""
    yield ["name", "case", "ours", "peer", "unit", "ratio", "spread", "target", "met", "rounds", "checked", REMARK]
    for row in rows:
        sign = "≤" if row.name in AT_MOST else "≥"
        yield [
            row.name, row.case, _number(row.ours), _number(row.peer), row.unit, _ratio(row.ratio),
            "–" if row.spread is None else f"{_ratio(row.spread[0])} to {_ratio(row.spread[1])}",
            "report" if row.target is None else f"{sign} {row.target:g}",
            {True: "yes", False: "no", None: "–"}[row.met], "–" if row.rounds is None else str(row.rounds), row.checked or "–",
            "; ".join(filter(None, [row.problem and f"NOT COMPARED: {row.problem}", row.limit, row.note])),
        ]  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
