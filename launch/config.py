"""From Hydra's composed YAML to frozen dataclasses, once. Unknown keys, missing keys and wrong types stop here."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from upcycle.config import (
    ARCHITECTURES,
    STRICT,
    BranchConfig,
    DataConfig,
    DomainConfig,
    EvalConfig,
    MixtureConfig,
    SeedConfig,
    TrainConfig,
    nearest,
)
from upcycle.phases import plan_phases

OWN_NAMES = ("seed", "soup", "dense", "oracle")  # what the report calls the models that are neither branch nor mixture


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How stages are run. Nothing here changes a result, so nothing here is part of an artifact's key."""

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where progress goes: the terminal, and Weights & Biases (`offline` needs no account)."""

    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "upcycle"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run. `plan`: print the stages and stop. `stage`: compute only that one."""

    name: str = Field(pattern=r"^[\w.-]*\w$")
    rng_seed: int = Field(ge=0)
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
    def _fits_together(self):
        _check_names(self)
        for where, train in self.runs().items():
            _check_proportions(self, where, train)
            plan_phases(train, where)
        _check_dense(self)
        _check_evaluation(self)
        _check_checkpoint("seed.path", self.seed.path)
        for name, branch in self.branches.items():
            _check_checkpoint(f"branches.{name}.path", branch.path)
        for name, mixture in self.mixtures.items():
            _check_experts(self, name, mixture)
        return self

    def runs(self) -> dict[str, TrainConfig]:
        """Every training run whose settings are the user's own (the dense continuation's follow from them), by key path."""
        found = {"seed.train": self.seed.train}
        found |= {f"branches.{name}.train": branch.train for name, branch in self.branches.items()}
        found |= {f"mixtures.{name}.train": mixture.train for name, mixture in self.mixtures.items()}
        return {where: train for where, train in found.items() if train is not None}


def _check_names(cfg: Config) -> None:
    taken = dict.fromkeys(OWN_NAMES, "a model of every report")
    for where, names in (("branches", cfg.branches), ("mixtures", cfg.mixtures)):
        for name in names:
            if name in taken:
                raise ValueError(
                    f"{where}.{name}: that name belongs to {taken[name]}, expected names that are all different "
                    f"(and none of {', '.join(OWN_NAMES)}); rename {where}.{name}"
                )
            taken[name] = f"{where}.{name}"


def _check_proportions(cfg: Config, where: str, train: TrainConfig) -> None:
    trained = [name for name, domain in cfg.domains.items() if domain.trained]
    for domain in train.proportions:
        if domain not in trained:
            raise ValueError(
                f"{where}.proportions names {domain!r}, expected one of the trained domains "
                f"({', '.join(trained)}){nearest(domain, trained)}"
            )


def _check_evaluation(cfg: Config) -> None:
    """Every domain needs documents in the split that models are measured on."""
    for name, domain in cfg.domains.items():
        if getattr(domain, f"{cfg.eval.split}_fraction") == 0:
            raise ValueError(
                f"domains.{name}.{cfg.eval.split}_fraction is 0, but eval.split={cfg.eval.split} measures every domain on "
                "that split; raise it or choose the other split"
            )


def _check_dense(cfg: Config) -> None:
    """The dense continuation's phases must fit the tokens that the recipe will give it."""
    if cfg.dense is None:
        return
    tokens = sum(b.train.steps * b.train.batch_tokens for b in cfg.branches.values() if b.train)
    tokens += max((m.train.steps * m.train.batch_tokens for m in cfg.mixtures.values()), default=0)
    if tokens == 0:
        raise ValueError("dense: no branch or mixture is trained, so there are no tokens to match; set dense=null")
    plan_phases(replace(cfg.dense, tokens=tokens), "dense")


def _check_checkpoint(where: str, path: str | None) -> None:
    """A checkpoint is a directory with a config.json of a supported family."""
    if path is None:
        return
    config = Path(path) / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{where}={path}: no {config} here, expected a Hugging Face model directory (names on the hub are not "
            "supported yet); download it first (huggingface-cli download) and give the directory"
        )
    try:
        family = json.loads(config.read_text())["model_type"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(
            f"{where}={path}: {config} names no model_type, expected a Hugging Face config; save the model again"
        ) from None
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{where}={path}: model_type={family!r} is not supported, expected one of {', '.join(ARCHITECTURES)}; "
            "choose such a model, or describe its parts in upcycle/families.py"
        )


def _check_experts(cfg: Config, name: str, mixture: MixtureConfig) -> None:
    experts, router = len(cfg.branches) + mixture.assemble.include_seed, mixture.assemble.router
    if router.kind == "top_k" and router.top_k > experts:
        raise ValueError(
            f"mixtures.{name}.assemble.router.top_k={router.top_k} exceeds the {experts} experts "
            f"({', '.join(['seed'] * mixture.assemble.include_seed + list(cfg.branches))}); "
            "lower top_k or add a branch"
        )


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
        for name, item in found.items():
            if item.get("path") and item.get("train"):
                raise ValueError(
                    f"{key}.{name}: got path={item['path']} and train, expected exactly one of them; set {key}.{name}.train=null "
                    "to take the checkpoint as it is"
                )
        raw[key] = {
            name: item if item.get("path") else item | {"train": merged(defaults, item.get("train"))}
            for name, item in found.items()
        }
    if raw.get("dense") is not None:
        for key in ("tokens", "proportions"):
            if key in raw["dense"]:
                raise ValueError(
                    f"dense.{key}={raw['dense'][key]}: the dense continuation gets the tokens of all branches and the longest "
                    f"mixture, domain by domain, so that the comparison is fair; leave dense.{key} out"
                )
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
