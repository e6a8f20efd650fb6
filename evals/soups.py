"""Greedy soup (arXiv:2203.05482, recipe 1): an average of models that only takes in what makes it better on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def greedy(candidates: Sequence[str], nats: Callable[[tuple[str, ...]], float]) -> dict[str, Any]:
    """The candidates whose average is kept, and what was tried on the way.

    Candidates come in the order of their own nats, the best first; each joins if the average of those kept so far and it
    has fewer nats than theirs without it. nats: of the average of the named models, on the split that it is chosen on.
    Differs: the paper also keeps a candidate that changes nothing (>= in accuracy); nats hardly ever tie.
    """
    alone = {name: nats((name,)) for name in candidates}
    first, *others = sorted(candidates, key=alone.__getitem__)
    kept, best, tried = (first,), alone[first], []
    for name in others:
        found = nats((*kept, name))
        tried.append({"candidate": name, "beside": list(kept), "nats_per_token": found, "kept": found < best})
        if found < best:
            kept, best = (*kept, name), found
    return {"alone": alone, "tried": tried, "ingredients": list(kept), "nats_per_token": best}


def mean_nats(domains: Mapping[str, Mapping[str, Any]]) -> float:
    """Nats per token, mean over domains, each counting once: the report's trained average. domains: of an evaluation."""
    return sum(found["nats"] / found["tokens"] for found in domains.values()) / len(domains)
