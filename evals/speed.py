"""`python -m evals.speed [GROUP|BENCHMARK ...]`: training, memory, decoding, assembly, data, ranks and start against their peers.

Each side runs in processes of its own, in turn with what it is compared with; a peer that fails, or computes something else,
is reported and not scored. Without names all groups run but `scaling`. `--json FILE` writes the rows, `--quick` runs everything in
tiny sizes, which says nothing about speed. `--page` measures all, with profiles, and writes docs/performance.json and .md; until the
end, docs/performance.json.partial holds what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.benchmarks import assembly, data, decoding, memory, ranks, scaling, start, training
from evals.benchmarks.rows import Row, lines, unscored
from evals.benchmarks.sides import Bench, SideFailed
from evals.performance_page import PAGE, begun, partial, record, write_page
from upcycle.config import nearest

Benchmark = Callable[[Bench], Iterator[Row]]
GROUPS: dict[str, Mapping[str, Benchmark]] = {
    "training": training.BENCHMARKS,
    "memory": memory.BENCHMARKS,
    "decoding": decoding.BENCHMARKS,
    "assembly": assembly.BENCHMARKS,
    "data": data.BENCHMARKS,
    "ranks": ranks.BENCHMARKS,
    "start": start.BENCHMARKS,
    "scaling": scaling.BENCHMARKS,
}
BY_NAME_ONLY = ("scaling",)
QUICK = "QUICK: sizes that only show that everything runs; the figures mean nothing and are not to be published"
FIGURES = Path("performance")  # of scaling, where --figures names no other folder
IDLE = 0.5  # processes that want to run, on average over a minute: more of them disturb what is measured


def chosen(names: Sequence[str]) -> dict[str, Benchmark]:
    """The benchmarks of groups, or by their own names. Raises ValueError: there is none of that name."""
    all_of_them = {name: one for group in GROUPS.values() for name, one in group.items()}
    found: dict[str, Benchmark] = {}
    for name in names or [group for group in GROUPS if group not in BY_NAME_ONLY]:
        if name not in GROUPS and name not in all_of_them:
            valid = [*GROUPS, *all_of_them]
            raise ValueError(
                f"{name} is no group and no benchmark; expected one of {', '.join(valid)}{nearest(name, valid)}"
            )
        found |= GROUPS.get(name) or {name: all_of_them[name]}
    return found


def run(benchmarks: Mapping[str, Benchmark], bench: Bench, keep: Callable[[list[Row]], None]) -> list[Row]:
    """All rows, each said as soon as it is there. keep: called with all so far after every row: a run takes long."""
    rows: list[Row] = []
    for name, benchmark in benchmarks.items():
        bench.say(f"{name} ...")
        for row in _scored(name, benchmark, bench):
            rows.append(row)
            keep(rows)
            cells = list(lines([row]))
            bench.say(", ".join(f"{title} {cell}" for title, cell in zip(*cells, strict=True) if cell))
    return rows


def _scored(name: str, benchmark: Benchmark, bench: Bench) -> Iterator[Row]:
    """A benchmark's rows; one that fails as a whole is a row of its own name."""
    try:
        yield from benchmark(bench)
    except SideFailed as error:
        yield unscored(name, "", "", str(error))


def printed(rows: Sequence[Row], title: str) -> Table:
    titles, *cells = lines(rows)
    table = Table(title=title, show_lines=False)
    for name in titles:
        table.add_column(name, justify="right" if name in ("ours", "peer", "ratio", "target") else "left")
    for row in cells:
        table.add_row(*map(Text, row))  # an error message may hold what rich takes for markup
    return table


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}, or one benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side measures")
    parser.add_argument("--threads", type=int, help="of every process; by default as many as torch takes by itself")
    parser.add_argument("--folder", type=Path, help="where the files are made that are read and written")
    parser.add_argument("--figures", type=Path, help=f"folder of the scaling group's plots; {FIGURES} by default")
    parser.add_argument("--page", action="store_true", help="write docs/performance.json and docs/performance.md")
    asked = parser.parse_args(given)
    if asked.page and (asked.quick or asked.names or asked.figures):
        parser.error("--page is of one whole run: leave --quick, --figures and the names of groups out")
    if asked.rounds < 1:
        parser.error(f"--rounds={asked.rounds}, expected at least 1")
    return asked


def write_json(asked: argparse.Namespace, rows: Sequence[Row]) -> None:
    if asked.json:
        asked.json.write_text(json.dumps([row.to_dict() | {"quick": asked.quick} for row in rows], indent=1) + "\n")


def finish_page(start: Mapping[str, Any], rows: Sequence[Row], bench: Bench, figures: Sequence[Path]) -> None:
    """Profiles, and the page; one that fails takes nothing of the rest with it."""
    partial(record(start, rows, bench, figures=figures, page=PAGE), PAGE)
    profiles, problem = {}, ""
    try:
        profiles = training.profiles(bench)
    except SideFailed as error:
        problem = str(error)
        bench.say(f"profiles: {problem}")
    write_page(record(start, rows, bench, profiles, problem, figures, PAGE), PAGE)


def main(given: Sequence[str] | None = None) -> int:
    """0; 1 if something could not be compared, 2 for an unknown name or a page that could not be written, 130 after Ctrl-C.

    A ratio that is not reached is no error.
    """
    asked, console, said = arguments(given), Console(width=200), Console(stderr=True)
    try:
        benchmarks = chosen(list(GROUPS) if asked.page else asked.names)
        start = begun(sys.argv[1:] if given is None else given, asked.threads, PAGE) if asked.page else {}
    except ValueError as error:
        print(f"evals.speed: {error}", file=sys.stderr)
        return 2
    if (load := os.getloadavg()[0]) > IDLE and not asked.quick:
        print(
            f"evals.speed: the load of this machine is {load:.2f}: what else runs disturbs the figures", file=sys.stderr
        )

    def keep(rows: list[Row]) -> None:
        write_json(asked, rows)
        if asked.page:
            partial(record(start, rows, bench, page=PAGE), PAGE)

    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="speed-") as folder, suppress(KeyboardInterrupt):
        bench = Bench(
            Path(folder), asked.quick, 1 if asked.quick else asked.rounds, asked.threads,
            say=lambda text: said.print(text, highlight=False, markup=False, soft_wrap=True),
        )  # fmt: skip
        rows = run(benchmarks, bench, keep)
        console.print(printed(rows, QUICK if asked.quick else "ours against its peers"))
        figures: list[Path] = []
        if curves := bench.known.get("curves"):
            figures = scaling.draw(curves, PAGE.with_suffix("") if asked.page else asked.figures or FIGURES)
            bench.say(f"figures: {', '.join(map(str, figures))}")
        if asked.page:
            finish_page(start, rows, bench, figures)
        return int(any(row.problem for row in rows))
    if asked.page:
        print(f"evals.speed: what was measured is in {PAGE.with_suffix('.json.partial')}", file=sys.stderr)
    return 130


if __name__ == "__main__":
    sys.exit(main())
