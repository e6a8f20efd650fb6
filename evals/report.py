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

from evals.statistics import bootstrap_domains, mean_over_domains, percentile_interval
from evals.tables import format_table, markdown_table, update_readme

__all__ = ["ModelRow", "build_report", "format_table", "markdown_table", "update_readme", "write_report"]

CURVE_POINTS = 200
NOT_COMPARED = ("seed", "branch", "dense", "oracle")  # every other kind is a mixture or a merge: the models on trial
DEFINITIONS = {
    "perplexity": "exp(nats per token) over all of a domain's test tokens",
    "average": "mean over the group's domains of nats per token, each domain counting once; its perplexity is the exp",
    "interval": "95% percentile bootstrap over documents; every model is scored on the same resampled documents",
    "nats_difference": "model minus against: mean over the trained domains of nats per token; below 0 the model is better",
    "oracle": "not a model: for each trained domain the branch of that name, the seed for every other column",
    "seconds": "wall time summed over every stage behind the model, the seed's included",
    "parallel_seconds": "the same with the stages of one group running side by side: the slowest of each group counts",
    "curve": f"[tokens seen in the stage, training cross-entropy in nats per token], bin means of at most {CURVE_POINTS} bins",
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


@dataclass(frozen=True)
class Evaluation:
    """What one model scored: `evaluation.json`, and per document of each domain its nats, tokens and bytes."""

    summary: dict[str, Any]
    nats: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    bytes: dict[str, np.ndarray]


def load_evaluation(name: str, directory: Path, domains: Sequence[str]) -> Evaluation:
    """Read an evaluation directory; raises ValueError unless its two files agree and every nat is finite."""
    summary = json.loads((directory / "evaluation.json").read_text())
    missing = [domain for domain in domains if domain not in summary["domains"]]
    if missing:
        raise ValueError(
            f"evaluation of {name} lacks the domains {_first(missing)}; it has {_first(list(summary['domains']))}. "
            f"Evaluate {name} on every domain of the report, or leave the domain out ({directory})."
        )
    with np.load(directory / "documents.npz") as arrays:
        nats, tokens, sizes = (
            {domain: arrays[f"{domain}.{unit}"].astype(np.float64) for domain in domains}
            for unit in ("nats", "tokens", "bytes")
        )
    for domain in domains:
        total, expected = float(nats[domain].sum()), summary["domains"][domain]["nats"]
        if not math.isfinite(total):
            raise ValueError(
                f"evaluation of {name} on {domain}: the nats sum to {total}, expected a finite number; "
                f"the model diverged. Train it again at a lower learning rate or leave its row out ({directory})."
            )
        if not math.isclose(total, expected, rel_tol=1e-4):  # evaluators may sum batches in float32
            raise ValueError(
                f"evaluation of {name} on {domain}: documents.npz sums to {total:.6g} nats, evaluation.json says "
                f"{expected:.6g}; the files are of different runs. Evaluate {name} again ({directory})."
            )
    return Evaluation(summary, nats, tokens, sizes)


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
    _check_same_test(scores)
    seconds = {stage: _read_seconds(Path(directory)) for stage, directory in training.items()}
    models = {row.name: _describe(row, seconds, scores[row.name], training) for row in rows}
    sources = oracle_sources(rows, domains)
    if sources:
        scores["oracle"] = _compose(scores, sources)
        models["oracle"] = _describe_oracle(sources)
    draws = bootstrap_domains(
        {domain: np.stack([score.nats[domain] for score in scores.values()]) for domain in domains},
        next(iter(scores.values())).tokens,
        samples,
        rng_seed,
    )
    for index, (name, score) in enumerate(scores.items()):
        models[name] |= _measure(score, groups, {domain: draws[domain][:, index] for domain in domains})
    any_summary = scores[rows[0].name].summary
    return {
        "experiment": experiment,
        "machine": dict(machine),
        "seconds": sum(seconds.values()),
        "split": any_summary["split"],
        "sequence_length": any_summary["sequence_length"],
        "domains": list(domains),
        "domain_groups": groups,
        "documents": {domain: len(scores[rows[0].name].tokens[domain]) for domain in domains},
        "overlap": {domain: any_summary["domains"][domain].get("overlap") for domain in domains},
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
        "curve": _read_curve(Path(training[row.stages[-1][0]])) if len(row.stages[-1]) == 1 else [],
    }


def _describe_oracle(sources: Mapping[str, str]) -> dict[str, Any]:
    """`_describe` of the oracle: it has sources, no parameters and no cost of its own."""
    costs = ("parameters", "active_parameters", "train_tokens", "train_flops", "learning_rate")
    times = ("seconds", "parallel_seconds", "routing")
    return {"kind": "oracle"} | dict.fromkeys(costs + times) | {"curve": [], "sources": dict(sources)}


def _measure(
    score: Evaluation, groups: Mapping[str, Sequence[str]], draws: Mapping[str, np.ndarray]
) -> dict[str, Any]:
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
    references = [seed if name == "seed" else name for name in against]
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
