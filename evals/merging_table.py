"""The table of docs/merging.md: methods down, what they are used for across, from what several runs of experiment=merging say.

`python -m evals.merging_table` writes it into the page from docs/merging.json (upcycle replicates RUN RUN ... --json=docs/merging.json).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.replicates import paired
from evals.tables import replace_block, write_perplexity

PAGE = Path(__file__).resolve().parent.parent / "docs" / "merging.md"
USES = {
    "dense": "{}",
    "BTX, start": "btx_{}_start",
    "BTX, trained": "btx_{}",
    "BAM, start": "bam_{}_start",
    "BAM, trained": "bam_{}",
}
AVERAGE = {
    "dense": "soup",
    "BTX, start": "btx_start",
    "BTX, trained": "btx",
    "BAM, start": "bam_start",
    "BAM, trained": "bam",
}


def model_of(method: str, use: str) -> str:
    return AVERAGE[use] if method == "average" else USES[use].format(method)


def markdown(summary: Mapping[str, Any], methods: Sequence[str], uses: Sequence[str] = tuple(USES)) -> str:
    """A cell: the mean trained perplexity over runs, and for trained mixtures the paired difference from the average."""
    rows = [["merge", *uses], ["---", *["---:"] * len(uses)]]
    for method in ["average", *methods]:
        cells = [method]
        for use in uses:
            name = model_of(method, use)
            text = _shown(float(np.mean(summary["trained_perplexity"][name])))
            if "trained" in use and method != "average" and (found := paired(summary, name, AVERAGE[use])):
                text += f" ({write_interval(found)})"
            cells.append(text)
        rows.append(cells)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    said = (
        f"*{what_is_meant(summary)} In brackets: nats per token, less those with the average, paired by run, with the 95 % interval of "
        "Student's t over runs.*"
    )
    return "\n".join([*lines, "", said])


def what_is_meant(summary: Mapping[str, Any]) -> str:
    domains, seeds = ", ".join(summary["domains"]), ", ".join(map(str, summary["rng_seeds"]))
    return f"Mean test perplexity over {domains}, over runs with rng_seed {seeds}."


def write_interval(difference: tuple[float, float, float]) -> str:
    """A difference in nats per token with its interval, as `paired` gives them."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)


def methods_of(summary: Mapping[str, Any]) -> list[str]:
    """The merges of the runs, from lowest trained BTX to highest."""
    averages = summary["trained_perplexity"]
    found = [name for name in averages if f"btx_{name}" in averages and f"bam_{name}_start" in averages]
    return sorted(found, key=lambda name: float(np.mean(averages[f"btx_{name}"])))


def _shown(perplexity: float) -> str:
    return write_perplexity(perplexity) if perplexity < 100_000 else f"{perplexity:.0e}"


def main() -> None:
    summary = json.loads(PAGE.with_suffix(".json").read_text())
    replace_block(PAGE, "table", "merging", markdown(summary, methods_of(summary)))


if __name__ == "__main__":
    main()
