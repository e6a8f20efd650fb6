"""report.html: one self-contained page. Every number in it is formatted from the report, which it also embeds.

No network: page.css, page.js and the drawings are inlined. Sections without numbers are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from evals.figures import routed_parts
from evals.findings import best_on_trial, findings, headline
from evals.page_charts import bar_key, bars, forest, heat_maps, information
from evals.page_microscope import microscope
from evals.page_parts import definition_list, document, headers, scroll, section
from evals.page_training import curves, quality_against_compute, specialisation
from evals.tables import (
    ABSENT,
    COSTS,
    average_title,
    best_model,
    caption,
    quality_columns,
    relative_title,
    write_cost,
    write_count,
    write_perplexity,
    write_relative,
)
from evals.task_table import NOTE, task_rows

FEW_DOCUMENTS = 30  # below it, a percentile bootstrap is known to give intervals that are too narrow


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as one HTML string."""
    sections = [
        section("summary", "Summary", summary_table(report)),
        section("domains", "Perplexity by domain", _domains(report)),
        section("tasks", "Tasks", _tasks(report)),
        section("comparisons", "Paired comparisons", _comparisons(report)),
        section("pareto", "Quality against compute", quality_against_compute(report)),
        section("curves", "Training curves", curves(report)),
        section("routing", "Routing", _routing(report)),
        section("information", "Does the router know the domain?", _information(report)),
        section("specialisation", "Specialisation over training", specialisation(report, best_on_trial(report))),
        section("microscope", "What the routers go by", _microscope(report)),
        section("cost", "Cost", cost_table(report)),
        section("method", "How it was measured", _method(report)),
        section("provenance", "Provenance", _provenance(report)),
    ]
    return document(report["experiment"], headline(report), "".join(sections), report, findings(report))


