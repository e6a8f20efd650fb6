"""What a mixture is and what each of its tensors came from, as data, and in words for a terminal."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a mixture. `files`: of each expert, the files that the `sources` lie in, where that is known.

    origin: "averaged" (or "merged by" another method) over the experts, "stacked", "copied" from one expert, "fresh",
    "unknown". shape and dtype are None where the tensor's shard is missing.
    """

    target: str
    origin: str
    experts: list[str]
    sources: list[str]
    files: dict[str, list[str]]
    shape: list[int] | None
    dtype: str | None

    @property
    def parameters(self) -> int | None:
        return None if self.shape is None else prod(self.shape)


@dataclass(frozen=True)
class Explanation:
    """A mixture, written or planned. `sources`: each expert's directory, where it is known. bytes: of all tensors."""

    directory: str
    family: str
    layers: int
    experts: list[str]
    sources: dict[str, str]
    routers: dict[str, Any]
    tensors: list[TensorRow]
    proof: dict[str, Any] | None
    notes: list[str]
    kinship: list[str] = field(
        default_factory=list
    )  # of a planned one: how far its branches lie from seed and each other

    @property
    def parameters(self) -> int | None:
        """None where a shard is missing."""
        return _total([row.parameters for row in self.tensors])

    @property
    def active_parameters(self) -> int | None:
        """Parameters that take part in one token: K of the E feed-forward experts, everything else."""
        active, experts = self.routers["num_experts_per_tok"], len(self.experts)
        counts = [row.parameters for row in self.tensors]
        routed = [".experts." in row.target for row in self.tensors]
        return _total([n and (n // experts * active if r else n) for n, r in zip(counts, routed, strict=True)])

    @property
    def bytes(self) -> int | None:
        return _total([row.parameters and row.parameters * _bits(row.dtype) // 8 for row in self.tensors])

    def to_dict(self) -> dict[str, Any]:
        sums = {"parameters": self.parameters, "active_parameters": self.active_parameters, "bytes": self.bytes}
        return asdict(self) | sums

    def summary(self) -> str:
        return "\n".join(_summary(self))

    def text(self, every_tensor: bool = False) -> str:
        """The summary and a table: a line for each kind of tensor over all layers, or for each tensor."""
        lines = _every(self.tensors) if every_tensor else _kinds(self.tensors)
        return "\n".join([*_summary(self), "", *lines])

    def __str__(self) -> str:
        return self.text()


def _total(counts: list[int | None]) -> int | None:
    return None if not counts or None in counts else sum(count for count in counts if count is not None)


def _bits(dtype: str | None) -> int:
    """Of one value: 16 for "bfloat16"."""
    found = re.search(r"\d+", dtype or "")
    return int(found[0]) if found else 8


def _summary(found: Explanation) -> list[str]:
    routers, count = found.routers, len(found.experts)
    gates, balance = f"top {routers['num_experts_per_tok']} of {count}", routers["balance"]
    if routers["router"] == "soft":
        gates = "every expert in every token"
    if balance != "none":
        balance += f", coefficient {routers['balance_coefficient']:g}, per {routers['balance_scope']}"
    attention = f"mixture of {count}, kv {routers['kv']}" if routers["attention"] == "mixture" else "merged"
    lines = [
        ("mixture", found.directory),
        ("family", f"{found.family}, {found.layers} layers"),
        ("experts", ", ".join(f"{n} {name}" for n, name in enumerate(found.experts))),
        *((f"  {name}", path) for name, path in found.sources.items()),
        ("routers", f"{routers['router']}, {gates}, gate_scale {routers['gate_scale']}"),
        ("balance", f"{balance}; z-loss coefficient {routers['z_coefficient']:g}"),
        ("attention", attention),
        ("parameters", f"{_count(found.parameters)}, active per token {_count(found.active_parameters)}"),
        ("bytes", f"{_count(found.bytes)} ({', '.join(sorted({row.dtype for row in found.tensors if row.dtype}))})"),
        ("proof", _proved(found.proof) if found.proof else "none"),
        *(("kinship", figures) for figures in found.kinship),
        *(("note", note) for note in found.notes),
    ]
    return [f"{name:11} {value}" for name, value in lines]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _proved(proof: dict[str, Any]) -> str:
    """proof.json in a line; of figures by expert, the largest."""
    parts = []
    for name, value in proof.items():
        if isinstance(value, dict) and value:
            worst = max(value, key=lambda expert: value[expert])
            value, name = value[worst], f"{name} at most"
        words = name.replace("_", " ")
        parts.append(f"{words} {value:.3g}" if isinstance(value, float) else f"{words} {value}")
    return ", ".join(parts)


def _every(rows: list[TensorRow]) -> list[str]:
    table = []
    for row in rows:
        files = {name: ", ".join(dict.fromkeys(found)) for name, found in row.files.items()}
        alike = len(set(files.values())) == 1
        where = f", in {next(iter(files.values()))}" if alike else ""
        table.append((row.origin, row.target, _shape(row.shape), row.dtype or "?", _from(row, row.sources) + where))
        if not alike:
            table += [("", "", "", "", f"  {name} in {found}") for name, found in files.items()]
    return _columns(("origin", "tensor", "shape", "dtype", "from"), table)


def _kinds(rows: list[TensorRow]) -> list[str]:
    """Tensors that differ in numbers of their names only are one line, in the order of their first."""
    kinds: dict[tuple, list[TensorRow]] = {}
    for row in rows:
        sources = tuple(_pattern(source) for source in row.sources)
        kinds.setdefault((row.origin, _pattern(row.target), sources, _shape(row.shape), row.dtype), []).append(row)
    table = []
    for (origin, target, sources, shape, dtype), alike in kinds.items():
        total = _total([row.parameters for row in alike])
        source = _from(alike[0], list(sources), many=len({tuple(row.experts) for row in alike}) > 1)
        table.append((origin, f"{len(alike)}", shape, dtype or "?", _count(total), target, source))
    return _columns(("origin", "tensors", "shape of each", "dtype", "parameters", "tensor", "from"), table)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _from(row: TensorRow, sources: list[str], many: bool = False) -> str:
    """ "model.layers.*.mlp.gate_proj.weight + up_proj.weight, of 3 experts"."""
    if not sources:
        return ""
    first, *more = sources
    short = [source.removeprefix(_stem(first, source)) for source in more]
    whose = row.experts[0] if len(row.experts) == 1 else f"{len(row.experts)} experts"
    return f"{' + '.join([first, *short])}, of {'one expert each' if many else whose}"


def _stem(first: str, other: str) -> str:
    """The dotted beginning that two names share."""
    parts = []
    for ours, theirs in zip(first.split("."), other.split("."), strict=False):
        if ours != theirs:
            break
        parts.append(ours)
    return "".join(f"{part}." for part in parts)


def _shape(shape: list[int] | None) -> str:
    return "?" if shape is None else "x".join(map(str, shape))


def _columns(titles: tuple[str, ...], table: list[tuple[str, ...]]) -> list[str]:
    """Text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [titles, *table]) for column in range(len(titles))]
    numbers = [all(row[column].replace(",", "").isdigit() for row in table) for column in range(len(titles))]
    return [
        "  ".join(
            f"{cell:{'>' if number else '<'}{width}}" for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in [titles, *table]
    ]
