"""What pages are built of: the document, sections, tables that scroll and sort, definition lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def document(title: str, heading: str, body: str, data: Any, findings: Sequence[str] = ()) -> str:
    """A whole page as one HTML string; `data`, what it shows, is embedded as JSON. No network: style and script are inlined."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings)
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · upcycle report</title>
<style>
{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">upcycle report · {escape(title)}</p>
<h1>{escape(heading)}</h1>
<ul class="findings">{sentences}</ul>
</header>
{body}
</main>
<script type="application/json" id="report">{embedded}</script>
<script>
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def section(identity: str, title: str, body: str) -> str:
    """A titled section; nothing where there is no body."""
    if not body:
        return ""
    heading = f'<h2 id="{identity}-title">{title}</h2>'
    return f'<section aria-labelledby="{identity}-title" id="{identity}">{heading}{body}</section>\n'


def scroll(label: str, table: str) -> str:
    """A table in a box that scrolls on its own, reachable by keyboard."""
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def headers(titles: Mapping[str, str]) -> str:
    """Header cells with sort buttons; titles: {title: CSS class}."""
    return "".join(
        f'<th scope="col" aria-sort="none" class="{css}"><button type="button">{escape(title)}</button></th>'
        for title, css in titles.items()
    )


def sortable_table(identity: str, label: str, titles: Mapping[str, str], rows: Sequence[str], note: str) -> str:
    """A table whose columns sort; titles: {title: CSS class}; rows: as HTML; note: text below it."""
    table = (
        f'<table class="sortable" id="{identity}"><caption><span>{escape(note)}</span></caption>'
        f"<thead><tr>{headers(titles)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll(label, table)


def cell(value: float | str | None, shown: str, below: str = "", css: str = "") -> str:
    """A cell that sorts by `value` (last where it is None) and shows `shown`, with smaller text below it."""
    key = "" if value is None else value if isinstance(value, str) else repr(value)
    small = f"<small>{escape(below)}</small>" if below else ""
    return (
        f'<td data-value="{escape(key)}"{f" class={chr(34)}{css}{chr(34)}" if css else ""}>{escape(shown)}{small}</td>'
    )


def row_header(name: str, below: str = "") -> str:
    """The first cell of a row."""
    small = f"<small>{escape(below)}</small>" if below else ""
    return f'<th scope="row" data-value="{escape(name)}">{escape(name)}{small}</th>'


def figures(panels: Mapping[str, str], label: str) -> str:
    """A drawing with its title, for each of {title: SVG element}; label: what a title stands after when it is read out."""
    return "".join(
        f'<figure role="img" aria-label="{escape(label)}: {escape(title)}"><h3>{escape(title)}</h3>{svg}</figure>'
        for title, svg in panels.items()
    )


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
