"""What merge.json says of a merged dense model, in words. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.merge_config import from_record

RECORD = "merge.json"


def is_merged(directory: Path) -> bool:
    """Whether `dense_merge.write_merged` has written it."""
    return (directory / RECORD).is_file()


def merge_in_words(directory: Path, by_layer: bool = False) -> str:
    """How a model was merged, of which models, and how large and how alike their task vectors are, a line for each role.

    by_layer: a line for each layer and role too. Raises ValueError: merge.json is damaged.
    """
    try:
        made = json.loads((directory / RECORD).read_text())
    except ValueError as error:
        raise ValueError(f"{directory / RECORD}: not whole JSON ({error}); merge the models again") from None
    lines = [f"{'merge':11} {from_record(made['merge']).words}", f"{'of':11} {', '.join(made['models'])}"]
    for method, count in made["averaged"].items():
        lines.append(f"{'averaged':11} {count} tensors, of which there is no curvature that {method} reads")
    if count := made.get("unconverged"):
        lines.append(f"{'unsolved':11} {count} tensors, at which mats stopped by its number of iterations")
    for name, passes in made.get("curvature", {}).items():
        lines += [f"{'curvature':11} {name}: {_pass(one)}" for one in passes]
    if "roles" not in made:
        return "\n".join(lines)
    rows = [(name, figures) for name, figures in made["roles"].items()]
    if by_layer:
        rows += [(f"{'-' if one['layer'] is None else one['layer']} {one['role']}", one) for one in made["layers"]]
    density = made["roles"]["all"]["ties"]["density"]
    return "\n".join([*lines, "", *_table(rows, density)])


def _pass(one: dict[str, Any]) -> str:
    tokens = ", ".join(f"{domain} {count:,}" for domain, count in one["tokens"].items())
    return f"{', '.join(one['kinds'])} on {one['sequences']} sequences of {one['sequence_length']} tokens ({tokens})"


def _table(rows: list[tuple[str, dict[str, Any]]], density: float) -> Iterator[str]:
    """Role, ‖τ‖ of each branch, then of each two branches the cosine and the share of signs that agree, and TIES' conflicts."""
    first = rows[0][1]
    titles = ["tensors", *(f"‖τ‖ {name}" for name in first["norms"])]
    titles += [f"cos {pair}" for pair in first["cosines"]] + [f"signs {pair}" for pair in first["sign_agreement"]]
    titles += [f"TIES conflict (of kept, density {density:g})"]
    cells = [titles]
    for name, row in rows:
        kept = row["ties"]["agreed"] + row["ties"]["conflict"]
        cells.append(
            [name, *(f"{value:.3g}" for value in row["norms"].values())]
            + ["–" if value is None else f"{value:.2f}" for value in row["cosines"].values()]
            + ["–" if value is None else f"{value:.0%}" for value in row["sign_agreement"].values()]
            + [f"{row['ties']['conflict'] / kept:.0%}" if kept else "–"]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        yield "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
