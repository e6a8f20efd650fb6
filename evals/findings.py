"""What the numbers say, in sentences made from the numbers alone: who won, against what, and at which price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evals.tables import average_title, best_model, write_perplexity, write_signed


def trained_average(report: Mapping[str, Any]) -> dict[str, float]:
    """{model: perplexity of the trained average}."""
    return {name: model["average"]["trained"]["perplexity"] for name, model in report["models"].items()}


def on_trial(report: Mapping[str, Any]) -> list[str]:
    """The mixtures and merges that were compared."""
    return list(dict.fromkeys(item["model"] for item in report["comparisons"]))


def best_on_trial(report: Mapping[str, Any]) -> str | None:
    """The mixture or merge with the lowest trained average; None where the run has none."""
    return min(on_trial(report), key=trained_average(report).__getitem__, default=None)


def find_comparison(report: Mapping[str, Any], model: str, against: str | None) -> dict[str, Any] | None:
    """The paired comparison of two models, if it was made."""
    pairs = (item for item in report["comparisons"] if (item["model"], item["against"]) == (model, against))
    return next(pairs, None)


FEW_DOCUMENTS = 5  # fewer test documents than this say little about other documents


def too_few_documents(report: Mapping[str, Any]) -> list[str]:
    """The trained domains whose test split is too small for its interval to mean much."""
    return [domain for domain in report["domain_groups"]["trained"] if report["documents"][domain] < FEW_DOCUMENTS]


def verdict(item: Mapping[str, Any]) -> str:
    """`better`, `worse`, or `no clear difference` where the interval holds 0."""
    low, high = item["interval"]
    return "better" if high < 0 else "worse" if low > 0 else "no clear difference"


def percent(difference_nats: float) -> str:
    """A difference in nats per token as a change of perplexity: `4.2% lower`."""
    change = 100 * math.expm1(difference_nats)
    return f"{abs(change):.{1 if abs(change) >= 1 else 2}f}% {'lower' if change < 0 else 'higher'}"


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: the best mixture against the baseline; without one, the lowest trained average."""
    if few := too_few_documents(report):
        return f"Too few test documents to compare models: {', '.join(few)}."
    model = best_on_trial(report)
    item = find_comparison(report, model, report["baseline"]) if model else None
    if item is None:
        winner = best_model(report, trained_average(report))
        return f"{winner} has the lowest perplexity on the trained domains."
    change, baseline = percent(item["nats_difference"]), item["against"]
    sentences = {
        "better": f"{model} beats {baseline}: {change} perplexity on the trained domains.",
        "worse": f"No mixture or merge beats {baseline}: the best, {model}, has {change} trained perplexity.",
        "no clear difference": f"No clear winner: {model} and {baseline} differ by less than the test set can tell.",
    }
    return sentences[verdict(item)]


def findings(report: Mapping[str, Any]) -> list[str]:
    """The sentences below the headline: lowest average, the best mixture against each reference, its price."""
    averages = trained_average(report)
    winner = best_model(report, averages)
    low, high = report["models"][winner]["average"]["trained"]["interval"]
    sentences = [
        f"Lowest trained average: {winner}, {write_perplexity(averages[winner])} "
        f"[{write_perplexity(low)}, {write_perplexity(high)}]."
    ]
    model = best_on_trial(report)
    if model is None or too_few_documents(report):
        return sentences
    sentences.append(
        f"{model} is the best of {len(on_trial(report))} mixtures and merges on this very test: a choice that flatters it."
    )
    sentences += [
        _against(item) for item in report["comparisons"] if item["model"] == model and item["against"] != "oracle"
    ]
    if oracle := find_comparison(report, model, "oracle"):
        sentences.append(
            f"The oracle, which is told each text's domain and picks that branch, has "
            f"{write_perplexity(averages['oracle'])}: {model} is {percent(oracle['nats_difference'])}."
        )
    return sentences + _out_of_domain(report, model) + _price(report, model)


def _against(item: Mapping[str, Any]) -> str:
    """One paired comparison in words."""
    low, high = item["interval"]
    return (
        f"{item['model']} against {item['against']}: perplexity {percent(item['nats_difference'])}, "
        f"{write_signed(item['nats_difference'])} [{write_signed(low)}, {write_signed(high)}] nats per token: "
        f"{verdict(item)}."
    )


def _out_of_domain(report: Mapping[str, Any], model: str) -> list[str]:
    """The averages of the model and the baseline on text nobody was trained on, without a claim."""
    if not report["domain_groups"]["out_of_domain"]:
        return []
    names = [model, *([report["baseline"]] if report["baseline"] else [])]
    averages = [report["models"][name]["average"]["out_of_domain"] for name in names]
    written = [
        f"{name} {write_perplexity(average['perplexity'])} "
        f"[{write_perplexity(average['interval'][0])}, {write_perplexity(average['interval'][1])}]"
        for name, average in zip(names, averages, strict=True)
    ]
    return [f"{average_title(report, 'out_of_domain').capitalize()}: {', '.join(written)}."]


def _price(report: Mapping[str, Any], model: str) -> list[str]:
    """What the model cost relative to the baseline, for the costs that both have."""
    if report["baseline"] is None:
        return []
    names = {
        "parameters": "parameters",
        "active_parameters": "active parameters",
        "train_tokens": "training tokens",
        "train_flops": "training FLOPs",
        "seconds": "seconds",
        "parallel_seconds": "seconds with branches in parallel",
    }
    ours, theirs = report["models"][model], report["models"][report["baseline"]]
    ratios = [
        f"{ours[field] / theirs[field]:.2f}× the {name}"
        for field, name in names.items()
        if ours[field] and theirs[field]
    ]
    return [f"Its price against {report['baseline']}: {', '.join(ratios)}."] if ratios else []
