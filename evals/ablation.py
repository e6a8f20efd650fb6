"""What each expert is worth: perplexity of every domain without it, and with nothing but it.

Removed, its row of every router is masked, and its tokens take the next best. Forced, every token goes to it with gate 1.
An expert is one name: its feed-forward and, in a mixture of attention, the attention expert of that name together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from evals.perplexity import (
    FREE,
    Steering,
    count_windows,
    expert_of_domain,
    score_domain,
    scorer_of,
    whole_documents,
)
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.configuration import UpcycledConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.routing import unremovable
from upcycle.team import ALONE, Team


def experts_by_name(config: UpcycledConfig) -> dict[str, dict[str, int]]:
    """{name: {sublayer: index}} of every expert; what has a name in one sublayer only is in the other left alone."""
    named: dict[str, dict[str, int]] = {}
    for part in config.parts:
        for index, name in enumerate(config.names_of(part)):
            named.setdefault(name, {})[part] = index
    return named


def why_not(config: UpcycledConfig, places: dict[str, int]) -> str:
    """Why the experts at `places` cannot be removed; "" if they can."""
    found = [unremovable(config.rule(part, config.routed[-1]), index) for part, index in places.items()]
    alone = [part for part in places if len(config.names_of(part)) == 1]
    return next((reason for reason in found if reason), "there is no other" if alone else "")


def ablate(
    model: UpcycledForCausalLM, data: dict[str, Path], config: EvalConfig, advance: Callable, team: Team = ALONE
) -> dict[str, Any]:
    """`ablation.json`: nats and tokens of every domain, "whole" and for each of the experts "removed" and "forced".

    removed is None where a router cannot do without that expert, and "reason" says why. 2 · E + 1 evaluations.
    """
    named = experts_by_name(model.config)
    reasons = {name: why_not(model.config, places) for name, places in named.items()}
    arrays = {name: TokenArray(path, config.split) for name, path in sorted(data.items())}
    windows = sum(
        count_windows(array.offsets[whole_documents(array, config.max_tokens)], config) for array in arrays.values()
    )
    total = windows * (1 + len(named) + sum(not reason for reason in reasons.values()))
    scorer, done, what = scorer_of(model, config.precision, team), 0, "all experts"

    def tick(count: int) -> None:
        nonlocal done
        done += count
        advance(done, total, doing=f"windows, {what}")

    def measured(steering: Steering) -> dict[str, dict]:
        found = {}
        for domain, array in arrays.items():
            told = steering._replace(expert=expert_of_domain(model.config, domain))
            scored = score_domain(scorer, array, config, None, tick, team, told).summary()
            found[domain] = {unit: scored[unit] for unit in ("nats", "tokens")}
        return found

    experts = {}
    whole = measured(FREE)
    for name, places in named.items():
        what = f"without {name} and with it alone"
        removed = None if reasons[name] else measured(Steering(removed=places))
        experts[name] = {"removed": removed, "reason": reasons[name], "forced": measured(Steering(forced=places))}
    settings = {
        field: getattr(config, field) for field in ("split", "sequence_length", "stride", "skip_first", "max_tokens")
    }
    return settings | {"whole": whole, "experts": experts}
