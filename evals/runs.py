"""Several runs side by side, from their reports: the models they share, and the settings they differ in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evals.evidence import first_names
from evals.tables import ABSENT, average_title, shown_groups, write_perplexity, write_signed

FEW, WIDE = 8, 100  # settings named on a terminal; characters of one's line
NOT_SETTINGS = ("name", "artifacts", "plan", "stage", "out", "dry_run")  # of a run's config: where things go


def compare_runs(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What runs say of the models they all have; JSON-serialisable.

    reports: run -> its report.json, two at least; the first is what the others are held against. `groups`: the averages
    whose domains are the same in all runs. `models`: model -> group -> run -> `nats_per_token`, `perplexity`, `interval`
    and `difference`, nats per token less the first run's. `settings`: path -> run -> value, where runs differ.
    Raises ValueError: test sets differ, or no model is in all of them.
    """
    if len(reports) < 2:
        raise ValueError(f"comparison: got {len(reports)} runs, expected at least two different ones; name another")
    (first, expected), *others = reports.items()
    for name, report in others:
        _check_same_test(first, expected, name, report)
    shared = [model for model in expected["models"] if all(model in report["models"] for report in reports.values())]
    if not shared:
        raise ValueError(
            f"comparison: no model is in all of {', '.join(reports)} ({first} has {first_names(list(expected['models']))}); "
            "expected at least one of the same name; compare runs of one experiment"
        )
    groups = {
        group: members
        for group, members in shown_groups(expected).items()
        if all(report["domain_groups"].get(group) == members for report in reports.values())
    }
    return {
        "runs": list(reports),
        "split": expected["split"],
        "sequence_length": expected["sequence_length"],
        "tokens": _tokens(expected),
        "domain_groups": groups,
        "models": {
            model: {group: _average({run: report["models"][model]["average"][group] for run, report in reports.items()})
                    for group in groups}
            for model in shared
        },
        "only_in": {run: [model for model in report["models"] if model not in shared] for run, report in reports.items()},
        "commits": {run: report["provenance"].get("commit") for run, report in reports.items()},
        "settings": _differences(reports),
    }  # fmt: skip


def _average(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """One model's average in every run, and its difference to the first run's."""
    base = next(iter(found.values()))["nats_per_token"]
    return {run: dict(average) | {"difference": average["nats_per_token"] - base} for run, average in found.items()}


def _tokens(report: Mapping[str, Any]) -> dict[str, int]:
    """Test tokens of every domain; all models of a report have the same."""
    return next(iter(report["models"].values()))["tokens"]


def _check_same_test(first: str, expected: Mapping[str, Any], name: str, report: Mapping[str, Any]) -> None:
    """Raise ValueError unless both reports are of the same test set."""
    for what in ("split", "sequence_length", "domains"):
        _check(first, expected[what], name, report[what], what)
    for domain in expected["domains"]:
        _check(first, expected["documents"][domain], name, report["documents"][domain], f"test documents of {domain}")
        _check(first, _tokens(expected)[domain], name, _tokens(report)[domain], f"test tokens of {domain}")
    _check(
        first, expected["domain_groups"]["trained"], name, report["domain_groups"]["trained"], "domains trained on"
    )  # fmt: skip


def _check(first: str, expected: Any, name: str, got: Any, what: str) -> None:
    if got != expected:
        raise ValueError(
            f"comparison: {name} has {what} {_words(got)}, expected {_words(expected)} as {first} has; perplexities on unlike "
            "test sets do not compare: give both runs the same domains, data, tokenizer and eval settings, or name one run"
        )


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _differences(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings that differ, by path; a run without a setting, or a report of an earlier version, has None there."""
    configs = {run: report["provenance"].get("config", {}) for run, report in reports.items()}
    return {path: values for path, values in _unlike("", configs) if path not in NOT_SETTINGS}


def _unlike(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings at and below a path that differ; one entry for a whole group, such as a mixture, that some runs have none of."""
    groups = [run for run, value in values.items() if isinstance(value, Mapping)]
    if len(groups) == len(values):
        for key in dict.fromkeys(key for value in values.values() for key in value):
            below = {run: value.get(key) for run, value in values.items()}
            yield from _unlike(f"{path}.{key}" if path else key, below)
    elif groups and all(value is None for run, value in values.items() if run not in groups):
        yield path, {run: f"only in {', '.join(groups)}" if run in groups else None for run in values}
    elif any(value != next(iter(values.values())) for value in values.values()):
        yield path, dict(values)


def run_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows as text: model and average × runs, and each run's difference to the first."""
    first, *others = found["runs"]
    rows = [["model", "average", *found["runs"], *(f"{run} − {first}" for run in others)]]
    for model, groups in found["models"].items():
        for group, runs in groups.items():
            shown = [write_interval(average) for average in runs.values()]
            rows.append(
                [model, average_title(found, group), *shown, *(write_signed(runs[r]["difference"]) for r in others)]
            )
    return rows


def write_interval(average: Mapping[str, Any]) -> str:
    """`13.85 [13.51, 14.19]`."""
    low, high = average["interval"]
    return f"{write_perplexity(average['perplexity'])} [{write_perplexity(low)}, {write_perplexity(high)}]"


def note(found: Mapping[str, Any]) -> str:
    """What the numbers are."""
    alone = "; ".join(f"{run}: {', '.join(names)}" for run, names in found["only_in"].items() if names)
    return (
        f"{found['split'].capitalize()} perplexity [its 95% interval over documents] of the models that all runs have, on the same "
        "test sets; differences in nats per token (below 0: better than the first run). An interval is of one run's model "
        f"alone: the spread between runs is not in it.{f' Not in all runs: {alone}.' if alone else ''}"
    )


def format_runs(found: Mapping[str, Any]) -> str:
    """The comparison for a terminal, and the first settings that differ."""
    rows = run_rows(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "─" * (sum(widths) + 2 * len(widths) - 2))
    settings = [line for path, values in list(found["settings"].items())[:FEW] for line in _setting_lines(path, values)]
    if (more := len(found["settings"]) - FEW) > 0:
        settings.append(f"and {more} more")
    told = ["", f"Settings that differ ({' | '.join(found['runs'])}):", *settings] if settings else []
    return "\n".join([*lines, "", note(found), *told])


def _setting_lines(path: str, values: Mapping[str, Any]) -> list[str]:
    """One line, or one a run where they are long."""
    line = f"{path}: {' | '.join(write_setting(value) for value in values.values())}"
    if len(line) <= WIDE:
        return [line]
    return [f"{path}:", *(f"    {run}: {write_setting(value)}" for run, value in values.items())]


def write_setting(value: Any) -> str:
    """A setting's value; ABSENT where a run has no such setting."""
    return ABSENT if value is None else str(value)
