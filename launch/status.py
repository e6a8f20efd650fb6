"""`upcycle status` and `upcycle report`: what runs there are, how far they are, what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from upcycle.store import RECORD

RUNS = Path("runs")


def found_runs(names: list[str]) -> list[Path]:
    """The directories of the named runs, or of all runs here.

    Raises ValueError: a name without a manifest.
    """
    if not names:
        return sorted(path.parent for path in RUNS.glob("**/manifest.json"))
    found = [Path(name) if (Path(name) / "manifest.json").is_file() else RUNS / name for name in names]
    for name, path in zip(names, found, strict=True):
        if not (path / "manifest.json").is_file():
            have = ", ".join(str(run.relative_to(RUNS)) for run in found_runs([])) or "none"
            raise ValueError(f"{name}: no run of that name here (no {path / 'manifest.json'}); runs here: {have}")
    return found


def print_status(arguments: list[str]) -> int:
    """One line a run: how many of its stages are done, and the first that is not."""
    console = Console()
    try:
        runs = found_runs(arguments)
        if not runs:
            console.print("no runs here; `upcycle experiment=tiny` makes one")
        for run in runs:
            manifest = json.loads((run / "manifest.json").read_text())
            manifest.pop("budget", None)  # how the run's tokens were found; no stage
            store = Path(OmegaConf.load(run / "config.yaml")["artifacts"])
            missing = [stage for stage, artifact in manifest.items() if not (store / artifact / RECORD).is_file()]
            state = "finished" if not missing else f"next: {missing[0]}"
            count = f"{len(manifest) - len(missing)} of {len(manifest)} stages done"
            console.print(f"{run}  {count}, {state}", highlight=False)
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    return 0


def _report(run: Path) -> dict:
    if not (run / "report.json").is_file():
        raise ValueError(
            f"{run}: no report.json yet; run it to its end first (`upcycle status`); a run without domains has none"
        )
    return json.loads((run / "report.json").read_text())


def print_reports(arguments: list[str]) -> int:
    """Each named run's table (of all runs, without names), and of several named ones what they say of the models they share.

    --readme also writes the tables into README.md between their marks; --html=FILE the comparison as a page.
    """
    from evals.page_runs import render_runs
    from evals.runs import compare_runs, format_runs
    from evals.tables import format_table, update_readme
    from evals.task_table import format_tasks

    console = Console()
    try:
        names, readme, page = _report_arguments(arguments)
        reports = {str(run): _report(run) for run in found_runs(names)}
        for found in reports.values():
            text = "\n".join([format_table(found), *format_tasks(found)])
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            if readme:
                update_readme(found, Path("README.md"))
        if len(names) > 1:
            compared = compare_runs(reports)
            console.print(f"\n{format_runs(compared)}", highlight=False, markup=False, soft_wrap=True)
            if page is not None:
                page.write_text(render_runs(compared), encoding="utf-8")
                console.print(f"\n{page}: the same as a page", highlight=False, markup=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    return 0


def _report_arguments(arguments: list[str]) -> tuple[list[str], bool, Path | None]:
    """The runs that were named, whether the README is meant, and where a page should go."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    pages = [argument.removeprefix("--html=") for argument in arguments if argument.startswith("--html=")]
    readme = arguments.count("--readme")
    known = len(names) + len(pages) + readme == len(arguments) and len(pages) <= 1
    if not known or (pages and (len(names) < 2 or not pages[0].endswith(".html"))):
        raise ValueError(
            f"report: got {' '.join(arguments)}, expected [RUN ...] [--readme] [--html=OUT.html]; --html is of two runs at "
            "least (a run's own page is its report.html)"
        )
    return names, bool(readme), Path(pages[0]) if pages else None


def print_replicates(arguments: list[str]) -> int:
    """Spread and claims over the named runs; --readme writes them into README.md, --json=FILE keeps the figures."""
    from evals.replicates import markdown, summarise
    from evals.tables import replace_block
    from upcycle.durable import write_json

    try:
        names = [argument for argument in arguments if not argument.startswith("--")]
        if len(names) < 2:
            raise ValueError(f"replicates: got {len(names)} runs, expected at least two that differ in rng_seed")
        found = summarise([_report(run) for run in found_runs(names)])
        print(markdown(found))
        for argument in arguments:
            if argument == "--readme":
                replace_block(Path("README.md"), "replicates", "demo", markdown(found))
            elif argument.startswith("--json="):
                write_json(Path(argument.removeprefix("--json=")), found, sort_keys=False)
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    return 0
