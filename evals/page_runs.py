"""The page of several runs side by side; it shows what `compare_runs` found and embeds it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from evals.page_parts import cell, document, row_header, scroll, section, sortable_table
from evals.runs import note, write_setting
from evals.tables import average_title, write_count, write_perplexity, write_signed


def render_runs(found: Mapping[str, Any]) -> str:
    """The whole page as one HTML string."""
    sections = [
        section("summary", "Models of all runs", _table(found)),
        section("settings", "Settings that differ", _settings(found)),
        section("provenance", "Test sets and commits", _origins(found)),
    ]
    title = " and ".join(found["runs"]) if len(found["runs"]) == 2 else ", ".join(found["runs"])
    return document(title, f"Runs compared: {title}", "".join(sections), found, sentences(found))


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The best model of each run on the trained average, of the models that all have; the oracle is no model."""
    averages = {name: groups["trained"] for name, groups in found["models"].items() if name != "oracle"}
    best = {run: min(averages, key=lambda name: averages[name][run]["nats_per_token"]) for run in found["runs"]}
    return [
        f"Lowest {average_title(found, 'trained')} in {run}: {name}, "
        f"{write_perplexity(averages[name][run]['perplexity'])}."
        for run, name in best.items()
    ]


def _table(found: Mapping[str, Any]) -> str:
    """Models and averages × runs: perplexity over its interval, and below a difference its size in nats per token."""
    first, *others = found["runs"]
    rows = []
    for name, groups in found["models"].items():
        for group, runs in groups.items():
            cells = cell(group, average_title(found, group), css="text")
            for average in runs.values():
                low, high = (write_perplexity(end) for end in average["interval"])
                cells += cell(average["perplexity"], write_perplexity(average["perplexity"]), f"{low} to {high}")
            for run in others:
                cells += cell(runs[run]["difference"], write_signed(runs[run]["difference"]))
            rows.append(f"<tr>{row_header(name)}{cells}</tr>")
    titles = dict.fromkeys(["model", "average"], "text") | dict.fromkeys(found["runs"], "")
    titles |= {f"{run} − {first}": "" for run in others}
    return sortable_table("runs-table", "Models of all runs", titles, rows, note(found))


def _plain_table(label: str, titles: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col" class="text">{escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td class={chr(34)}text{chr(34)}>{escape(one)}</td>" for one in row[1:])}</tr>'
        for row in rows
    )
    return scroll(label, f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')


def _settings(found: Mapping[str, Any]) -> str:
    """Settings × runs."""
    rows = [[path, *map(write_setting, values.values())] for path, values in found["settings"].items()]
    return _plain_table("Settings that differ", ["setting", *found["runs"]], rows) if rows else ""


def _origins(found: Mapping[str, Any]) -> str:
    """What all runs were measured on, and the commit of each."""
    tested = [[domain, write_count(tokens)] for domain, tokens in found["tokens"].items()]
    commits = [[run, write_setting(commit)] for run, commit in found["commits"].items()]
    lead = f"{found['split'].capitalize()} split, windows of {found['sequence_length']} tokens."
    return (
        f'<p class="lead">{escape(lead)}</p>{_plain_table("Test sets", ["test set", "tokens"], tested)}'
        f"{_plain_table('Commits', ['run', 'commit'], commits)}"
    )
