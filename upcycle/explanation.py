"""What a mixture is and what each of its tensors came from, as data, and in words for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from upcycle.kinds import FACTS

FIRST = {
    "seed": "the seed's expert",
    "uniform": "all experts alike",
    "base": "the base expert",
    "own_mean": "whom its own mean says, later tokens included",
}
TIES = {
    "layers": "the first layer's router decides for all",
    "sublayers": "a layer's feed-forward router has the logits of its attention router",
    "skip": "a router adds the logits of the layer before",
}


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a mixture. `files`: of each model, the files that the `sources` lie in, where that is known.

    origin: "averaged" (or "merged by" another method) over the models that have experts, "the seed's", "stacked" of the
    `experts`, "copied" from one of them or from the seed, "fresh", "unknown". shape and dtype are None where the tensor's
    shard is missing.
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
    """A mixture, written or planned. `sources`: the directory of each model that has experts, where it is known.

    attention_experts: none where attention is merged. bytes: of all tensors.
    """

    directory: str
    family: str
    layers: int
    experts: list[str]
    attention_experts: list[str]
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
        """Parameters that take part in one token: K of the E feed-forward experts, everything else; see `Shape.active_parameters`."""
        active, experts = self.routers["num_experts_per_tok"], len(self.experts)
        if self.routers["combine"]["of"] == "weights":
            active = 1
        soft = "nowhere"
        if self.routers["router"] == "sample_top1":  # whose first layer is soft
            soft = f".{(self.routers['routed_layers'] or [0])[0]}."
        return _total(
            [
                0
                if re.search(r"\.(base|curvature)_", row.target)
                else row.parameters // experts * active
                if row.parameters and ".experts." in row.target and soft not in row.target
                else row.parameters
                for row in self.tensors
            ]
        )

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
    lines = [
        ("mixture", found.directory),
        ("family", f"{found.family}, {found.layers} layers"),
        *_placement(found),
        *((f"  {name}", path) for name, path in found.sources.items()),
        *routing_in_words(found.routers, len(found.experts), len(found.attention_experts)),
        ("parameters", f"{_count(found.parameters)}, active per token {_count(found.active_parameters)}"),
        ("bytes", f"{_count(found.bytes)} ({', '.join(sorted({row.dtype for row in found.tensors if row.dtype}))})"),
        ("proof", _proved(found.proof) if found.proof else "none"),
        *(("kinship", figures) for figures in found.kinship),
        *(("note", note) for note in found.notes),
    ]
    return [f"{name:11} {value}" for name, value in lines]


def routing_in_words(config: Mapping[str, Any], experts: int, attention_experts: int) -> list[tuple[str, str]]:
    """Routers, ties and losses of a mixture's config, a line each: (name, what it is)."""
    own = {"kind": config["router"], "top_k": config["num_experts_per_tok"], "gate_scale": config["gate_scale"]}
    lines = [("routers", _router(own | config["router_options"], experts)), ("losses", _losses(config))]
    if config["tie"] != "none":
        lines.append(("tie", f"{config['tie']}: {TIES[config['tie']]}"))
    if config["attention"] == "merged":
        return [*lines, ("attention", "merged")]
    lines.append(("attention", f"mixture of {attention_experts}, kv {config['kv']}"))
    lines.append(("  routers", _router(config["attention_router"], attention_experts)))
    if (losses := _losses(config["attention_losses"])) != "none":
        lines.append(("  losses", losses))
    return lines


def combined_in_words(combine: Mapping[str, Any]) -> str:
    """How experts are combined, where it is not their outputs; "" where it is."""
    if combine.get("of", "outputs") == "outputs":
        return ""
    if combine["base"] == "none":
        return "weights are merged once a decision: Σ gate · E"
    trained = "" if combine["train_base"] or combine["base"] == "zeros" else ", never trained"
    parts = [
        f"B + {combine['alpha']:g} · Σ gate · M(E − B)"
        if combine["curvature"] != "none" or combine["alpha"] != 1
        else "B + Σ gate · (E − B)"
    ]
    parts.append(f"base {combine['base']}{trained}")
    if combine["curvature"] == "kronecker":
        whose = "of each layer" if combine["share"] == "layer" else "of all layers"
        parts.append(f"M a Kronecker map of rank {combine['rank']}, {whose}")
    elif combine["curvature"] == "linear":
        parts.append("M a linear map of the inputs")
    else:
        parts.append("M = I")
    if combine["election"] == "sign":
        parts.append("entries with the sign of the differences' sum")
    if combine["drop"]:
        parts.append(f"in training {combine['drop']:g} of them dropped")
    if combine["update"] != "none":
        parts.append(f"the base is updated: {combine['update']}")
    return f"weights are merged once a decision: {'; '.join(parts)}"


def _router(rule: Mapping[str, Any], experts: int) -> str:
    gates = f"top {rule['top_k']} of {experts}"
    if rule["kind"] in FACTS and FACTS[rule["kind"]].every:
        gates = "every expert in every token"
    found = [f"{rule['kind']}, {gates}, gate_scale {rule['gate_scale']}"]
    if rule["kind"] == "switch":
        found.append(f"capacity factor {rule['capacity_factor']:g}")
    if rule["per"] != "token":
        whom = FIRST[rule["first"]]
        found.append(f"one decision a {rule['per']}, of {rule['tokens']} tokens; the first goes to {whom}")
    if rule["bias_rate"]:
        found.append(f"a bias on the selection, rate {rule['bias_rate']:g}")
    if rule["noise_std"] or rule["jitter"]:
        found.append(f"in training noise {rule['noise_std']:g} and jitter {rule['jitter']:g}")
    if not rule["trained"]:
        found.append("never trained")
    return "; ".join(found)


def _losses(losses: Mapping[str, Any]) -> str:
    """Those that are switched on."""
    found = []
    if losses["balance"] != "none" and losses["balance_coefficient"]:
        found.append(
            f"balance {losses['balance']}, coefficient {losses['balance_coefficient']:g}, per {losses['balance_scope']}"
        )
    for name in ("z", "similarity", "entropy"):
        if losses[f"{name}_coefficient"]:
            found.append(f"{name}, coefficient {losses[f'{name}_coefficient']:g}")
    return "; ".join(found) or "none"


def _placement(found: Explanation) -> list[tuple[str, str]]:
    """Which experts, what is beside them, and where."""
    routers, lines = found.routers, [("experts", ", ".join(f"{n} {name}" for n, name in enumerate(found.experts)))]
    if routers["split"] > 1:
        lines.append(("split", f"each expert has 1/{routers['split']} of a feed-forward's hidden units"))
    if routers["one_per_source"]:
        lines.append(("sources", "a token takes one expert of each at most"))
    if routers["shared_expert"] != "none":
        gate = "½ shared + ½ routed" if routers["shared_gate"] == "half" else "shared + routed"
        lines.append(("shared", f"one more feed-forward for every token, {routers['shared_expert']}; {gate}"))
    if words := combined_in_words(routers.get("combine") or {}):
        lines.append(("combined", words))
    if routers["routed_layers"] is not None:
        layers = ", ".join(map(str, routers["routed_layers"]))
        lines.append(("mixtures", f"in layers {layers}; the others are merged"))
    return lines


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _proved(proof: dict[str, Any]) -> str:
    """proof.json in a line; of figures by expert, the largest. The weights' hash is for machines."""
    parts = []
    for name, value in proof.items():
        if name == "weights_sha256" or value == {}:
            continue
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
    kind = "experts" if row.origin == "stacked" else "models"
    whose = row.experts[0] if len(row.experts) == 1 else f"{len(row.experts)} {kind}"
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
