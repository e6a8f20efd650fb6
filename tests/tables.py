"""Tables in the docs that tests make: what ran is what stands there."""

from __future__ import annotations

import os
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def assert_table(document: str, name: str, head: list[str], rows: list[list[str]]) -> None:
    """The table between the marks `<!-- name -->` and `<!-- end -->` of a document is this one; UPCYCLE_WRITE_TABLES=1 writes it."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    path = DOCS / document
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    found, after = rest.split("\n<!-- end -->", 1)
    if os.environ.get("UPCYCLE_WRITE_TABLES") == "1":
        path.write_text(f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}")
    else:
        assert found == "\n".join(lines)
