"""From Hydra's composed YAML to frozen dataclasses, once. Unknown keys, missing keys and wrong types stop here."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from launch.budget import shared_out
from launch.checks import check
from launch.running import LaunchConfig, SlurmConfig, TrackConfig
from upcycle.config import (
    STRICT,
    AblationConfig,
    BranchConfig,
    DataConfig,
    DomainConfig,
    EnsembleConfig,
    EvalConfig,
    SeedConfig,
    TasksConfig,
    TextsConfig,
    TrainConfig,
)
from upcycle.merge_config import MergeConfig
from upcycle.mistakes import in_words
from upcycle.mixture_config import MixtureConfig

RUN_NAME = r"^[\w.-]*\w$"
# Where a setting of every branch or mixture may stand once, for all of them.
SHARED = {("branches", "train"): "branch", ("mixtures", "train"): "mix", ("mixtures", "assemble"): "assemble"}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run. `plan`: print the stages and stop. `stage`: compute only that one.

    `dense`: one model on the tokens of branches and mixture, `dense_compute`: on as many FLOPs. `match_to`: the mixture that
    others are matched to (None: the first trained one). `btm`: seed and branches as an ensemble. `merges`: dense models of seed
    and branches, each by its own method, and `curvature`, on what the statistics that merges read are measured. `tokens`: what all branches
    and mixtures were given, if it was said so (launch.budget). `out`: where the one mixture or merged model is copied to. `dry_run`: print
    what the mixtures would be and stop. `ablation`: measure what each expert is worth; None does not.
    """

    name: str = Field(pattern=RUN_NAME)
    rng_seed: int = Field(ge=0)
    plan: bool
    stage: str | list[str] | None
    artifacts: str
    seed: SeedConfig
    domains: dict[str, DomainConfig]
    data: DataConfig
    branches: dict[str, BranchConfig]
    soup: bool
    dense: TrainConfig | None
    mixtures: dict[str, MixtureConfig]
    eval: EvalConfig
    launch: Annotated[LaunchConfig | SlurmConfig, Field(discriminator="scheduler")]
    track: TrackConfig
    tasks: TasksConfig | None = None
    dense_compute: TrainConfig | None = None
    match_to: str | None = None
    btm: EnsembleConfig | None = None
    greedy_soup: bool = False
    merges: dict[str, MergeConfig] = Field(default_factory=dict)
    curvature: TextsConfig = TextsConfig()
    tokens: int | None = None
    out: str | None = None
    dry_run: bool = False
    ablation: AblationConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        check(self)
        return self

    @property
    def trained_domains(self) -> list[str]:
        return [name for name, domain in self.domains.items() if domain.trained]

    @property
    def unmatched(self) -> dict[str, TrainConfig]:
        """The mixtures that are trained on tokens of their own, and from branches: those that others can be matched to."""
        return {
            name: mixture.train
            for name, mixture in self.mixtures.items()
            if mixture.train and mixture.match == "none" and not mixture.scratch
        }

    def runs(self) -> dict[str, TrainConfig]:
        """Every training run whose settings are the user's own (the dense continuation's follow from them), by key path."""
        found = {"seed.train": self.seed.train}
        found |= {f"branches.{name}.train": branch.train for name, branch in self.branches.items()}
        found |= {f"mixtures.{name}.train": mixture.train for name, mixture in self.mixtures.items()}
        return {where: train for where, train in found.items() if train is not None}


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
    _check_objects(raw)
    raw = shared_out(raw)
    shared = {key: dict(raw.pop(key, None) or {}) for key in SHARED.values()}
    own = {key: raw.get(key) or {} for key in ("branches", "mixtures")}
    for key, items in own.items():
        if not isinstance(items, dict):
            raise ValueError(f"{key}={items}: expected settings by name; give each as {key}.NAME.KEY=VALUE")
    if (one := raw.pop("merge", None)) is not None:
        raw["merges"] = _with_merge(raw.get("merges") or {}, one)
    raw["dry_run"] = shared["assemble"].pop("dry_run", False) or raw.get("dry_run", False)
    raw["launch"] = {"scheduler": "none"} | raw["launch"]
    _check_shared_assembly(shared["assemble"], own["mixtures"])
    raw["branches"] = {name: _branch(name, item, shared["branch"]) for name, item in own["branches"].items()}
    raw["mixtures"] = {name: _mixture(name, item, shared) for name, item in own["mixtures"].items()}
    for name in ("dense", "dense_compute"):
        if raw.get(name) is not None:
            raw[name] = _dense(name, raw[name], shared)
    try:
        return TypeAdapter(Config).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        lines = [_as_written(line, own, shared) for line in in_words(Config, error)]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None


