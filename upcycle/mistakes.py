"""What pydantic finds wrong with settings, in words: where, what, got, and the nearest valid names. No torch."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from upcycle.config import nearest


def in_words(kind: Any, error: ValidationError) -> list[str]:
    """One line for each thing wrong with the settings of `kind`, the dataclass that was to be built."""
    return [_line(kind, one) for one in error.errors()]


def _line(kind: Any, error: Any) -> str:
    path = [str(part) for part in error["loc"] if part != "[key]"]
    where = ".".join(_shown(kind, path))
    if error["type"] == "unexpected_keyword_argument":
        names = field_names(kind, path[:-1])
        return f"{where}: unknown key{nearest(path[-1], names)} Valid here: {', '.join(names)}"
    if error["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{where}: missing; give it a value"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (got {error['input']!r})"
    return f"{where}: {message}{given}" if where else message


def field_names(kind: Any, path: list[str]) -> list[str]:
    """Names of the fields of the dataclass at `path` below `kind`; empty if there is none."""
    for part in path:
        kind = _unwrap(kind, part)
    kind = _unwrap_optional(kind)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _shown(kind: Any, path: list[str]) -> list[str]:
    """The path as settings write it: without what pydantic puts in for the member of a union that a field such as `scheduler` has chosen."""
    shown = []
    for part in path:
        if _member(kind, part) is None:
            shown.append(part)
        kind = _unwrap(kind, part)
    return shown


def _member(kind: Any, tag: str) -> Any:
    """Of a union of dataclasses, the one with a field whose default is `tag`; None for anything else."""
    several = [one for one in typing.get_args(kind) if is_dataclass(one)]
    return (
        next((one for one in several if tag in (field.default for field in fields(one))), None) if several[1:] else None
    )


def _unwrap_optional(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    return kind


def _unwrap(kind: Any, part: str) -> Any:
    if (member := _member(kind, part)) is not None:
        return member
    kind = _unwrap_optional(kind)
    if is_dataclass(kind):
        return typing.get_type_hints(kind).get(part, Any)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if arguments else Any
