"""`upcycle status` and `upcycle report`: what runs there are, how far they are, what they found."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from upcycle.durable import read_object, reading
from upcycle.store import RECORD

RUNS, README = Path("runs"), Path("README.md")
AGAIN = "start that run again with its command, which writes the file anew"
OF_REPORT = (
    "experiment", "split", "sequence_length", "domains", "domain_groups", "documents", "models", "baseline", "provenance",
)  # fmt: skip
OF_MODEL = ("kind", "perplexity", "average", "tokens")


def found_runs(names: list[str]) -> list[Path]:
    """The directories of the named runs, or of all runs here.

    Raises ValueError: a name without a manifest.
    """
    if not names:
        return sorted(path.parent for path in RUNS.glob("**/manifest.json"))
    return [_found(name) for name in names]


def _found(name: str) -> Path:
    for path in _places(name):
        if (path / "manifest.json").is_file():
            return path
    have = ", ".join(str(run.relative_to(RUNS)) for run in found_runs([])) or "none"
    where = " or ".join(str(path) for path in _places(name))
    raise ValueError(f"{name}: no run of that name here (no manifest.json in {where}); runs here: {have}")


def _places(name: str) -> list[Path]:
    return [Path(name)] if Path(name).parts[:1] == RUNS.parts else [Path(name), RUNS / name]


def is_sweep(place: Path) -> bool:
    return any(place.glob("*/point.json"))


def _sweep(name: str) -> Path | None:
    """The directory of the sweep that a name means, if there is one."""
    return next(filter(is_sweep, _places(name)), None)


def read_manifest(run: Path) -> dict[str, str]:
    """The artifact of every stage. Raises ValueError: the file is damaged."""
    path = run / "manifest.json"
    found = read_object(path, fix=AGAIN)
    found.pop("budget", None)  # how the run's tokens were found; no stage
    with reading(path, AGAIN):
        if wrong := [stage for stage, artifact in found.items() if not isinstance(artifact, str)]:
            raise ValueError(f"{wrong[0]}={found[wrong[0]]!r}, expected the name of an artifact")
    return found


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run, as composed. Raises ValueError: the file is missing or damaged."""
    path = run / "config.yaml"
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of OmegaConf, of PyYAML, of the file
        raise ValueError(f"{path}: not whole YAML ({' '.join(str(error).split())}); {AGAIN}") from None
    if not isinstance(found, dict) or not isinstance(found.get("artifacts"), str):
        raise ValueError(f"{path}: no settings of a run; {AGAIN}")
    return {str(key): value for key, value in found.items()}


def print_status(arguments: list[str]) -> int:
    """One line a run: how many of its stages are done, and the first that is not; of one that cannot be read, why. Of a run that is named alone also
    a line a stage; of a sweep that is named a line a point."""
    console, code = Console(), 0
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a pipe has no width; a line a stage or point must stay one
    try:
        places = [_sweep(name) or _found(name) for name in arguments] or found_runs([])
    except ValueError as error:
        return _refused(error)
    if not places:
        console.print("no runs here; `upcycle experiment=tiny` makes one")
    for place in places:
        try:
            if (place / "manifest.json").is_file():
                console.print(f"{place}  {_state(place)}", highlight=False, markup=False, soft_wrap=True)
                if len(arguments) == 1:
                    _print_stages(place, console)
            if arguments and is_sweep(place):
                _print_points(place, console)
        except (ValueError, OSError, RuntimeError) as error:
            code = _refused(error)
    return code


def _state(run: Path) -> str:
    manifest, store = read_manifest(run), Path(read_settings(run)["artifacts"])
    missing = [stage for stage, artifact in manifest.items() if not (store / artifact / RECORD).is_file()]
    count = f"{len(manifest) - len(missing)} of {len(manifest)} stages done"
    return f"{count}, {f'next: {missing[0]}' if missing else 'finished'}"


def _print_stages(run: Path, console: Console) -> None:
    from rich.table import Table

    from launch.follow import stage_states

    rows = stage_states(run, read_manifest(run), Path(read_settings(run)["artifacts"]))
    table, submitted = Table.grid(padding=(0, 2)), any(row.job for row in rows)
    for row in rows:
        table.add_row(f"  {row.stage}", *([row.job] if submitted else []), Text(row.said))
    console.print(table, highlight=False, soft_wrap=True)


