"""Which models of a report are matched: what each one's training took after the seed, held against the reference mixture's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLOSE = 0.01  # matched is within this share of the reference's figure


def relative_cost(
    row: Mapping[str, Any], seed: Mapping[str, Any], reference: Mapping[str, Any]
) -> dict[str, float | str | None]:
    """`tokens` and `flops` of a row less the seed's, as multiples of the reference's less the seed's, and the `label`.

    data-matched: the tokens of every domain are within 1 % of the reference's of that domain.
    compute-matched: the FLOPs are within 1 %. A figure is None where nobody knows it.

    row, seed, reference: `train_domains`, tokens by domain, and `train_flops`.
    """
    ours, theirs = (_after(one["train_domains"], seed["train_domains"]) for one in (row, reference))
    tokens = sum(ours.values()) / total if ours and theirs and (total := sum(theirs.values())) else None
    flops, spent = (_less(one["train_flops"], seed["train_flops"]) for one in (row, reference))
    share = flops / spent if flops is not None and spent else None
    found = ["data"] * (tokens is not None and _same_tokens(ours or {}, theirs or {}))
    found += ["compute"] * (share is not None and abs(share - 1) <= CLOSE)
    return {"tokens": tokens, "flops": share, "label": f"{'- and '.join(found)}-matched" if found else ""}


def _after(domains: Mapping[str, int] | None, before: Mapping[str, int] | None) -> dict[str, int] | None:
    if domains is None or before is None:
        return None
    return {name: domains.get(name, 0) - before.get(name, 0) for name in sorted({*domains, *before})}


def _same_tokens(ours: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    pairs = [(ours.get(name, 0), theirs.get(name, 0)) for name in {*ours, *theirs}]
    return all(abs(one - other) <= CLOSE * other for one, other in pairs)


def _less(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
