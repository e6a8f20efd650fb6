"""docs/performance.md, from docs/performance.json and nothing else: the table of one whole run, its machine and command, where the
time of a step goes, what was tried and did not pay.

`python -m evals.speed --page` measures and writes both; `python -m evals.performance_page` writes them again from the JSON and from
docs/performance_tried.json, which is written by hand. A run that was broken off leaves performance.json.partial, of the same form.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evals.benchmarks.rows import AT_MOST, TARGETS, Row, lines
from evals.benchmarks.sides import ROOT, Bench
from evals.tables import write_property

PAGE = ROOT / "docs" / "performance.md"
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "mergekit", "tokenizers")
TRIED = ("what", "found", "command")  # of each entry; `found` says figures
LIMITS = (("matmul", "matrix products in bf16", "FLOP/s"), ("memory", "copying in memory", "B/s"))


def begun(command: Sequence[str], threads: int | None, page: Path = PAGE) -> dict[str, Any]:
    """What the page says that is known before anything is measured. Raises ValueError: nothing is said of what was tried."""
    from upcycle.machine import describe

    return {
        "command": " ".join(["python -m evals.speed", *command]),
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": describe(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "threads": threads,
        "load_before": list(os.getloadavg()),
        "tried": tried(page),
    }


def record(
    start: Mapping[str, Any], rows: Sequence[Row], bench: Bench, profiles: Mapping[str, Any] | None = None,
    profiles_problem: str = "", figures: Sequence[Path] = (), page: Path = PAGE,
) -> dict[str, Any]:  # fmt: skip
    """All that the page says. start: of `begun`. profiles: training_sides' by what was trained."""
    return {
        **start,
        "machine": {**start["machine"], **bench.known.get("limits", {})},
        "load_after": list(os.getloadavg()),
        "rows": [row.to_dict() for row in rows],
        "profiles": dict(profiles or {}),
        "profiles_problem": profiles_problem,
        "figures": [os.path.relpath(path, page.parent) for path in figures],
    }


