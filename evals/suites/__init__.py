"""Which tasks a run's models are given: by a suite's name, or by lm-eval's own. Nothing here imports lm-eval.

`continuations` is one task a domain, from the run's held-out documents; `btx` and `bam` are lists of lm-eval's tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from evals.suites.papers import PAPERS
from upcycle.config import TasksConfig, nearest

CONTINUATIONS = "continuations"


@dataclass(frozen=True)
class Planned:
    """One thing to run: a task, group or tag of lm-eval, or, with a `domain`, the continuations of that domain.

    num_fewshot: examples before each question; None is the task's own number.
    """

    name: str
    num_fewshot: int | None = None
    domain: str | None = None


def planned(config: TasksConfig, domains: Sequence[str]) -> list[Planned]:
    """Every task of `config.names` once, in order. Raises ValueError: continuations of a domain that is not there."""
    found: dict[str, Planned] = {}
    for name in config.names:
        for one in _named(name, config.num_fewshot, domains):
            found.setdefault(one.name, one)
    return list(found.values())


def _named(name: str, num_fewshot: int | None, domains: Sequence[str]) -> list[Planned]:
    local = {f"{CONTINUATIONS}_{domain}": domain for domain in domains}
    if name == CONTINUATIONS and domains:
        return [Planned(task, 0, domain) for task, domain in local.items()]
    if name in local:
        return [Planned(name, 0, local[name])]
    if name.startswith(CONTINUATIONS):
        raise ValueError(
            f"names has {name!r}, which needs a domain's documents; this run has continuations of "
            f"{', '.join(domains) or 'no domain'}{nearest(name, local)}"
        )
    if name in PAPERS:
        return [Planned(task, own if num_fewshot is None else num_fewshot) for task, own in PAPERS[name].items()]
    return [Planned(name, num_fewshot)]


def check_tasks(config: TasksConfig, domains: Sequence[str]) -> list[Planned]:
    """What `planned` finds, once lm-eval knows all of it.

    Raises ValueError: lm-eval is not installed; names that neither it nor this package knows; tasks that run programs.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks.names={list(config.names)} needs lm-eval, which is not installed; pip install -e '.[eval]', or "
            "tasks=null"
        )
    found = planned(config, domains)
    if outside := [one.name for one in found if one.domain is None]:
        from evals.harness import check_names

        check_names(outside, [CONTINUATIONS, *PAPERS], config.execute_code)
    return found
