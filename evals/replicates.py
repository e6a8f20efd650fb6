"""Several runs of one experiment that differ in rng_seed only: spread of every model, and whether the claims hold in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from evals.tables import COSTS
from upcycle.config import nearest

MIXTURES = ("btx", "bam")  # kinds
BRANCH_GAIN = 0.10  # a branch must lower its own domain's perplexity by this share


def summarise(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several runs say together; JSON-serialisable, small enough to keep beside the docs.

    A model or claim that only some of the runs have is summarised over those.
    Raises ValueError: runs over different domains, or the same rng_seed twice.
    """
    first = reports[0]
    for report in reports[1:]:
        if report["domain_groups"] != first["domain_groups"]:
            raise ValueError("replicates must be over the same domains; run them with the same settings but rng_seed")
    names = list(dict.fromkeys(name for report in reports for name in report["models"]))
    seeds = [report["provenance"]["rng_seed"] for report in reports]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"replicates need different rng_seeds; got {seeds}")
    return {
        "rng_seeds": seeds,
        "domains": first["domain_groups"]["trained"],
        "seconds": [report["seconds"] for report in reports],
        "trained_perplexity": {
            name: [r["models"][name]["average"]["trained"]["perplexity"] for r in reports if name in r["models"]]
            for name in names
        },
        "costs": {name: _mean_costs([r["models"][name] for r in reports if name in r["models"]]) for name in names},
        "claims": {
            name: [check(report) for report in reports if NEEDED.get(name, set()) <= set(report["models"])]
            for name, check in CLAIMS.items()
        },
    }


def _mean_costs(models: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over runs of the costs that the report states for a model in every run."""
    known = [field for field in COSTS if all(model.get(field) is not None for model in models)]
    return {field: float(np.mean([model[field] for model in models])) for field in known}


def branches_beat_the_seed(report: Mapping[str, Any]) -> bool:
    """Every branch has at least 10 % lower perplexity than the seed on its own domain."""
    seed = report["models"]["seed"]["perplexity"]
    branches = {name: model for name, model in report["models"].items() if model["kind"] == "branch"}
    return all(model["perplexity"][name] <= (1 - BRANCH_GAIN) * seed[name] for name, model in branches.items())


def mixtures_beat_their_parts(report: Mapping[str, Any]) -> bool:
    """Every mixture has a lower trained average than the seed, the soup and every single branch."""
    average = {name: model["average"]["trained"]["perplexity"] for name, model in report["models"].items()}
    kinds = {name: model["kind"] for name, model in report["models"].items()}
    parts = min(average[name] for name, kind in kinds.items() if kind in ("seed", "branch", "soup"))
    return all(average[name] < parts for name, kind in kinds.items() if kind in MIXTURES)


def routing_knows_the_domain(report: Mapping[str, Any]) -> bool:
    """In each mixture, in at least half of its layers, the feed-forward router's mutual information with the domain is
    above every shuffled draw."""
    for model in report["models"].values():
        if model["kind"] in MIXTURES:
            found = model["routing"]["ffn"]
            above = [m > max(s) for m, s in zip(found["mutual_information"], found["shuffled"], strict=True)]
            if 2 * sum(above) < len(above):
                return False
    return True


def mixtures_beat_dense_continuation(report: Mapping[str, Any]) -> bool:
    """The best mixture has a lower trained average than one dense model trained on the same tokens."""
    models = report["models"]
    best = min(m["average"]["trained"]["perplexity"] for m in models.values() if m["kind"] in MIXTURES)
    return best < models["dense"]["average"]["trained"]["perplexity"]


def learned_routers_beat_the_random_one(report: Mapping[str, Any]) -> bool:
    """BTX top-2 has a lower trained average than the same mixture with a frozen random router."""
    average = {name: model["average"]["trained"]["perplexity"] for name, model in report["models"].items()}
    return average["btx"] < average["btx_random"]


CLAIMS = {
    "every branch beats the seed on its own domain by at least 10 %": branches_beat_the_seed,
    "every mixture beats the seed, the soup and every single branch": mixtures_beat_their_parts,
    "feed-forward routing carries the domain in at least half of the layers": routing_knows_the_domain,
    "the best mixture beats dense continuation on the same tokens": mixtures_beat_dense_continuation,
    "BTX top-2 beats the same mixture with a frozen random router": learned_routers_beat_the_random_one,
}

# Models that a claim is about; it is left out where the runs have none of that name.
NEEDED = {
    "the best mixture beats dense continuation on the same tokens": {"dense"},
    "BTX top-2 beats the same mixture with a frozen random router": {"btx", "btx_random"},
}


def paired(summary: Mapping[str, Any], model: str, against: str) -> tuple[float, float, float] | None:
    """Nats per token of a model minus another one's: the mean over runs, and its 95 % interval by Student's t with one degree of
    freedom less than runs. None where fewer than two runs have both.

    Raises ValueError: no run has a model of that name.
    """
    averages = summary["trained_perplexity"]
    if against not in averages:
        raise ValueError(
            f"against={against}: no run has such a model; expected one of {', '.join(averages)}{nearest(against, averages)}"
        )
    if len(averages[model]) != len(averages[against]) or len(averages[model]) < 2:
        return None
    differences = np.log(averages[model]) - np.log(averages[against])
    count, mean = len(differences), float(differences.mean())
    half = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def _shown(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 10_000 else f"{perplexity:.2g}"


def markdown(summary: Mapping[str, Any], against: Sequence[str] = ()) -> str:
    """Two tables: spread of the trained average, with `paired` differences from some models; and how often each claim held."""
    domains = ", ".join(summary["domains"])
    titles = [
        "model",
        "runs",
        f"mean trained avg ({domains})",
        "lowest",
        "highest",
        *(f"against {one}" for one in against),
    ]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for name, values in summary["trained_perplexity"].items():
        cells = [name, f"{len(values)}", *(_shown(one) for one in (np.mean(values), min(values), max(values)))]
        for other in against:
            found = None if other == name else paired(summary, name, other)
            cells.append(f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]" if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| claim | held in |", "| --- | ---: |"]
    lines += [f"| {claim} | {sum(held)} of {len(held)} |" for claim, held in summary["claims"].items() if held]
    seeds = ", ".join(map(str, summary["rng_seeds"]))
    minutes = ", ".join(f"{seconds / 60:.1f}" for seconds in summary["seconds"])
    lines += ["", f"*rng_seed {seeds}; minutes of all stages together: {minutes}.*"]
    if against:
        lines += [
            "",
            "*Against: nats per token, model minus reference, mean over runs with the 95 % interval of Student's t over runs.*",
        ]
    return "\n".join(lines)