def tried(page: Path = PAGE) -> list[dict[str, str]]:
    """What was tried and did not pay, as somebody wrote it down. Raises ValueError."""
    file = page.with_name("performance_tried.json")
    entries = json.loads(file.read_text()) if file.exists() else []
    wanted = f"a list of {{{', '.join(TRIED)}}}, in words, figures in `found`"
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} says nothing of what was tried and did not pay; write {wanted}")
    for entry in entries:
        words = isinstance(entry, dict) and all(isinstance(entry.get(key), str) and entry[key].strip() for key in TRIED)
        if not words or not any(map(str.isdigit, entry["found"])):
            raise ValueError(f"{file} holds {json.dumps(entry)}; expected {wanted}")
    return entries


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def markdown(found: Mapping[str, Any]) -> str:
    """The whole page."""
    rows = [Row(**row) for row in found["rows"]]
    parts = [
        "# Performance",
        f"`{found['command']}`, {found['date']}, commit {found['commit']}. Generated from performance.json by `python -m evals.performance_page`.",
        " ".join(_summary(rows)),
        f"*{_machine(found)}*",
        "Each side runs in processes of its own, in turn with the other; `ours` and `peer` are medians over `rounds`, warm-up steps left out, `spread` the lowest and "
        f"the highest ratio of a round. A ratio above 1 means that ours is better, but for {' and '.join(sorted(AT_MOST))}, where it is ours / peer. `checked` says in "
        "what ours and its peer were found to be the same, – that this was not looked at; where they differ, or one failed, nothing is scored. Training is in bf16 autocast over fp32 weights, 4,096 "
        "tokens a step.",
        *_sections(found, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    """What is reached, what is furthest from it, and what is not there."""
    aimed = [row for row in rows if row.target is not None]
    scored = [row for row in aimed if row.ratio is not None]
    yield f"{sum(row.met is True for row in aimed)} of {len(aimed)} ratios with a target are reached."
    if scored:
        last = min(scored, key=_share)
        what = "Nearest to missing its target" if last.met else "The largest gap that remains"
        sign = "at most" if last.name in AT_MOST else "at least"
        yield f"{what}: {last.name} ({last.case}), a ratio of {last.ratio:.2f} where {sign} {last.target:g} is to be reached."
    if failed := [f"{row.name} ({row.case})" for row in aimed if row.ratio is None]:
        yield f"Not compared: {', '.join(failed)}."
    if missing := [name for name in TARGETS if name not in {row.name for row in rows}]:
        yield f"Not measured: {', '.join(missing)}."


def _share(row: Row) -> float:
    """How much of its target a row reaches; below 1 it is missed."""
    assert row.ratio is not None and row.target is not None
    return row.target / row.ratio if row.name in AT_MOST else row.ratio / row.target


def _machine(found: Mapping[str, Any]) -> str:
    machine = dict(found["machine"])
    limits = [f"{what} {machine.pop(name) / 1e9:.1f} G{unit}" for name, what, unit in LIMITS if name in machine]
    told = [write_property(key, value) for key, value in machine.items()]
    threads = "threads as torch chooses" if found["threads"] is None else f"threads {found['threads']}"
    versions = [f"{name} {number}" for name, number in found["versions"].items()]
    before, after = (", ".join(f"{one:.2f}" for one in found[f"load_{when}"]) for when in ("before", "after"))
    load = f"Load over 1, 5 and 15 minutes before the start {before}, at the end {after}"
    return f"Machine: {', '.join([*told, *limits])}. {threads}. {load}. {', '.join(versions)}."


def _sections(found: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    scaling = [row for row in rows if row.name.startswith("scaling")]
    yield table([row for row in rows if row not in scaling])
    if compiled := [row for row in rows if row.name in COMPILED]:
        yield "## Compiled"
        yield _compiled(compiled)
    if scaling:
        yield "## Scaling"
        yield "The exponent with which a figure grows over one size: measured (ours) and predicted (peer); the remark says by what."
        yield table(scaling)
        yield from (f"![{Path(figure).stem.replace('_', ' ')}]({figure})" for figure in found["figures"])
    if found["profiles"] or found["profiles_problem"]:
        yield "## Where the time goes"
        yield from (_profile(name, one) for name, one in found["profiles"].items())
        if found["profiles_problem"]:
            yield f"Not measured: {_cell(found['profiles_problem'])}"
    yield "## Tried, and did not pay"
    yield "\n".join(f"- **{one['what']}**: {one['found']} (`{one['command']}`)" for one in found["tried"])


COMPILED = {"train_btx_compiled": "against dense, compiled too", "train_btx_compile_gain": "against ours uncompiled"}


def _compiled(rows: Sequence[Row]) -> str:
    """Both things that compiling is to reach, in one line a case: one alone says little."""
    head = ["case", *(f"{against} ({name})" for name, against in COMPILED.items()), "both reached"]
    cells = [head, ["---"] * len(head)]
    for case in dict.fromkeys(row.case for row in rows):
        both = [next((row for row in rows if (row.case, row.name) == (case, name)), None) for name in COMPILED]
        told = [f"{row.ratio:.2f}, to be at least {row.target:g}" if row and row.ratio else "–" for row in both]
        reached = {row.met if row else None for row in both}
        cells.append([case, *told, "no" if False in reached else "–" if None in reached else "yes"])
    return _written(cells)


def table(rows: Sequence[Row]) -> str:
    titles, *cells = lines(rows)
    right = {"ours", "peer", "ratio", "target", "rounds"}
    rule = ["---:" if title in right else "---" for title in titles]
    return _written([titles, rule, *cells])


def _written(cells: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, one))} |" for one in cells)


def _cell(text: str) -> str:
    """Of a Markdown table: one line, and nothing in it that ends a cell or begins a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _profile(name: str, found: Mapping[str, Any]) -> str:
    head = f"**{name}**: {found['seconds']:.2f} s a step in operators of their own."
    shares = [[f"`{operator}`", f"{share:.1%}", str(count)] for operator, share, count in found["operators"]]
    return f"{head}\n\n" + _written([["operator", "share", "calls a step"], ["---", "---:", "---:"], *shares])


def partial(found: Mapping[str, Any], page: Path) -> Path:
    """The JSON of a run that goes on: it is whole at any time, and the last run's stays."""
    file, new = page.with_suffix(".json.partial"), page.with_suffix(".json.new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    return new.replace(file)


def write_page(found: Mapping[str, Any], page: Path) -> None:
    """The JSON and, from it, the page."""
    partial(found, page).replace(page.with_suffix(".json"))
    page.write_text(markdown(json.loads(page.with_suffix(".json").read_text())))


if __name__ == "__main__":
    write_page(json.loads(PAGE.with_suffix(".json").read_text()) | {"tried": tried()}, PAGE)
