"""`python -m evals.speed [GROUP|BENCHMARK ...]`: training, memory, decoding, assembly, data, ranks and start against their peers.

Each side runs in processes of its own, in turn with what it is compared with; a peer that fails, or computes something else,
is reported and not scored. Without names all groups run but `scaling`. `--json FILE` writes the rows, `--quick` runs everything in
tiny sizes, which says nothing about speed. `--page` measures all, with profiles, and writes docs/performance.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evals.benchmarks import assembly, data, decoding, memory, ranks, scaling, start, training
from evals.benchmarks.rows import Row, lines
from evals.benchmarks.sides import Bench
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
    """All rows, each said as soon as it is there. keep: called with all so far after every benchmark: a run takes long."""
    rows: list[Row] = []
    for name, benchmark in benchmarks.items():
        bench.say(f"{name} ...")
        for row in benchmark(bench):
            rows.append(row)
            cells = list(lines([row]))
            bench.say(", ".join(f"{title} {cell}" for title, cell in zip(*cells, strict=True) if cell))
        keep(rows)
    return rows


def printed(rows: Sequence[Row], title: str) -> Table:
    titles, *cells = lines(rows)
    table = Table(title=title, show_lines=False)
    for name in titles:
        table.add_column(name, justify="right" if name in ("ours", "peer", "ratio", "target") else "left")
    for row in cells:
        table.add_row(*row)
    return table


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}, or one benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side measures")
    parser.add_argument("--threads", type=int, help="of every process; by default as many as torch takes by itself")
    parser.add_argument("--folder", type=Path, help="where the files are made that are read and written")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the scaling group's plots")
    parser.add_argument("--page", action="store_true", help="write docs/performance.json and docs/performance.md")
    asked = parser.parse_args(given)
    if asked.page and (asked.quick or asked.names):
        parser.error("--page is of one whole run: leave --quick and the names of groups out")
    if asked.rounds < 1:
        parser.error(f"--rounds={asked.rounds}, expected at least 1")
    return asked


def write_json(asked: argparse.Namespace, rows: Sequence[Row]) -> None:
    if asked.json:
        asked.json.write_text(json.dumps([row.to_dict() | {"quick": asked.quick} for row in rows], indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> int:
    """0; 1 if something could not be compared, 2 for an unknown name. A ratio that is not reached is no error."""
    asked, console, said = arguments(given), Console(width=200), Console(stderr=True)
    try:
        benchmarks = chosen(list(GROUPS) if asked.page else asked.names)
    except ValueError as error:
        print(f"evals.speed: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="speed-") as folder, suppress(KeyboardInterrupt):
        bench = Bench(
            Path(folder), asked.quick, 1 if asked.quick else asked.rounds, asked.threads,
            say=lambda text: said.print(text, highlight=False, markup=False, soft_wrap=True),
        )  # fmt: skip
        rows = run(benchmarks, bench, lambda rows: write_json(asked, rows))
        profiles = training.profiles(bench) if asked.page else {}
        if curves := bench.known.get("curves"):
            bench.say(f"figures: {', '.join(map(str, scaling.draw(curves, asked.figures)))}")
        console.print(printed(rows, QUICK if asked.quick else "ours against its peers"))
        if asked.page:
            from evals.performance_page import PAGE, record, write_page

            write_page(record(rows, profiles, given or sys.argv[1:], bench), PAGE)
        return int(any(row.problem for row in rows))
    return 130


if __name__ == "__main__":
    sys.exit(main())
