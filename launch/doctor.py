"""`upcycle doctor`: the checks of evals/doctor.py on a mixture, or on every mixture of a run, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.status import RUNS, found_runs, read_manifest, read_settings

if TYPE_CHECKING:
    from evals.doctor_case import Case, Finding

EXPECTED = "DIR|RUN [--json] [--prove [NAME=DIR ...]]"
STYLES = {"ok": "green", "look": "yellow", "bad": "bold red"}
STATES = {"assembled": "assembled, not trained", "training": "training is not finished", "trained": "trained"}


def doctor(arguments: list[str]) -> int:
    """0, or 1 if something is bad; 2 for what the user can mend."""
    options = {argument for argument in arguments if argument.startswith("--")}
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument and argument not in options)
    names = [argument for argument in arguments if argument not in options and "=" not in argument]
    if len(names) != 1 or not options <= {"--json", "--prove"} or (given and "--prove" not in options):
        print(f"upcycle: doctor: got {' '.join(arguments) or 'nothing'}, expected {EXPECTED}", file=sys.stderr)
        return 2
    from transformers.utils import logging

    logging.disable_progress_bar()
    from evals.doctor import examine, prove_again, worst
    from evals.doctor_case import to_json

    console = Console()
    try:
        seen = []
        found = cases(names[0])
        for case in found:
            if "--prove" in options:
                prove_again(case, {name: Path(path) for name, path in given.items()})
            seen.append((case, examine(case)))
            if "--json" not in options:
                show(case, seen[-1][1], console, every=len(found) == 1)
    except (ValueError, OSError) as error:
        print(f"upcycle: {error}", file=sys.stderr)
        return 2
    if "--json" in options:
        print(json.dumps([to_json(*one) for one in seen], indent=1))
    elif len(seen) > 1:
        show_counts([(case, worst(findings)) for case, findings in seen], console)
    return int(any(worst(findings) == "bad" for _, findings in seen))


def cases(name: str) -> list[Case]:
    """The mixture in a directory, or those of a run: trained ones, those in training, and those only assembled.

    Raises ValueError: neither a directory with a mixture nor a run; a run without a mixture so far.
    """
    from evals.doctor_case import read_case

    is_run = any((path / "manifest.json").is_file() for path in (Path(name), RUNS / name))
    if not is_run:
        if not Path(name).is_dir():
            found_runs([name])  # says which runs there are
        return [read_case(Path(name))]
    (run,) = found_runs([name])
    manifest, settings = read_manifest(run), read_settings(run)
    store, found = _store(run, settings["artifacts"]), []
    for stage, artifact in manifest.items():
        kind, _, mixture = stage.partition("/")
        if kind != "assemble" or not (store / artifact / "config.json").is_file():
            continue
        trained = store / manifest.get(f"mix/{mixture}", artifact)
        partial = trained.with_name(f"{trained.name}.partial")
        if trained.is_dir():
            found.append(read_case(trained))
        elif (partial / "metrics.jsonl").is_file():
            own = settings["mixtures"][mixture]
            # The tokens of a matched one are the recipe's to work out (launch.matching), and not among the settings.
            train = own["train"] if own.get("match", "none") == "none" else None
            found.append(read_case(partial, f"mix/{mixture}", train, store / artifact))
        else:
            found.append(read_case(store / artifact))
    if not found:
        raise ValueError(f"{run}: none of its mixtures is assembled yet; `upcycle status` says how far it is")
    return found


def _store(run: Path, artifacts: str) -> Path:
    """The run's artifacts, as seen from here; else from where runs/ lies."""
    return next(
        (path for path in (Path(artifacts), run.absolute().parent.parent / artifacts) if path.is_dir()), Path(artifacts)
    )


def show(case: Case, findings: list[Finding], console: Console, every: bool = True) -> None:
    """A mixture's table, of what is not ok only unless `every`, and under it what to do."""
    from evals.doctor import worst

    verdict = worst(findings)
    title = Text.assemble(f"{case.directory}: {_state(case)}: ", (verdict, STYLES[verdict]))
    console.print(title, soft_wrap=True)
    shown = [finding for finding in findings if every or finding.verdict != "ok"]
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("", "check", "found", "compared with"):
        table.add_column(column, no_wrap=column in ("", "check"), overflow="fold")
    for finding in shown:
        style = STYLES[finding.verdict]
        table.add_row(Text(finding.verdict, style), finding.check, Text(finding.said), Text(finding.threshold))
    if shown:
        console.print(table, highlight=False)
    advice = dict[str, list[str]]()
    for finding in shown:
        if finding.do:
            advice.setdefault(finding.do, []).append(finding.check)
    for do, checks in advice.items():
        console.print(Text(f"-> {', '.join(checks)}: {do}"), soft_wrap=True)


def show_counts(seen: list[tuple[Case, str]], console: Console) -> None:
    """How many mixtures have which verdict."""
    counts = {verdict: [worst for _, worst in seen].count(verdict) for verdict in ("bad", "look", "ok")}
    console.print(Text(", ".join(f"{count} {verdict}" for verdict, count in counts.items())))


def _state(case: Case) -> str:
    from upcycle.explain import read_json

    record = read_json(case.directory / "assembly.json") or {}
    changes = [*record.get("edits", []), record.get("folded", {})]
    before = [change["trained_before"] for change in changes if "trained_before" in change]
    return f"changed after its training ({before[-1]})" if before and case.state == "assembled" else STATES[case.state]
