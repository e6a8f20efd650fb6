"""The two tables of docs/camex.md on quality: CAMEx as a merge and as a layer, from what several runs of experiment=camex say.

`python -m evals.camex_table` writes them into the page from docs/camex.json (upcycle replicates RUN RUN ... --json=docs/camex.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from evals.merging_table import PAGE as MERGING_PAGE
from evals.merging_table import markdown, what_is_meant, write_interval
from evals.replicates import paired
from evals.tables import ABSENT, replace_block, write_cost, write_perplexity

PAGE = MERGING_PAGE.with_name("camex.md")
MERGES = ("fisher", "ties", "camex", "camex_fisher", "camex_kfac")
USES = ("dense", "BTX, trained", "BAM, trained")
ROUTED = ("btx_top1", "btx", "btx_soft", "btx_uniform")
MERGED = (
    "soft_merging", "camex_domain", "camex_ca", "camex_rank2", "camex_rank8", "camex_ties", "camex_dynamic", "camex_linear",
    "camex_mean", "camex_zeros",
)  # fmt: skip
AGAINST = ("btx_top1", "soft_merging")
TRAINING_BYTES = 16  # of a parameter: weight, gradient and two moments, in fp32


def merges(summary: Mapping[str, Any]) -> str:
    return markdown(summary, MERGES, USES)


def layers(summary: Mapping[str, Any]) -> str:
    """A row for each mixture of the same experts: its perplexity, paired differences, its size, and what came after the branches."""
    titles = [
        "mixture",
        "perplexity",
        *(f"less {name}" for name in AGAINST),
        "parameters",
        "active",
        "MB in training",
        "FLOPs",
        "seconds",
    ]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    branches = summary["costs"]["soup"]  # seed and branches, which all have in common
    for name in ROUTED + MERGED:
        costs = summary["costs"][name]
        cells = [name, write_perplexity(float(np.mean(summary["trained_perplexity"][name])))]
        for other in AGAINST:
            found = paired(summary, name, other) if name != other else None
            cells.append(write_interval(found) if found else ABSENT)
        cells += [write_cost(field, costs[field]) for field in ("parameters", "active_parameters")]
        cells.append(f"{costs['parameters'] * TRAINING_BYTES / 1e6:.0f}")
        cells += [write_cost(field, costs[field] - branches[field]) for field in ("train_flops", "seconds")]
        rows.append(cells)
    said = (
        f"*{what_is_meant(summary)} Less: nats per token, paired by run, with the 95 % interval of Student's t over runs. MB: weights, gradients and "
        "two moments in fp32. FLOPs and seconds: the mixture's own, mean over runs.*"
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", said])


def main() -> None:
    summary = json.loads(PAGE.with_suffix(".json").read_text())
    replace_block(PAGE, "table", "camex merges", merges(summary))
    replace_block(PAGE, "table", "camex layers", layers(summary))


if __name__ == "__main__":
    main()
