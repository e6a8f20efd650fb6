"""What a run bought: every model's perplexity, intervals, routing and cost in one JSON-serialisable dictionary.

`build_report` reads evaluation directories and training artifacts and computes; `write_report` writes report.json,
report.html and figures/. Nothing downstream computes a result: tables, page and figures only format this dictionary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.evidence import (
    CURVE_POINTS,
    Evaluation,
    check_same_test,
    first_names,
    load_evaluation,
    read_curve,
    read_seconds,
)
from evals.figures import write_figures
from evals.page import render_page
from evals.statistics import bootstrap_domains, mean_over_domains, percentile_interval
from evals.tables import format_table, markdown_table, update_readme

__all__ = ["ModelRow", "build_report", "format_table", "markdown_table", "update_readme", "write_report"]

NOT_COMPARED = ("seed", "branch", "dense", "oracle")  # every other kind is a mixture or a merge: the models on trial
DEFINITIONS = {
    "perplexity": "exp(nats per token) over all of a domain's test tokens",
    "average": "mean over the group's domains of nats per token, each domain counting once; its perplexity is the exp",
    "interval": "95% percentile bootstrap over documents; every model is scored on the same resampled documents",
    "nats_difference": "model minus against: nats per token, mean over the trained domains; below 0: model is better",
    "oracle": "not a model: for each trained domain the branch of that name, the seed for every other column",
    "seconds": "wall time summed over every stage behind the model, the seed's included",
    "parallel_seconds": "the same with the stages of one group running side by side: the slowest of each group counts",
    "curve": f"[tokens of the stage, training cross-entropy in nats per token]: means of at most {CURVE_POINTS} bins",
}


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of the experiment and what it cost; None where a number does not apply.

    `train_tokens` and `train_flops` cover every stage behind the model. `stages` are consecutive groups of stage
    names; the stages within one group could have run in parallel.
    """

    name: str
    kind: str
    parameters: int | None
    active_parameters: int | None
    train_tokens: int | None
    train_flops: float | None
    stages: Sequence[Sequence[str]]
    learning_rate: float | None = None


def build_report(
    experiment: str,
    rows: Sequence[ModelRow | Mapping[str, Any]],
    domains: Mapping[str, bool],
    evaluations: Mapping[str, Path],
    training: Mapping[str, Path],
    *,
    baseline: str | None = "dense",
    random_router: str = "btx_random",
    machine: Mapping[str, Any],
    provenance: Mapping[str, Any],
    samples: int = 2000,
    rng_seed: int = 0,
) -> dict[str, Any]:
    """Everything measured, JSON-serialisable; every field is defined in `DEFINITIONS` or by its unit.

    domains: name -> trained on. evaluations: model -> its evaluation directory. training: stage -> its artifact.
    baseline: the row that mixtures are held against first; None where the run has none. random_router: the row, if
    there is one, whose router is frozen at random. Raises ValueError where inputs are missing or disagree.
    """
    rows = [row if isinstance(row, ModelRow) else ModelRow(**row) for row in rows]
    groups = {
        "trained": [domain for domain, trained in domains.items() if trained],
        "out_of_domain": [domain for domain, trained in domains.items() if not trained],
    }
    _check_inputs(rows, groups, evaluations, training, baseline)
    scores = {row.name: load_evaluation(row.name, Path(evaluations[row.name]), list(domains)) for row in rows}
    check_same_test(scores)
    seconds = {stage: read_seconds(Path(directory)) for stage, directory in training.items()}
    models = {row.name: _describe(row, seconds, scores[row.name], training) for row in rows}
    sources = oracle_sources(rows, domains)
    if sources:
        scores["oracle"] = _compose(scores, sources)
        models["oracle"] = _describe_oracle(sources)
    first = scores[rows[0].name]
    nats = {domain: np.stack([score.nats[domain] for score in scores.values()]) for domain in domains}
    draws = bootstrap_domains(nats, first.tokens, samples, rng_seed)
    for index, (name, score) in enumerate(scores.items()):
        models[name] |= _measure(score, groups, {domain: draws[domain][:, index] for domain in domains})
    return {
        "experiment": experiment,
        "machine": dict(machine),
        "seconds": sum(seconds.values()),
        "split": first.summary["split"],
        "sequence_length": first.summary["sequence_length"],
        "domains": list(domains),
        "domain_groups": groups,
        "documents": {domain: len(first.tokens[domain]) for domain in domains},
        "overlap": {domain: first.summary["domains"][domain].get("overlap") for domain in domains},
        "bootstrap": {"samples": samples, "rng_seed": rng_seed, "level": 0.95},
        "baseline": baseline,
        "random_router": random_router if random_router in scores else None,
        "models": models,
        "comparisons": _compare(models, groups["trained"], draws, [baseline, "seed", "oracle", random_router]),
        "definitions": DEFINITIONS,
        "provenance": dict(provenance),
    }


def oracle_sources(rows: Sequence[ModelRow], domains: Mapping[str, bool]) -> dict[str, str]:
    """{domain: model the oracle uses there}; empty without a seed or without a branch named like a trained domain."""
    seed = next((row.name for row in rows if row.kind == "seed"), None)
    branches = {row.name for row in rows if row.kind == "branch"}
    if seed is None or not any(trained and domain in branches for domain, trained in domains.items()):
        return {}
    return {domain: domain if trained and domain in branches else seed for domain, trained in domains.items()}


