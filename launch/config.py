"""From Hydra's composed YAML to frozen dataclasses, once. Unknown keys, missing keys and wrong types stop here."""

from __future__ import annotations

import difflib
import json
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import (
    STRICT,
    BranchConfig,
    DataConfig,
    DomainConfig,
    EvalConfig,
    MixtureConfig,
    SeedConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How stages are run. Nothing here changes a result, so nothing here is part of an artifact's key."""

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where progress goes: the terminal, and Weights & Biases (`offline` needs no account)."""

    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "upcycle"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run. `plan`: print the stages and stop. `stage`: compute only that one."""

    name: str
    rng_seed: int
    plan: bool
    stage: str | None
    artifacts: str
    seed: SeedConfig
    domains: dict[str, DomainConfig]
    data: DataConfig
    branches: dict[str, BranchConfig]
    soup: bool
    dense: TrainConfig | None
    mixtures: dict[str, MixtureConfig]
    eval: EvalConfig
    launch: LaunchConfig
    track: TrackConfig

    @model_validator(mode="after")
    def _names_agree(self):
        trained = [name for name, domain in self.domains.items() if domain.trained]
        runs = {f"branches.{name}.train": branch.train for name, branch in self.branches.items()}
        runs |= {f"mixtures.{name}.train": mixture.train for name, mixture in self.mixtures.items()}
        for where, train in ({"seed.train": self.seed.train} | runs).items():
            for domain in train.proportions if train else ():
                if domain not in trained:
                    raise ValueError(
                        f"{where}.proportions names {domain!r}, expected one of the trained domains "
                        f"({', '.join(trained)}){nearest(domain, trained)}"
                    )
        if "seed" in self.branches:
            raise ValueError("branches.seed: that name belongs to the seed's own expert; give the branch another")
        for name, mixture in self.mixtures.items():
            experts = len(self.branches) + mixture.assemble.include_seed
            if mixture.assemble.router.kind == "top_k" and mixture.assemble.router.top_k > experts:
                raise ValueError(
                    f"mixtures.{name}.assemble.router.top_k={mixture.assemble.router.top_k} exceeds the {experts} experts "
                    f"({', '.join(['seed'] * mixture.assemble.include_seed + list(self.branches))}); "
                    "lower top_k or add a branch"
                )
        return self


def nearest(word: str, valid: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def merged(defaults: dict, overrides: dict | None) -> dict:
    """`defaults` with `overrides` on top, dict by dict; `proportions` and `phases` are replaced whole."""
    result = dict(defaults)
    for key, value in (overrides or {}).items():
        deep = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "proportions"
        result[key] = merged(result[key], value) if deep else value
    return result


def build(raw: dict[str, Any]) -> Config:
    """The run's settings. `branch` holds what branches share, `mix` what mixtures share.

    Raises ValueError, naming the key's path and the nearest valid names.
    """
    raw = dict(raw)
    branch, mix = raw.pop("branch", {}), raw.pop("mix", {})
    for key, defaults in (("branches", branch), ("mixtures", mix)):
        found = raw.get(key) or {}
        raw[key] = {
            name: item if item.get("path") else item | {"train": merged(defaults, item.get("train"))}
            for name, item in found.items()
        }
    if raw.get("dense") is not None:
        shares = {"proportions": mix.get("proportions")}  # a placeholder: the recipe works out the matched ones
        raw["dense"] = merged(branch | shares, raw["dense"])
    try:
        return TypeAdapter(Config).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(one) for one in error.errors())) from None


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"] if part != "[key]"]
    where = ".".join(path)
    if error["type"] == "unexpected_keyword_argument":
        names = field_names(Config, path[:-1])
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


def _unwrap_optional(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next((part for part in typing.get_args(kind) if part is not type(None)), kind)
    return kind


def _unwrap(kind: Any, part: str) -> Any:
    kind = _unwrap_optional(kind)
    if is_dataclass(kind):
        return typing.get_type_hints(kind).get(part, Any)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return arguments[1]
    return arguments[0] if arguments else Any