def summary_table(report: Mapping[str, Any]) -> str:
    """Models × domains and averages: perplexity over its interval; the lowest of each column starred."""
    columns = quality_columns(report)
    averages = {average_title(report, group): group for group in report["domain_groups"]}
    best = {title: best_model(report, column) for title, column in columns.items()}
    titles = {"model": "text"} | {t: "average" if t in averages else "" for t in columns}
    rows = []
    for name, model in report["models"].items():
        cells = []
        for title, column in columns.items():
            group = averages.get(title)
            low, high = model["average"][group]["interval"] if group else model["interval"][title]
            value = write_perplexity(column[name])
            cells.append(
                f'<td data-value="{column[name]!r}" class="{"average" if group else ""}">'
                f"{f'<b>{value}</b>' if best[title] == name else value}"
                f"<small>{write_perplexity(low)} to {write_perplexity(high)}</small></td>"
            )
        css = ' class="reference"' if model["kind"] == "oracle" else ""
        label = f"{escape(name)}<small>{escape(model['kind'])}</small>"
        rows.append(f'<tr{css}><th scope="row" data-value="{escape(name)}">{label}</th>{"".join(cells)}</tr>')
    note = f"{caption(report)} Below each value: its 95% interval over documents. ★ lowest of its column."
    if any(model["kind"] == "oracle" for model in report["models"].values()):
        note += " The oracle is no model: it is told the domain, uses the branch of that name and else the seed."
    table = (
        f'<table class="sortable" id="summary-table"><caption><span>{escape(note)}</span></caption>'
        f"<thead><tr>{headers(titles)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll("Summary table", table)


def cost_table(report: Mapping[str, Any]) -> str:
    """Parameters, tokens, FLOPs and seconds of each model, below each its ratio to the baseline."""
    base = report["models"].get(report["baseline"])
    fields, relative = COSTS | {"learning_rate": "learning rate"}, relative_title(report)
    rows = []
    for name, model in report["models"].items():
        if model["kind"] == "oracle":
            continue
        cells = []
        for field in fields:
            value = model[field]
            shown = f"{value:g}" if field == "learning_rate" and value is not None else write_cost(field, value)
            comparable = field in COSTS and base and value is not None and base[field]
            ratio = f"<small>× {value / base[field]:.2f}</small>" if comparable else ""
            cells.append(f'<td data-value="{"" if value is None else repr(value)}">{shown}{ratio}</td>')
        if relative:
            share = model["relative"]["flops"]
            cells.append(
                f'<td data-value="{"" if share is None else repr(share)}">{escape(write_relative(model))}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    ratios = f" × is the ratio to {report['baseline']}." if base else ""
    note = (
        "Tokens, FLOPs and seconds are those of every stage behind a model, the seed's included. The last column of "
        f"seconds lets the stages of one group run side by side.{ratios} All stages of the run together, each counted "
        f"once: {write_cost('seconds', report['seconds'])} s."
    )
    table = (
        f'<table class="sortable" id="cost-table"><caption><span>{escape(note)}</span></caption><thead><tr>'
        f"{headers({'model': 'text'} | dict.fromkeys([*fields.values(), *([relative] if relative else [])], ''))}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll("Cost table", table)


def _domains(report: Mapping[str, Any]) -> str:
    """Bars of perplexity, a panel per domain and average."""
    lead = '<p class="lead">Lower is better; bars start at zero. A notched bar is longer than fits: its figure stands beside it.</p>'
    return f'{lead}{bar_key(report)}<div class="grid">{bars(report)}</div>'


def _tasks(report: Mapping[str, Any]) -> str:
    """Models × tasks of lm-eval, chance first."""
    if not (rows := task_rows(report)):
        return ""
    header, *body = rows
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in body
    )
    note = f"{NOTE} lm-eval {report['tasks']['lm_eval']}."
    table = f"<table><caption><span>{escape(note)}</span></caption><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"
    return scroll("Tasks", table)


def _comparisons(report: Mapping[str, Any]) -> str:
    """The forest plot and how to read it."""
    if not report["comparisons"]:
        return ""
    lead = (
        f"Difference in nats per token on the {average_title(report, 'trained')}, model minus reference, on the same "
        "resampled documents. Left of the line at 0 the model is better. A hollow dot: the 95% interval holds 0. "
        "Each reference has a scale of its own; intervals are not corrected for the number of comparisons."
    )
    return f'<p class="lead">{escape(lead)}</p><div class="forests">{forest(report)}</div>'


def _routing(report: Mapping[str, Any]) -> str:
    """Heat maps of every routed model, folded, the best one open."""
    opened = best_on_trial(report)
    folds = [
        f"<details{' open' if name == opened else ''}><summary>{escape(name)}</summary>"
        + "".join(heat_maps(part, model["routing"], report["domains"]) for part in routed_parts(model))
        + "</details>"
        for name, model in report["models"].items()
        if routed_parts(model)
    ]
    lead = (
        "Where the tokens of each domain (rows) went, expert by expert (columns), in every layer. Underlined: the "
        "domain's own expert. Entropy is the router's, in nats; it is at most the logarithm of the number of experts."
    )
    return f'<p class="lead">{lead}</p>{"".join(folds)}' if folds else ""


def _information(report: Mapping[str, Any]) -> str:
    """Mutual information of expert and domain against its shuffled control."""
    panels = information(report)
    lead = (
        "Mutual information between a text's domain and the expert chosen, per layer (dot), and the range the same "
        "estimate takes when domains are shuffled (hatched band). A dot inside its band shows no specialisation."
    )
    return f'<p class="lead">{lead}</p><div class="grid">{panels}</div>' if panels else ""


def _microscope(report: Mapping[str, Any]) -> str:
    """Gates, and what the expert of a token tells of it, for models whose evaluation looked at tokens."""
    lead = (
        "How sure routers are, and what they go by. Controls: domains shuffled among documents; for the rest each "
        "window's experts moved on by a random number of tokens, which keeps its domain and the bias of rare tokens. "
        "Bold: above all controls."
    )
    folds = microscope(report, best_on_trial(report))
    return f'<p class="lead">{lead}</p>{folds}' if folds else ""


def _method(report: Mapping[str, Any]) -> str:
    """Test sets, then the definition of every quantity."""
    tokens = next(iter(report["models"].values()))["tokens"]
    rows = "".join(
        f'<tr><th scope="row">{escape(domain)}</th>'
        f'<td class="text">{"yes" if domain in report["domain_groups"]["trained"] else "no"}</td>'
        f"<td>{report['documents'][domain]:,}</td><td>{write_count(tokens[domain])}</td>"
        f"<td>{ABSENT if report['overlap'][domain] is None else format(report['overlap'][domain], '.2%')}</td></tr>"
        for domain in report["domains"]
    )
    few = [domain for domain, count in report["documents"].items() if count < FEW_DOCUMENTS]
    warning = f" Too few documents for a trustworthy interval: {', '.join(few)}." if few else ""
    note = f"Overlap: the share of the test split's n-grams that the same domain's training split holds too (of untrained domains nobody reads that split).{warning}"
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("trained", "documents", "tokens", "overlap"))
    table = (
        f"<table><caption><span>{escape(note)}</span></caption><thead><tr><th scope='col' class='text'>test set</th>"
        f"{titles}</tr></thead><tbody>{rows}</tbody></table>"
    )
    return scroll("Test sets", table) + definition_list(report["definitions"] | report["bootstrap"])


FOLDS = {
    "made_by": "Commits of the stages",
    "rng_seeds": "rng seeds",
    "artifacts": "Artifact keys",
    "config": "Settings",
}


def _provenance(report: Mapping[str, Any]) -> str:
    """The machine and whatever the run recorded about itself, folded."""
    found = report["provenance"]
    folds = {"Machine": report["machine"]}
    folds["Versions"] = {key: value for key, value in found.items() if key not in FOLDS}
    folds |= {title: found[key] for key, title in FOLDS.items() if found.get(key)}  # earlier reports lack some
    return "".join(
        f"<details><summary>{title}</summary>{definition_list(entries)}</details>" for title, entries in folds.items()
    )