def _with_merge(merges: Any, one: Any) -> Any:
    """`merges` and the one that is set by `merge`."""
    if not isinstance(merges, dict):
        return merges  # pydantic names it
    if "merged" in merges:
        raise ValueError(
            "merge and merges.merged are two settings of one model; leave one out, or give the other another name"
        )
    return {"merged": one} | merges


def _check_objects(raw: dict[str, Any]) -> None:
    """Raises ValueError: what is to be merged with other settings is none, in pydantic's words."""
    found = {name: raw.get(name) for name in (*SHARED.values(), "dense", "dense_compute")}
    for key, part in SHARED:
        items = raw.get(key)
        for name, item in items.items() if isinstance(items, dict) else ():
            found[f"{key}.{name}.{part}"] = item.get(part) if isinstance(item, dict) else None
    for where, value in found.items():
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{where}: Input should be an object (got {value!r})")


def _check_shared_assembly(shared: dict, mixtures: dict[str, Any]) -> None:
    """What mixtures share is read by one of them at least; presets of their own say everything themselves."""
    for path in _leaves(shared):
        if mixtures and all(
            isinstance(item, dict) and _holds(item.get("assemble") or {}, path) for item in mixtures.values()
        ):
            raise ValueError(
                f"assemble.{'.'.join(path)} has no effect: each mixture here ({', '.join(mixtures)}) has a preset of its own; write "
                f"assemble@mixtures.NAME.assemble=PRESET, or mixtures.NAME.assemble.{'.'.join(path)}=VALUE"
            )


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> list[list[str]]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (_leaves(value, (*path, key)) if isinstance(value, dict) and value else [[*path, key]])
    ]


def _branch(name: str, item: Any, defaults: dict) -> Any:
    if not isinstance(item, dict):
        return item  # pydantic names it
    if item.get("path") and item.get("train"):
        raise ValueError(
            f"branches.{name}: got path={item['path']} and train, expected exactly one of them; set "
            f"branches.{name}.train=null to take the checkpoint as it is"
        )
    return item if item.get("path") else item | {"train": _trained(defaults, item)}


def _mixture(name: str, item: Any, shared: dict[str, dict]) -> Any:
    if not isinstance(item, dict):
        return item
    for key in ("tokens", "proportions"):
        if item.get("match", "none") != "none" and (own := (item.get("train") or {}).get(key)):
            raise ValueError(
                f"mixtures.{name}.train.{key}={own}: match={item['match']} says how many tokens of which domains it gets; leave "
                f"{key} out, or write match: none"
            )
    if shared["assemble"]:
        item = item | {"assemble": merged(shared["assemble"], item.get("assemble"))}
    return item | {"train": _trained(shared["mix"], item)}


def _trained(defaults: dict, item: dict) -> dict | None:
    train = merged(defaults, item.get("train"))
    return None if train.get("tokens") == 0 else train


DENSE_TOKENS = {
    "dense": "the dense continuation gets the tokens of all branches and the longest mixture, domain by domain",
    "dense_compute": "it gets as many tokens as have the reference mixture's FLOPs, of its domains",
}


def _dense(name: str, dense: dict, shared: dict[str, dict]) -> dict:
    for key in ("tokens", "proportions"):
        if key in dense:
            raise ValueError(
                f"{name}.{key}={dense[key]}: {DENSE_TOKENS[name]}, so that the comparison is fair; leave {name}.{key} out"
            )
    shares = {"proportions": shared["mix"].get("proportions")}  # a placeholder: the recipe works out the matched ones
    return merged(shared["branch"] | shares, dense)


def _as_written(line: str, own: dict[str, dict], shared: dict[str, dict]) -> str:
    """A message about mixtures.NAME.train.KEY, as one about the key that the user wrote: mix.KEY, if it came from there."""
    line = re.sub(r"^merges\.merged\b", "merge", line)
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


def plain(cfg: Config) -> dict[str, Any]:
    """The settings as composed, as JSON has them."""
    return json.loads(TypeAdapter(Config).dump_json(cfg))
