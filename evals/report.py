"""What a run bought: every model's perplexity, intervals, routing and cost in one JSON-serialisable dictionary.

`build_report` reads evaluation directories and training artifacts and computes; `write_report` writes report.json,
report.html and figures/. Nothing downstream computes a result: tables, page and figures only format this dictionary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.course import POINTS, course_of
from evals.evidence import (
    CURVE_POINTS,
    METRICS,
    Evaluation,
    check_same_test,
    curve_of,
    first_names,
    load_evaluation,
    read_ablation,
    read_rows,
    read_seconds,
)
from evals.figures import write_figures
from evals.matched import relative_cost
from evals.page import render_page
from evals.pareto import pareto
from evals.statistics import bootstrap_domains, mean_over_domains, percentile_interval
from evals.tables import format_table, markdown_table, update_readme
from upcycle.durable import reading

__all__ = ["ModelRow", "build_report", "format_table", "markdown_table", "update_readme", "write_report"]

NOT_COMPARED = (
    "seed",
    "branch",
    "dense",
    "ensemble",
    "oracle",
)  # every other kind is a mixture or a merge: the models on trial
DEFINITIONS = {
    "perplexity": "exp(nats per token) over a domain's test tokens: of as many first whole documents as fit in max_tokens, at least one, or of all",
    "average": "mean over the group's domains of nats per token, each domain counting once; its perplexity is the exp",
    "interval": "95% percentile bootstrap over documents; every model is scored on the same resampled documents",
    "nats_difference": "model minus against: nats per token, mean over the trained domains; below 0: model is better",
    "oracle": "not a model: for each trained domain the branch of that name, the seed for every other column",
    "seconds": "wall time summed over every stage behind the model, the seed's included",
    "parallel_seconds": "the same with the stages of one group running side by side: the slowest of each group counts",
    "information": "mutual information of a token's expert with its domain (each domain counting once), id, position in "
    "the window or part of word (starts a word, continues one, neither), in nats",
    "control": "of the domain: documents change domains; else: each window's experts move on by a random number of tokens",
    "agreement": "share of tokens whose largest gate goes to the same expert; independent: what the same loads give by chance",
    "dead": "experts with less than a tenth of an equal share of the assignments",
    "drift": "norm of what training changed over the norm of what was assembled: of an expert's tensors in a layer, of its "
    "router's row, and of all that experts share (rest)",
    "ablation": "nats per token with one expert's router rows masked (removed), or with all tokens sent to it (forced)",
    "relative": "training tokens and FLOPs after the seed, as multiples of the reference's; a model is called data-matched if "
    "its tokens of every domain, and compute-matched if its FLOPs, are within 1% of the reference's",
    "curve": f"[tokens of the stage, training cross-entropy in nats per token]: means of at most {CURVE_POINTS} bins; its "
    "FLOPs are the tokens times flops_per_token, those of forward and backward",
    "pareto": "the models that no other one beats both in the trained average and in a cost: train_flops of everything "
    "behind a model, the seed's included, or active_parameters of a token, which the FLOPs of using it go by",
    "course": f"what a mixture's training recorded of its routers, as means of at most {POINTS} stretches: information of "
    "expert and domain (nats, mean over layers) and the same with domains dealt anew, entropy (nats, mean over layers), largest_load of one expert of one layer, dead_experts of all layers in a batch, gate_sum of a token",
}


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model of the experiment and what it cost; None where a number does not apply.

    `train_tokens`, `train_domains` (by domain) and `train_flops` cover every stage behind the model; `flops_per_token` is of
    the last stage's training, forward and backward. `stages` are consecutive groups of stage names; the stages within one
    group could have run in parallel.
    """

    name: str
    kind: str
    parameters: int | None
    active_parameters: int | None
    train_tokens: int | None
    train_flops: float | None
    stages: Sequence[Sequence[str]]
    learning_rate: float | None = None
    train_domains: Mapping[str, int] | None = None
    flops_per_token: float | None = None