def _compose(scores: Mapping[str, Evaluation], sources: Mapping[str, str]) -> Evaluation:
    """The evaluation whose every domain is taken from the model `sources` names."""
    pick = {domain: scores[name] for domain, name in sources.items()}
    return Evaluation(
        {"domains": {domain: score.summary["domains"][domain] for domain, score in pick.items()}, "routing": None},
        {domain: score.nats[domain] for domain, score in pick.items()},
        {domain: score.tokens[domain] for domain, score in pick.items()},
        {domain: score.bytes[domain] for domain, score in pick.items()},
    )


def _describe(
    row: ModelRow, seconds: Mapping[str, float], score: Evaluation, training: Mapping[str, Path]
) -> dict[str, Any]:
    """What a model is and cost: the row, its wall times, its routing and its training curve."""
    return {
        "kind": row.kind,
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "train_tokens": row.train_tokens,
        "train_flops": row.train_flops,
        "learning_rate": row.learning_rate,
        "seconds": sum(seconds[stage] for group in row.stages for stage in group),
        "parallel_seconds": sum(max(seconds[stage] for stage in group) for group in row.stages),
        "routing": score.summary.get("routing"),
        "curve": read_curve(Path(training[row.stages[-1][0]])) if row.stages and len(row.stages[-1]) == 1 else [],
    }


def _describe_oracle(sources: Mapping[str, str]) -> dict[str, Any]:
    """`_describe` of the oracle: it has sources, no parameters and no cost of its own."""
    costs = ("parameters", "active_parameters", "train_tokens", "train_flops", "learning_rate")
    times = ("seconds", "parallel_seconds", "routing")
    return {"kind": "oracle"} | dict.fromkeys(costs + times) | {"curve": [], "sources": dict(sources)}


def _measure(score: Evaluation, groups: Mapping[str, Sequence[str]], draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Every quality number of one model, from its document sums and its [R] bootstrap draws per domain."""
    nats = {domain: float(array.sum()) for domain, array in score.nats.items()}
    tokens = {domain: int(array.sum()) for domain, array in score.tokens.items()}
    rate = {domain: nats[domain] / tokens[domain] for domain in nats}
    average = {}
    for group, members in groups.items():
        if members:
            mean = sum(rate[domain] for domain in members) / len(members)
            interval = percentile_interval(np.exp(mean_over_domains(draws, members)))
            average[group] = {"nats_per_token": mean, "perplexity": math.exp(mean), "interval": interval}
    return {
        "perplexity": {domain: math.exp(rate[domain]) for domain in rate},
        "bits_per_byte": {d: nats[d] / (math.log(2) * float(score.bytes[d].sum())) for d in nats},
        "nats_per_token": rate,
        "interval": {domain: percentile_interval(np.exp(draws[domain])) for domain in rate},
        "tokens": tokens,
        "average": average,
    }


def _compare(
    models: Mapping[str, Mapping[str, Any]], trained: Sequence[str], draws: Mapping[str, np.ndarray], against: Sequence
) -> list[dict[str, Any]]:
    """Paired differences on the trained average of every model on trial against each reference that is present."""
    column = {name: index for index, name in enumerate(models)}
    seed = next((name for name, model in models.items() if model["kind"] == "seed"), None)
    references = dict.fromkeys(seed if name == "seed" else name for name in against)
    average_RM = mean_over_domains(draws, trained)
    rate = {name: model["average"]["trained"]["nats_per_token"] for name, model in models.items()}
    return [
        {
            "model": name,
            "against": reference,
            "domains": list(trained),
            "nats_difference": rate[name] - rate[reference],
            "interval": percentile_interval(average_RM[:, column[name]] - average_RM[:, column[reference]]),
        }
        for reference in references
        if reference in models
        for name, model in models.items()
        if name != reference and model["kind"] not in NOT_COMPARED
    ]


def _check_inputs(
    rows: Sequence[ModelRow],
    groups: Mapping[str, Sequence[str]],
    evaluations: Mapping[str, Path],
    training: Mapping[str, Path],
    baseline: str | None,
) -> None:
    """Raise ValueError for a name used twice, a missing artifact, or a baseline that is no row."""
    names = [row.name for row in rows]
    repeated = sorted({name for name in names if names.count(name) > 1 or name == "oracle"})
    if not rows or repeated:
        raise ValueError(
            f"rows name {first_names(names)}; expected at least one, each name once and none called oracle, which is "
            f"computed. Rename {first_names(repeated)}."
        )
    if not groups["trained"]:
        raise ValueError(
            f"domains: none of {first_names(groups['out_of_domain'])} is trained; expected at least one, as the "
            "comparison is on the trained average. Set `trained: true` for the domains the branches saw."
        )
    if unevaluated := [name for name in names if name not in evaluations]:
        raise ValueError(
            f"evaluations lack the models {first_names(unevaluated)}; expected a directory for each of the "
            f"{len(names)} rows. Evaluate them or leave their rows out."
        )
    stages = [stage for row in rows for group in row.stages for stage in group]
    if untimed := [stage for stage in dict.fromkeys(stages) if stage not in training]:
        raise ValueError(
            f"training lacks the stages {first_names(untimed)}; expected the artifact of each stage that a row names "
            "(its timing.json gives the cost). Pass them too."
        )
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"baseline={baseline!r} is not among the models {first_names(names)}; name one of them, or pass "
            "baseline=None where the run has none."
        )


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write report.json, report.html and figures/*.svg and *.png into the directory `out`; same report, same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    write_figures(report, out / "figures")
    (out / "report.html").write_text(render_page(report), encoding="utf-8")
