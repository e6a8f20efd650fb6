"""report.html: one self-contained page. Every number in it is formatted from the report, which it also embeds.

No network: page.css, page.js and the drawings are inlined. Sections without numbers are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from evals.figures import routed_parts, themed_svg
from evals.findings import best_on_trial, findings, headline
from evals.page_charts import bar_key, bars, forest, heat_maps, information
from evals.tables import (
    ABSENT,
    COSTS,
    average_title,
    best_model,
    caption,
    quality_columns,
    write_cost,
    write_count,
    write_perplexity,
)

HERE = Path(__file__).parent
FEW_DOCUMENTS = 30  # below it, a percentile bootstrap is known to give intervals that are too narrow


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page as one HTML string."""
    sections = [
        _section("summary", "Summary", summary_table(report)),
        _section("domains", "Perplexity by domain", _domains(report)),
        _section("comparisons", "Paired comparisons", _comparisons(report)),
        _section("curves", "Training curves", _curves(report)),
        _section("routing", "Routing", _routing(report)),
        _section("information", "Does the router know the domain?", _information(report)),
        _section("cost", "Cost", cost_table(report)),
        _section("method", "How it was measured", _method(report)),
        _section("provenance", "Provenance", _provenance(report)),
    ]
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(report))
    embedded = json.dumps(report, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report["experiment"])} · upcycle report</title>
<style>
{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">upcycle report · {escape(report["experiment"])}</p>
<h1>{escape(headline(report))}</h1>
<ul class="findings">{sentences}</ul>
</header>
{"".join(sections)}
</main>
<script type="application/json" id="report">{embedded}</script>
<script>
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _section(identity: str, title: str, body: str) -> str:
    """A titled section; nothing where there is no body."""
    if not body:
        return ""
    heading = f'<h2 id="{identity}-title">{title}</h2>'
    return f'<section aria-labelledby="{identity}-title" id="{identity}">{heading}{body}</section>\n'


def _scroll(label: str, table: str) -> str:
    """A table in a box that scrolls on its own, reachable by keyboard."""
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _headers(titles: Mapping[str, str]) -> str:
    """Header cells with sort buttons; titles: {title: CSS class}."""
    return "".join(
        f'<th scope="col" aria-sort="none" class="{css}"><button type="button">{escape(title)}</button></th>'
        for title, css in titles.items()
    )


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
        f"<thead><tr>{_headers(titles)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return _scroll("Summary table", table)


def cost_table(report: Mapping[str, Any]) -> str:
    """Parameters, tokens, FLOPs and seconds of each model, below each its ratio to the baseline."""
    base = report["models"].get(report["baseline"])
    fields = COSTS | {"learning_rate": "learning rate"}
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
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    ratios = f" × is the ratio to {report['baseline']}." if base else ""
    note = (
        "Tokens, FLOPs and seconds are those of every stage behind a model, the seed's included. The last column of "
        f"seconds lets the stages of one group run side by side.{ratios} All stages of the run together, each counted "
        f"once: {write_cost('seconds', report['seconds'])} s."
    )
    table = (
        f'<table class="sortable" id="cost-table"><caption><span>{escape(note)}</span></caption><thead><tr>'
        f"{_headers({'model': 'text'} | dict.fromkeys(fields.values(), ''))}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return _scroll("Cost table", table)


def _domains(report: Mapping[str, Any]) -> str:
    """Bars of perplexity, a panel per domain and average."""
    lead = '<p class="lead">Lower is better; bars start at zero. A notched bar is longer than fits: its figure stands beside it.</p>'
    return f'{lead}{bar_key(report)}<div class="grid">{bars(report)}</div>'


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


def _curves(report: Mapping[str, Any]) -> str:
    """Training loss against tokens, one drawing per family."""
    panels = "".join(
        f'<figure role="img" aria-label="Training loss against tokens: {title}"><h3>{title}</h3>{svg}</figure>'
        for title, svg in themed_svg(report).items()
    )
    lead = "Training cross-entropy on each model's own data, so curves of different mixtures of data do not compare."
    return f'<p class="lead">{lead}</p><div class="grid">{panels}</div>' if panels else ""


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
    return _scroll("Test sets", table) + definition_list(report["definitions"] | report["bootstrap"])


def definition_list(entries: Mapping[str, Any]) -> str:
    """A mapping as <dl>; nested values as indented JSON."""
    return (
        "<dl>"
        + "".join(f"<dt>{escape(str(key))}</dt><dd>{_value(entry)}</dd>" for key, entry in entries.items())
        + "</dl>"
    )


def _value(entry: Any) -> str:
    """Text, or preformatted JSON for lists and mappings."""
    if isinstance(entry, (dict, list, tuple)):
        return f"<pre>{escape(json.dumps(entry, indent=1, ensure_ascii=False))}</pre>"
    return escape(str(entry))


def _provenance(report: Mapping[str, Any]) -> str:
    """The machine and whatever the run recorded about itself, folded."""
    return (
        f"<details><summary>Machine</summary>{definition_list(report['machine'])}</details>"
        f"<details><summary>Versions and settings</summary>{definition_list(report['provenance'])}</details>"
    )