def build_report(
    experiment: str,
    rows: Sequence[ModelRow | Mapping[str, Any]],
    domains: Mapping[str, bool],
    evaluations: Mapping[str, Path],
    training: Mapping[str, Path],
    *,
    baseline: str | None = "dense",
    random_router: str = "btx_random",
    reference: str | None = None,
    machine: Mapping[str, Any],
    provenance: Mapping[str, Any],
    samples: int = 2000,
    rng_seed: int = 0,
    ablations: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Everything measured, JSON-serialisable; every field is defined in `DEFINITIONS` or by its unit.

    domains: name -> trained on. evaluations: model -> its evaluation directory. training: stage -> its artifact.
    baseline: the row that mixtures are held against first; None where the run has none. random_router: the row, if
    there is one, whose router is frozen at random. reference: the row whose cost all others are held against. ablations:
    model -> its ablation, of those that have one. Raises ValueError where inputs are missing or disagree.
    """
    rows = [row if isinstance(row, ModelRow) else ModelRow(**row) for row in rows]
    groups = _grouped(domains, rows)
    _check_inputs(rows, groups, evaluations, training, {"baseline": baseline, "reference": reference})
    scores = {row.name: load_evaluation(row.name, Path(evaluations[row.name]), list(domains)) for row in rows}
    check_same_test(scores)
    seconds = {stage: read_seconds(Path(directory)) for stage, directory in training.items()}
    models = {row.name: _describe(row, seconds, scores[row.name], training) for row in rows}
    for name, directory in (ablations or {}).items():
        models[name]["ablation"] = read_ablation(Path(directory), list(domains))
    _relate(models, {row.name: asdict(row) for row in rows}, reference)
    sources = oracle_sources(rows, domains)
    if sources:
        scores["oracle"] = _compose(scores, sources)
        models["oracle"] = _describe_oracle(sources)
    first = scores[rows[0].name]
    nats = {domain: np.stack([score.nats[domain] for score in scores.values()]) for domain in domains}
    draws = bootstrap_domains(nats, first.tokens, samples, rng_seed)
    for index, (name, score) in enumerate(scores.items()):
        models[name] |= _measure(score, groups, {domain: draws[domain][:, index] for domain in domains})
    ensembles = [name for name, model in models.items() if model["kind"] == "ensemble"]
    dense = [name for name, model in models.items() if model["kind"] == "dense"]
    against = [baseline, *dense, reference, "seed", *ensembles, "oracle", random_router]
    return {
        "experiment": experiment,
        "machine": dict(machine),
        "seconds": sum(seconds.values()),
        **_test_set(first, groups, list(domains)),
        "bootstrap": {"samples": samples, "rng_seed": rng_seed, "level": 0.95},
        "baseline": baseline,
        "reference": reference,
        "random_router": random_router if random_router in scores else None,
        "models": models,
        "pareto": pareto(models),
        "comparisons": _compare(models, groups["trained"], draws, against),
        "definitions": DEFINITIONS,
        "provenance": dict(provenance),
    }


def _grouped(domains: Mapping[str, bool], rows: Sequence[ModelRow]) -> dict[str, list[str]]:
    """The domains of each average: `trained` are `in_domain`, which have a branch of their name, and `general`."""
    branches = {row.name for row in rows if row.kind == "branch"}
    trained = [domain for domain, trained in domains.items() if trained]
    return {
        "trained": trained,
        "in_domain": [domain for domain in trained if domain in branches],
        "general": [domain for domain in trained if domain not in branches],
        "out_of_domain": [domain for domain, trained in domains.items() if not trained],
    }


def _test_set(score: Evaluation, groups: Mapping[str, Sequence[str]], domains: Sequence[str]) -> dict[str, Any]:
    """What every model was measured on."""
    return {
        "split": score.summary["split"],
        "sequence_length": score.summary["sequence_length"],
        "stride": score.summary.get("stride", score.summary["sequence_length"]),
        "skip_first": score.summary.get("skip_first", 0),
        "max_tokens": score.summary.get("max_tokens"),
        "domains": list(domains),
        "domain_groups": groups,
        "documents": {domain: len(score.tokens[domain]) for domain in domains},
        "overlap": {domain: score.summary["domains"][domain].get("overlap") for domain in domains},
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
    """What a model is and cost: the row, its wall times, its routing, and how its last stage's training went."""
    alone = row.stages and len(row.stages[-1]) == 1
    last = Path(training[row.stages[-1][0]]) if alone else None
    steps = read_rows(last, trained=row.flops_per_token is not None) if last else []
    with reading(last / METRICS if last else Path()):
        curve, course = curve_of(steps), course_of(steps)
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
        "curve": curve,
        "flops_per_token": row.flops_per_token,
        "course": course,
    }


def _relate(models: dict[str, Any], rows: Mapping[str, Mapping[str, Any]], reference: str | None) -> None:
    """Add what each model took relative to the reference; None without one."""
    nothing = {"train_domains": {}, "train_flops": 0.0}
    seed = next((row for row in rows.values() if row["kind"] == "seed"), nothing)
    for name, row in rows.items():
        models[name]["relative"] = relative_cost(row, seed, rows[reference]) if reference else None


def _describe_oracle(sources: Mapping[str, str]) -> dict[str, Any]:
    """`_describe` of the oracle: it has sources, no parameters and no cost of its own."""
    costs = ("parameters", "active_parameters", "train_tokens", "train_flops", "learning_rate")
    times = ("seconds", "parallel_seconds", "routing", "relative", "flops_per_token", "course")
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
    named: Mapping[str, str | None],
) -> None:
    """Raise ValueError for a name used twice, a missing artifact, or a baseline or reference that is no row."""
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
    for what, name in named.items():
        if name is not None and name not in names:
            raise ValueError(
                f"{what}={name!r} is not among the models {first_names(names)}; name one of them, or pass {what}=None where "
                "the run has none."
            )


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write report.json, report.html and figures/*.svg and *.png into the directory `out`; same report, same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    write_figures(report, out / "figures")
    (out / "report.html").write_text(render_page(report), encoding="utf-8")
