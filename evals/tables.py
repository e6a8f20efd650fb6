"""The summary table in plain text and in Markdown, and how numbers are written: one place for every rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GROUP_TITLES = {
    "trained": "trained avg",
    "in_domain": "in-domain avg",
    "general": "general avg",
    "out_of_domain": "out of domain avg",
}
COSTS = {
    "parameters": "params",
    "active_parameters": "active",
    "train_tokens": "tokens",
    "train_flops": "FLOPs",
    "seconds": "seconds",
    "parallel_seconds": "seconds, branches in parallel",
}
ABSENT = "–"


def write_perplexity(value: float) -> str:
    """Four significant digits up to 1000, then whole numbers: 3.142, 31.42, 314.2, 31,416."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def write_count(value: float | None) -> str:
    """Three significant digits with a metric suffix: 950, 12.3k, 118M, 1.20B; ABSENT for None."""
    if value is None:
        return ABSENT
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:#.3g}".rstrip(".") + suffix
    return f"{value:.0f}"


def write_cost(field: str, value: float | None) -> str:
    """A cost as text: FLOPs as 1.23e15, seconds whole (one decimal below 100), counts with a metric suffix."""
    if value is None:
        return ABSENT
    if field == "train_flops":
        return f"{value:.2e}".replace("e+", "e")
    if field.endswith("seconds"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return write_count(value)


def write_signed(value: float) -> str:
    """Nats per token with its sign, four decimals, a true minus: −0.0123."""
    return f"{value:+.4f}".replace("-", "−")


def write_property(key: str, value: Any) -> str:
    """A property of the machine: `cores 4`; bytes in GiB: `memory 15.6 GiB`."""
    if key.endswith("_bytes"):
        key, value = key.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
    return f"{key.replace('_', ' ')} {value}"


def average_title(report: Mapping[str, Any], group: str) -> str:
    """An average's exact name: `trained avg (code law math general)`."""
    return f"{GROUP_TITLES[group]} ({' '.join(report['domain_groups'][group])})"


def shown_groups(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The averages that have a column: of some domain, and of others than an average before covers.

    In-domain and general averages of one domain are that domain's own column.
    """
    shown: dict[str, list[str]] = {}
    for group, members in report["domain_groups"].items():
        alone = len(members) == 1 and group in ("in_domain", "general")
        if members and not alone and members not in shown.values():
            shown[group] = members
    return shown


def quality_columns(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{column title: {model: perplexity}}: a group's average, then the domains that no later group has; trained first."""
    models, groups = report["models"], report["domain_groups"]
    home = {domain: group for group, members in groups.items() for domain in members}
    columns = {}
    for group, members in groups.items():
        if group in shown_groups(report):
            title = average_title(report, group)
            columns[title] = {name: model["average"][group]["perplexity"] for name, model in models.items()}
        for domain in (domain for domain in members if home[domain] == group):
            columns[domain] = {name: model["perplexity"][domain] for name, model in models.items()}
    return columns


CUT = 1.5  # times the seed's value: how far the scale of a chart goes


def longest_shown(report: Mapping[str, Any], column: Mapping[str, float]) -> float:
    """Where the scale of a column's perplexities ends: one stranger to a domain would flatten all others."""
    models, most = report["models"], max(column.values())
    return min(most, CUT * next((column[name] for name in column if models[name]["kind"] == "seed"), most))


def best_model(report: Mapping[str, Any], column: Mapping[str, float]) -> str:
    """The model with the lowest value of a column; the oracle is no model and cannot win."""
    return min((name for name in column if report["models"][name]["kind"] != "oracle"), key=column.__getitem__)


def relative_title(report: Mapping[str, Any]) -> str | None:
    """The title of the column that says who is matched to the reference; None in a report without one."""
    reference = report.get("reference")  # reports of earlier versions have none
    return f"tokens, FLOPs after the seed ÷ {reference}" if reference else None


def write_relative(model: Mapping[str, Any]) -> str:
    """`1.00, 1.04 data-matched`: tokens and FLOPs after the seed relative to the reference's, and what is matched."""
    found = model["relative"]
    if found is None:
        return ABSENT
    figures = ", ".join(ABSENT if found[of] is None else f"{found[of]:.2f}" for of in ("tokens", "flops"))
    return f"{figures} {found['label']}".strip()


def table_cells(report: Mapping[str, Any], mark: str, costs: Sequence[str] = tuple(COSTS)) -> list[list[str]]:
    """Header and rows as text; `mark` is the format of a column's best perplexity, such as `**{}**`. costs: of COSTS."""
    columns = quality_columns(report)
    best = {title: best_model(report, column) for title, column in columns.items()}
    relative = relative_title(report)
    cells = [["model", *columns, *(COSTS[field] for field in costs), *([relative] if relative else [])]]
    for name, model in report["models"].items():
        quality = [write_perplexity(column[name]) for column in columns.values()]
        marked = [
            mark.format(cell) if best[title] == name else cell for title, cell in zip(columns, quality, strict=True)
        ]
        spent = [write_cost(field, model[field]) for field in costs]
        cells.append([name, *marked, *spent, *([write_relative(model)] if relative else [])])
    return cells


def caption(report: Mapping[str, Any]) -> str:
    """What the table's numbers are, on what text, with which random numbers, and on which machine."""
    tokens = next(iter(report["models"].values()))["tokens"]
    tested = ", ".join(f"{domain} {write_count(count)}" for domain, count in tokens.items())
    machine = ", ".join(write_property(key, value) for key, value in report["machine"].items())
    seconds = f" All stages together: {write_cost('seconds', report['seconds'])} s." if report.get("seconds") else ""
    apart = report.get("stride", report["sequence_length"])
    limit = report.get("max_tokens")
    fit = f"as many as fit in {write_count(limit)} tokens, at least one" if limit else ""
    first = f" (of each domain its first whole documents, {fit})" if fit else ""
    moved = "" if apart == report["sequence_length"] else f" that begin every {apart}"
    skipped = f", without the first {report['skip_first']} of each" if report.get("skip_first") else ""
    return (
        f"{report['split'].capitalize()} perplexity (lower is better) in windows of {report['sequence_length']} "
        f"tokens{moved}{skipped}; tokens scored{first}: {tested}. An average is the exp of the mean nats per token over its domains. "
        f"Bootstrap rng_seed {report['bootstrap']['rng_seed']}. Machine: {machine}.{seconds}"
    )


def format_table(report: Mapping[str, Any]) -> str:
    """The summary for a terminal; each column's lowest perplexity carries a `*`. Long titles stack word on word."""
    header, *rows = table_cells(report, mark="{}*")
    groups = shown_groups(report)
    short = {average_title(report, group): f"{group.replace('_', '-')} avg" for group in groups}
    header = [short.get(title, title) for title in header]
    stacked = [title.split() for title in header]
    depth = max(map(len, stacked))
    lines = [[words[row - depth + len(words)] if row >= depth - len(words) else "" for words in stacked]
             for row in range(depth)]  # fmt: skip
    body = [[row[0], *(cell if cell.endswith("*") else cell + " " for cell in row[1:])] for row in rows]
    widths = [max(len(line[column]) for line in lines + body) for column in range(len(header))]
    text = ["  ".join(_align(line, widths)).rstrip() for line in lines]
    text.append("─" * (sum(widths) + 2 * len(widths) - 2))
    text += ["  ".join(_align(line, widths)).rstrip() for line in body]
    averages = "; ".join(
        f"{title}: {', '.join(groups[group])}" for group, title in zip(groups, short.values(), strict=True)
    )
    return "\n".join([*text, "", f"* lowest of its column (the oracle is no model). {averages}.", caption(report)])


def _align(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The first cell to the left, numbers to the right."""
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]


def markdown_table(report: Mapping[str, Any], costs: Sequence[str] = tuple(COSTS)) -> str:
    """The summary for the README: the lowest perplexity of each column in bold, a caption, the paired comparisons.

    costs: fewer than all where the machine did other work, so that seconds say nothing.
    """
    header, *rows = table_cells(report, "**{}**", costs)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = f"{table}\n\n*{caption(report)} Bold: lowest of its column; the oracle is no model.*"
    return f"{text}\n\n{_markdown_comparisons(report)}" if report["comparisons"] else text


def comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: each model on trial against each reference, nats per token with 95% interval."""
    references = list(dict.fromkeys(item["against"] for item in report["comparisons"]))
    found: dict[str, dict[str, str]] = {}
    for item in report["comparisons"]:
        low, high = item["interval"]
        cell = f"{write_signed(item['nats_difference'])} [{write_signed(low)}, {write_signed(high)}]"
        found.setdefault(item["model"], {})[item["against"]] = cell
    header = ["model", *(f"against {name}" for name in references)]
    return [header, *([model, *(cells.get(name, "") for name in references)] for model, cells in found.items())]


def _markdown_comparisons(report: Mapping[str, Any]) -> str:
    """The paired comparisons for the README."""
    header, *rows = comparison_rows(report)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    samples = report["bootstrap"]["samples"]
    return (
        f"{text}\n\nNats per token, model minus reference (below 0: the model is better), mean over the trained domains, "
        f"with the 95% interval of {samples} paired bootstrap samples over test documents of this one run."
    )


def update_readme(report: Mapping[str, Any], readme: Path) -> None:
    """Replace what stands between `<!-- table: EXPERIMENT -->` and `<!-- /table -->` by the report's Markdown table."""
    replace_block(readme, "table", report["experiment"], markdown_table(report))


def replace_block(readme: Path, kind: str, name: str, text: str) -> None:
    """Replace what stands between `<!-- KIND: NAME -->` and `<!-- /KIND -->`.

    Raises ValueError unless the file has that pair of markers exactly once.
    """
    whole = readme.read_text(encoding="utf-8")
    start, stop = f"<!-- {kind}: {name} -->", f"<!-- /{kind} -->"
    pattern = re.compile(re.escape(start) + rf"(?:(?!<!-- {kind}:).)*?" + re.escape(stop), re.DOTALL)
    found = len(pattern.findall(whole))
    if found != 1:
        raise ValueError(
            f"{readme} has {found} {kind}s marked `{start}` … `{stop}`, expected exactly one. "
            f"Put the two comments where the {kind} should stand."
        )
    temporary = readme.with_name(readme.name + ".tmp")
    temporary.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{stop}", whole), encoding="utf-8")
    temporary.replace(readme)
