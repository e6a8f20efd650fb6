"""What wandb wrote offline, read from its file: LevelDB's log format, one protobuf record after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

HEADER_BYTES, BLOCK_BYTES = 7, 32768  # of the file and of every chunk: checksum 4, length 2, kind 1
LAST = (1, 4)  # kinds of chunks that end a record: whole, last


def records(file: Path) -> Iterator[Record]:
    data, at, parts = file.read_bytes(), HEADER_BYTES, []
    assert data[:4] == b":W&B"
    while at + HEADER_BYTES <= len(data):
        if (left := BLOCK_BYTES - at % BLOCK_BYTES) < HEADER_BYTES:  # the rest of a block is padding
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + HEADER_BYTES :][:length])
        at += HEADER_BYTES + length
        if kind in LAST:
            yield Record.FromString(b"".join(parts))
            parts = []


def read(file: Path) -> dict:
    """`run` as it was started, `config`, `rows` of the history, `axes` (metric or pattern -> its axis), `artifacts`."""
    found = {"run": None, "config": {}, "rows": [], "axes": {}, "artifacts": []}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
        elif kind == "history":
            found["rows"].append(_nested(record.history.item))
        elif kind == "metric":
            found["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
    return found


def _nested(items: Iterable) -> dict:
    """A row; what wandb logs of a table is a dict, whose values it writes one by one."""
    row: dict = {}
    for one in items:
        *outer, name = one.nested_key or [one.key]
        inside = row
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[name] = json.loads(one.value_json)
    return row


def table(file: Path, name: str) -> dict:
    """`columns` and `data` of the table that was last logged under `name`."""
    logged = [row[name] for row in read(file)["rows"] if name in row][-1]
    return json.loads((file.parent / "files" / logged["path"]).read_text())
