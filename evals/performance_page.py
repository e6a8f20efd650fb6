"""docs/performance.md, from docs/performance.json and nothing else: the table of one whole run, its machine and command, where the
time of a step goes, what was tried and did not pay.

`python -m evals.speed --page` measures and writes both; `python -m evals.performance_page` writes the page again. `tried` in the JSON is
written by hand, as `{"what": ..., "found": ...}`, and stays when the rest is measured again.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evals.benchmarks.rows import Row, lines
from evals.benchmarks.sides import ROOT, Bench
from evals.tables import write_property

PAGE = ROOT / "docs" / "performance.md"
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "mergekit", "tokenizers")


def record(
    rows: Sequence[Row], profiles: Mapping[str, Any], command: Sequence[str], bench: Bench, page: Path = PAGE
) -> dict[str, Any]:
    """All that the page says. profiles: training_sides' by what was trained."""
    from upcycle.machine import describe

    before = json.loads(page.with_suffix(".json").read_text()) if page.with_suffix(".json").exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python -m evals.speed", *command]),
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": describe() | dict(bench.known.get("limits", {})),
        "versions": {name: version(name) for name in LIBRARIES},
        "rounds": bench.rounds,
        "threads": bench.threads,
        "rows": [row.to_dict() for row in rows],
        "profiles": dict(profiles),
        "tried": before.get("tried", []),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The whole page."""
    rows = [Row(**row) for row in found["rows"]]
    aimed = [row for row in rows if row.target is not None]
    reached = sum(row.met is True for row in aimed)
    parts = [
        "# Performance",
        f"`{found['command']}`, {found['date']}, commit {found['commit'][:12]}: {reached} of {len(aimed)} ratios with a target are reached. Generated from "
        "performance.json by `python -m evals.performance_page`.",
        f"*{_machine(found)}*",
        "Each side runs in processes of its own, in turn with the other; `ours` and `peer` are medians over rounds, warm-up steps left out, `spread` the lowest and "
        "the highest ratio of a round. A ratio above 1 means that ours is better, but for memory_logits, where it is ours / peer. Peers are held against ours: the "
        "same logits and first loss, or the same tensors; one that fails is not scored. Training is in bf16 autocast over fp32 weights, 4,096 tokens a step.",
        *_sections(found, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(found: Mapping[str, Any]) -> str:
    machine = dict(found["machine"])
    limits = [f"{what} {machine.pop(name) / 1e9:.1f} G{unit}" for name, what, unit in LIMITS if name in machine]
    told = [write_property(key, value) for key, value in machine.items()]
    threads = "threads as torch chooses" if found["threads"] is None else f"threads {found['threads']}"
    versions = [f"{name} {number}" for name, number in found["versions"].items()]
    return f"Machine: {', '.join([*told, *limits])}. {threads}, rounds {found['rounds']}. {', '.join(versions)}."


LIMITS = (("matmul", "matrix products in bf16", "FLOP/s"), ("memory", "copying in memory", "B/s"))


def _sections(found: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    scaling = [row for row in rows if row.name.startswith("scaling")]
    yield table([row for row in rows if row not in scaling])
    if scaling:
        yield "## Scaling"
        yield "The exponent with which a figure grows over one size, measured (ours) and by cost.py (peer)."
        yield table(scaling)
    if found["profiles"]:
        yield "## Where the time goes"
        yield from (_profile(name, one) for name, one in found["profiles"].items())
    if found["tried"]:
        yield "## Tried, and did not pay"
        yield "\n".join(f"- **{one['what']}**: {one['found']}" for one in found["tried"])


def table(rows: Sequence[Row]) -> str:
    titles, *cells = lines(rows)
    right = {"ours", "peer", "ratio", "target"}
    rule = ["---:" if title in right else "---" for title in titles]
    return "\n".join(f"| {' | '.join(one)} |" for one in [titles, rule, *cells])


def _profile(name: str, found: Mapping[str, Any]) -> str:
    head = [
        f"**{name}**: {found['seconds']:.2f} s a step in operators of their own.",
        "",
        "| operator | share | calls a step |",
    ]
    shares = [f"| `{operator}` | {share:.1%} | {count} |" for operator, share, count in found["operators"]]
    return "\n".join([*head, "| --- | ---: | ---: |", *shares])


def write_page(found: Mapping[str, Any], page: Path) -> None:
    """The JSON and, from it, the page."""
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    page.write_text(markdown(json.loads(page.with_suffix(".json").read_text())))


if __name__ == "__main__":
    PAGE.write_text(markdown(json.loads(PAGE.with_suffix(".json").read_text())))
