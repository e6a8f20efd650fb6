"""From Hydra's composed YAML to frozen dataclasses, once. Unknown keys, missing keys and wrong types stop here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
    nearest,
)
from upcycle.directories import read_config, resolve, weight_files
from upcycle.mistakes import in_words
from upcycle.phases import plan_phases

# Where a setting of every branch or mixture may stand once, for all of them.
SHARED = {("branches", "train"): "branch", ("mixtures", "train"): "mix", ("mixtures", "assemble"): "assemble"}
OWN_NAMES = ("seed", "soup", "dense", "oracle")  # what the report calls the models that are neither branch nor mixture


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How stages are run. Nothing here changes a result, so nothing here is part of an artifact's key.

    config: the launch file of the stages that several processes make together, a name in launch/accelerate or a path; None
    runs every stage in this process. processes: of all machines together (None: one for each GPU of this machine).
    main_address: host:port of the first machine. offload: where ZeRO keeps what the step itself does not need.
    parallel_branches: so many branches are trained side by side, on equal shares of this machine.
    """

    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    config: str | None = None
    processes: int | None = Field(default=None, ge=1)
    machines: int = Field(default=1, ge=1)
    machine_rank: int = Field(default=0, ge=0)
    main_address: str | None = Field(default=None, pattern=r"^[^:]+:\d+$")
    offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    parallel_branches: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _means_something(self):
        if self.machine_rank >= self.machines:
            raise ValueError(
                f"machine_rank={self.machine_rank} is not below machines={self.machines}; machines are numbered from 0"
            )
        if self.machines > 1 and (self.main_address is None or self.processes is None):
            raise ValueError(
                f"machines={self.machines} need main_address=HOST:PORT, of the first one, and processes, of all together"
            )
        if self.processes is not None and self.processes % self.machines:
            raise ValueError(f"processes={self.processes} is not a multiple of machines={self.machines}; make it one")
        if self.config is None:
            for name, unset in (("processes", None), ("machines", 1), ("offload", "none")):
                if getattr(self, name) != unset:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect without a group of processes; add launch=accelerate "
                        "and launch.config, such as zero2"
                    )
        if self.machines > 1 and self.parallel_branches > 1:
            raise ValueError(
                f"parallel_branches={self.parallel_branches} divides one machine, and machines={self.machines} join theirs; "
                "set one of them to 1"
            )
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError(f"offload={self.offload} and nvme_path={self.nvme_path}: each needs the other; give both")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackConfig:
    """Where progress goes: the terminal, and Weights & Biases (`offline` needs no account)."""

    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "upcycle"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run. `plan`: print the stages and stop. `stage`: compute only that one.

    `out`: where the one mixture is copied to. `dry_run`: print what the mixtures would be and stop.
    """

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
    out: str | None = None
    dry_run: bool = False

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
        if self.out is not None and len(self.mixtures) != 1:
            names = ", ".join(self.mixtures) or "none"
            raise ValueError(
                f"out={self.out}: this experiment makes {len(self.mixtures)} mixtures ({names}), expected exactly one to "
                "copy there; leave out= out and take them from the store"
            )
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
    if not trained:
        raise ValueError(
            f"{where}.tokens={train.tokens}, but no domain has text to train on; add one (such as "
            "+domains@domains.code=code) and its share (+mix.proportions.code=1.0), or set the tokens to 0"
        )
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
    mixtures = [mixture.train for mixture in cfg.mixtures.values() if mixture.train]
    tokens += max((train.steps * train.batch_tokens for train in mixtures), default=0)
    if tokens == 0:
        raise ValueError("dense: no branch or mixture is trained, so there are no tokens to match; set dense=null")
    plan_phases(replace(cfg.dense, tokens=tokens), "dense")


def _check_checkpoint(where: str, path: str | None) -> None:
    """A checkpoint is a directory, or a name on the Hub, of a model with plain weights in safetensors."""
    if path is None:
        return
    try:
        directory = resolve(path)
        read_config(directory)
        weight_files(directory)
    except ValueError as error:
        named = str(error).startswith(f"{path}: ")  # it says what was given itself
        raise ValueError(f"{where}={error}" if named else f"{where}={path}: {error}") from None


def _check_experts(cfg: Config, name: str, mixture: MixtureConfig) -> None:
    if not cfg.branches:
        raise ValueError(
            f"mixtures.{name} has no branch to be made of, expected at least one; give it as branches.NAME.path=DIR "
            "with a name of your choice"
        )
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
    """The run's settings. `branch` holds what branches share; `mix` and `assemble` what mixtures share.

    Training on 0 tokens is no training. Raises ValueError, naming the key's path and the nearest valid names.
    """
    raw = dict(raw)
    shared = {key: dict(raw.pop(key, None) or {}) for key in SHARED.values()}
    own = {key: raw.get(key) or {} for key in ("branches", "mixtures")}
    for key, items in own.items():
        if not isinstance(items, dict):
            raise ValueError(f"{key}={items}: expected settings by name; give each as {key}.NAME.KEY=VALUE")
    raw["dry_run"] = shared["assemble"].pop("dry_run", False)
    raw["branches"] = {name: _branch(name, item, shared["branch"]) for name, item in own["branches"].items()}
    raw["mixtures"] = {name: _mixture(item, shared) for name, item in own["mixtures"].items()}
    if raw.get("dense") is not None:
        raw["dense"] = _dense(raw["dense"], shared)
    try:
        return TypeAdapter(Config).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = [_as_written(line, own, shared) for line in in_words(Config, error)]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None


def _branch(name: str, item: Any, defaults: dict) -> Any:
    if not isinstance(item, dict):
        return item  # pydantic names it
    if item.get("path") and item.get("train"):
        raise ValueError(
            f"branches.{name}: got path={item['path']} and train, expected exactly one of them; set "
            f"branches.{name}.train=null to take the checkpoint as it is"
        )
    return item if item.get("path") else item | {"train": _trained(defaults, item)}


def _mixture(item: Any, shared: dict[str, dict]) -> Any:
    if not isinstance(item, dict):
        return item
    if shared["assemble"]:
        item = item | {"assemble": merged(shared["assemble"], item.get("assemble"))}
    return item | {"train": _trained(shared["mix"], item)}


def _trained(defaults: dict, item: dict) -> dict | None:
    train = merged(defaults, item.get("train"))
    return None if train.get("tokens") == 0 else train


def _dense(dense: dict, shared: dict[str, dict]) -> dict:
    for key in ("tokens", "proportions"):
        if key in dense:
            raise ValueError(
                f"dense.{key}={dense[key]}: the dense continuation gets the tokens of all branches and the longest "
                f"mixture, domain by domain, so that the comparison is fair; leave dense.{key} out"
            )
    shares = {"proportions": shared["mix"].get("proportions")}  # a placeholder: the recipe works out the matched ones
    return merged(shared["branch"] | shares, dense)


def _as_written(line: str, own: dict[str, dict], shared: dict[str, dict]) -> str:
    """A message about mixtures.NAME.train.KEY, as one about the key that the user wrote: mix.KEY, if it came from there."""
    found = re.match(r"(branches|mixtures)\.([^.]+)\.(train|assemble)(?:\.(\w+(?:\.\w+)*))?(?!\w)", line)
    if found is None or (found[1], found[3]) not in SHARED:
        return line
    key, rest = SHARED[found[1], found[3]], found[4]
    item = own[found[1]][found[2]].get(found[3]) or {}
    # A message about a whole run names the settings that clash.
    mine = _holds(item, rest.split(".")) if rest else any(re.search(rf"\b{name}\b", line) for name in item)
    if mine or not shared[key]:
        return line
    return (f"{key}.{rest}" if rest else key) + line[found.end() :]


def _holds(item: dict, path: list[str]) -> bool:
    """Whether the value at `path` is this dict's own; `merged` replaces lists and `proportions` whole."""
    node: Any = item
    for part in path:
        if not isinstance(node, dict):
            return True
        if part not in node:
            return False
        if part == "proportions":
            return True
        node = node[part]
    return True