def _print_points(sweep: Path, console: Console) -> None:
    from rich.table import Table

    from launch.sweep import point_rows, points_of
    from launch.sweep_jobs import table_state

    rows = point_rows(points_of(sweep))
    states = Counter(state for _, _, state, *_ in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print(f"{sweep}  {len(rows)} points: {counts}", highlight=False, markup=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for number, *others in rows:
        table.add_row(f"  {number}", *map(Text, others))
    console.print(table, highlight=False, soft_wrap=True)
    console.print(f"  table: {table_state(sweep)}", highlight=False, markup=False, soft_wrap=True)


def print_cancelled(arguments: list[str]) -> int:
    """Take the jobs of one run or sweep out of Slurm's queue."""
    from launch.scheduler import cancel
    from launch.sweep import points_of
    from launch.sweep_jobs import cancel_sweep

    try:
        if len(arguments) != 1:
            raise ValueError(
                f"cancel: got {' '.join(arguments) or 'nothing'}, expected one run or sweep: upcycle cancel NAME"
            )
        (name,) = arguments
        place = _sweep(name) or _found(name)
        points = [point.where for point in points_of(place)] if is_sweep(place) else []
        runs = [place, *points] if (place / "manifest.json").is_file() else points
        taken, left = cancel_sweep(place, runs) if points else cancel(runs)
    except (ValueError, OSError, RuntimeError) as error:
        return _refused(error)
    others = f" ({len(left)} that other runs need stay there)" if left else ""
    if taken or left:
        print(f"{place}: {len(taken)} jobs cancelled{others}; the same command submits what is missing")
    else:
        print(f"{place}: no job of it is in the queue")
    return 0


def print_sweep(arguments: list[str]) -> int:
    """Write and print a sweep's table again."""
    from launch.sweep import write_tables

    try:
        if len(arguments) != 1:
            raise ValueError(f"sweep: got {' '.join(arguments) or 'nothing'}, expected one: upcycle sweep NAME")
        text, failed = write_tables(_sweep(arguments[0]) or RUNS / arguments[0])
    except (ValueError, OSError, RuntimeError) as error:
        return _refused(error)
    print(text)
    return 2 if failed else 0


def _refused(error: Exception) -> int:
    print(f"upcycle: {error}", file=sys.stderr)
    return 2


def _report(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{run}: no report.json yet; run it to its end first (`upcycle status`); a run without domains has none"
        )
    found = read_object(path, *OF_REPORT, fix=AGAIN)
    with reading(path, AGAIN):
        for name, model in found["models"].items():
            if lacking := [key for key in OF_MODEL if key not in model]:
                raise ValueError(f"{name} lacks {lacking[0]}")
    return found


def _table(run: str, report: Mapping[str, Any]) -> str:
    from evals.tables import format_table
    from evals.task_table import format_tasks

    with reading(Path(run) / "report.json", AGAIN):
        return "\n".join([format_table(report), *format_tasks(report)])


def _named_or_newest(names: list[str]) -> list[Path]:
    """The named runs, each once; without names the one whose report is newest."""
    runs = found_runs(names)
    if not names:
        reported = [run for run in runs if (run / "report.json").is_file()]
        if not reported:
            raise ValueError("report: no run here has a report.json yet; `upcycle status` says how far they are")
        return [max(reported, key=lambda run: (run / "report.json").stat().st_mtime)]
    places = [run.resolve() for run in runs]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{name}: named twice, expected different runs; name each once")
    return runs


def print_reports(arguments: list[str]) -> int:
    """Each named run's table (the newest finished run's, without names), and of several what they say of the models they share.

    --readme also writes the tables into README.md between their marks; --html=FILE the comparison as a page. What is refused
    prints and writes nothing.
    """
    from evals.page_runs import render_runs
    from evals.runs import compare_runs, format_runs
    from evals.tables import update_readme

    console = Console()
    try:
        names, readme, page = _report_arguments(arguments)
        reports = {str(run): _report(run) for run in _named_or_newest(names)}
        told = [_table(run, report) for run, report in reports.items()]
        compared = compare_runs(reports) if len(reports) > 1 else None
        for report in reports.values() if readme else ():
            update_readme(report, README)
        if compared is not None:
            told.append(f"\n{format_runs(compared)}")
        if compared is not None and page is not None:
            page.write_text(render_runs(compared), encoding="utf-8")
            told.append(f"\n{page}: the same as a page")
    except (ValueError, OSError) as error:
        return _refused(error)
    for text in told:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _report_arguments(arguments: list[str]) -> tuple[list[str], bool, Path | None]:
    """The runs that were named, whether the README is meant, and where a page should go."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    pages = [argument.removeprefix("--html=") for argument in arguments if argument.startswith("--html=")]
    readme = arguments.count("--readme")
    if len(names) + len(pages) + readme != len(arguments) or len(pages) > 1:
        raise ValueError(f"report: got {' '.join(arguments)}, expected [RUN ...] [--readme] [--html=OUT.html]")
    if pages:
        _check_page(names, Path(pages[0]))
    if readme:
        _check_readme()
    return names, bool(readme), Path(pages[0]) if pages else None


def _check_page(names: list[str], page: Path) -> None:
    if len(names) < 2:
        raise ValueError(
            f"--html={page}: got {len(names)} runs, expected two at least; a run's own page is its report.html"
        )
    if page.suffix != ".html":
        raise ValueError(f"--html={page}: expected a name that ends in .html; give it one")
    if not page.absolute().parent.is_dir():
        raise ValueError(f"--html={page}: there is no directory {page.absolute().parent}; make it, or write elsewhere")


def _check_readme() -> None:
    if not README.is_file():
        raise ValueError(f"--readme: there is no {README.absolute()}; start it where the README.md to be written lies")


def print_replicates(arguments: list[str]) -> int:
    """Spread and claims over the named runs; --readme writes them into README.md, --json=FILE keeps the figures; --against=MODEL,...
    adds paired differences from these."""
    from evals.replicates import markdown, summarise
    from evals.tables import replace_block
    from upcycle.durable import write_json

    try:
        names = [argument for argument in arguments if not argument.startswith("--")]
        runs = found_runs(names) if names else []
        if len(runs) < 2:
            got = f"{names[0]} alone" if names else "no run"
            raise ValueError(
                f"replicates: got {got}, expected at least two runs that differ in rng_seed: upcycle replicates RUN RUN ..."
            )
        if "--readme" in arguments:
            _check_readme()
        found = summarise([_report(run) for run in runs])
        against = [one for word in arguments if word.startswith("--against=") for one in word[10:].split(",")]
        print(markdown(found, against))
        for argument in arguments:
            if argument == "--readme":
                replace_block(README, "replicates", "demo", markdown(found))
            elif argument.startswith("--json="):
                write_json(Path(argument.removeprefix("--json=")), found, sort_keys=False)
    except (ValueError, OSError) as error:
        return _refused(error)
    return 0
