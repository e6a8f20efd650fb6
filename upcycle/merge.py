"""Merging methods: one tensor of N models -> one tensor. The table of their names; docs/merging.md compares them.

METHODS["ties"](Merging("model.norm.weight", members, seed), density=0.3)      # options are checked, the result is fp32
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from upcycle.camex_merging import BASES, camex
from upcycle.camex_merging import KEYS as CAMEX
from upcycle.config import nearest
from upcycle.curvature_merging import fisher, gradient_matching, mats, regmean
from upcycle.merge_config import MergeConfig, RoleConfig
from upcycle.merging import SEED, Merging, average
from upcycle.task_vectors import dare, dare_ties, task_arithmetic, ties

Options = Mapping[str, Any]
OF_LINEARS = {"gram", "kfac_in", "kfac_out"}  # statistics that only linears' weights have
KEPT = "seed"  # in settings, in a method's place: the tensor is the seed's own


@dataclass(frozen=True)
class Method:
    """A pure function of a `Merging` and keyword options, whose defaults and limits its signature states.

    needs: names of the statistics (`merging.Member`) that it reads with these options; "gram" and K-FAC's are of linears'
    weights only, the others of every tensor. needs_seed: it takes differences from the seed. reads_seed: it reads the
    seed's statistics whether or not the seed is a member. idle: options that say nothing beside the others.
    """

    function: Callable[..., Tensor]
    formula: str
    needs_seed: bool = False
    reads_seed: bool = False
    needs: Callable[[Options], tuple[str, ...]] = lambda options: ()
    idle: Callable[[Options], tuple[str, ...]] = lambda options: ()

    @cached_property
    def options(self) -> dict[str, Any]:
        """The default of each option."""
        parameters = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}

    @cached_property
    def _adapters(self) -> dict[str, TypeAdapter]:
        hints = typing.get_type_hints(self.function, include_extras=True)  # asked for several times a tensor
        return {option: TypeAdapter(hints[option]) for option in self.options}

    def __call__(self, merging: Merging, **options: Any) -> Tensor:
        """The merged tensor, fp32. Raises ValueError: see `checked` and the function."""
        return self.function(merging, **self.checked(options))

    def checked(self, options: Options) -> dict[str, Any]:
        """All options: these, and the defaults of the others. Raises ValueError: one unknown, of a wrong value, or idle."""
        name = self.function.__name__
        for option, value in options.items():
            if option not in self.options:
                valid = ", ".join(self.options) or "none"
                raise ValueError(
                    f"merge={name} has no option {option!r}; expected {valid}{nearest(option, self.options)}"
                )
            try:
                self._adapters[option].validate_python(value, strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise ValueError(
                    f"merge={name}: {option}={value!r}: {said[0].lower()}{said[1:]}; the default is {self.options[option]!r}"
                ) from None
        whole = self.options | dict(options)
        for option in set(self.idle(whole)) & set(options):
            raise ValueError(f"merge={name}: {option} has no effect beside the other options; leave it out")
        return whole


def _of_fisher(options: Options) -> tuple[str, ...]:
    return ("fisher", "fisher_norm") if options["normalise"] else ("fisher",)


def _of_mats(options: Options) -> tuple[str, ...]:
    needed = {"identity": (), "gram": ("gram",), "kfac": ("kfac_in", "kfac_out")}
    return needed.get(options["curvature"]) or (_of_fisher(options) if options["curvature"] == "fisher" else ())


def _idle_in_mats(options: Options) -> tuple[str, ...]:
    of_fisher, of_matrix = ("floor", "normalise"), ("off_diagonal",)
    read = {"fisher": of_matrix, "gram": of_fisher, "kfac": of_fisher}
    return read.get(options["curvature"], of_fisher + of_matrix)


def _of_camex(options: Options) -> tuple[str, ...]:
    if options["curvature"] == "fisher":
        return _of_fisher(options)
    return {"learned": CAMEX, "kfac": ("kfac_in", "kfac_out")}.get(options["curvature"], ())


def _idle_in_camex(options: Options) -> tuple[str, ...]:
    own = {
        "learned": ("rank", "steps", "lr", "batch_sequences", "decay"),
        "fisher": ("floor", "normalise"),
        "kfac": ("off_diagonal", "iterations", "tolerance"),
    }
    idle = [name for kind, names in own.items() if kind != options["curvature"] for name in names]
    return (*idle, *(["base"] if options["alpha"] == 1 and options["curvature"] != "learned" else []))


METHODS: dict[str, Method] = {
    "average": Method(average, "Σ w θ, Σ w = 1"),
    "weighted": Method(average, "Σ w θ, Σ w = 1"),  # the same: a name for where weights differ
    "task_arithmetic": Method(task_arithmetic, "θ₀ + λ Σ w τ", needs_seed=True),
    "ties": Method(ties, "θ₀ + λ · mean of the trimmed τ that have the elected sign", needs_seed=True),
    "dare": Method(dare, "θ₀ + λ Σ w m ⊙ τ / (1 − p)", needs_seed=True),
    "dare_ties": Method(dare_ties, "θ₀ + λ · mean of the m ⊙ τ / (1 − p) that have the elected sign", needs_seed=True),
    "fisher": Method(fisher, "Σ c θ / Σ c, c = w max(F, floor) / ‖F‖", needs=_of_fisher),
    "regmean": Method(regmean, "(Σ w G)⁻¹ Σ w G W", needs=lambda options: ("gram",)),
    "gradient_matching": Method(
        gradient_matching,
        "θ₀ + Σ α w (H₀ + H) τ / (H₀ + Σ α w H)",
        needs_seed=True,
        reads_seed=True,
        needs=lambda options: (options["curvature"],),
    ),
    "camex": Method(camex, "θ_m + α Σ M (s τ), τ = θ − θ_m", needs_seed=True, needs=_of_camex, idle=_idle_in_camex),
    "mats": Method(mats, "(Σ C) θ = Σ C θᵢ by conjugate gradient", needs_seed=True, needs=_of_mats, idle=_idle_in_mats),
}


def check_options(name: str, options: Options | None = None) -> dict[str, Any]:
    """All options of the method: these, and the defaults of the others. Raises ValueError: no such method; `Method.checked`."""
    if name not in METHODS:
        raise ValueError(f"merge={name!r} is not known; expected one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    return METHODS[name].checked(options or {})


def needed_statistics(name: str, options: Options | None = None) -> tuple[str, ...]:
    """Which statistics of the members the method reads with these options. Raises ValueError: see `check_options`."""
    return METHODS[name].needs(check_options(name, options))


def check_merge(config: MergeConfig, models: Iterable[str]) -> None:
    """Raises ValueError: a method that is not known, options that are not its own, weights of models that are not merged, or
    of none of them; a role that goes the way that all tensors go."""
    models = list(models)
    for where, way in [("", config.of("")), *((f"merge.roles.{role}: ", way) for role, way in config.roles.items())]:
        try:
            if way.method != KEPT:
                check_options(way.method, way.options)
            elif way.options:
                raise ValueError(
                    f"merge=seed is the seed's tensor as it is, and has no option {next(iter(way.options))!r}; leave it out"
                )
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
    for role, way in config.roles.items():
        if (way.method, way.options) == (config.method, config.options):
            raise ValueError(f"merge.roles.{role} says what holds for all tensors; leave it out")
    for name in config.weights:
        if name not in models:
            raise ValueError(
                f"merge.weights.{name}: not one of the models that are merged ({', '.join(models)}){nearest(name, models)}"
            )
    if all(config.weights.get(name, 1.0) == 0 for name in models):
        raise ValueError(f"merge.weights are 0 for all models ({', '.join(models)}); leave one above 0")
    for way in config.ways:
        if way.method == "camex":
            _check_base(check_options(way.method, way.options)["base"], models)
    if "camex" in statistics_of(config):
        learned_options(config)
    if config.weights and all(way.method == KEPT for way in config.ways):
        raise ValueError("merge.weights have no effect where every tensor is the seed's own; leave them out")


def _check_base(base: str, models: list[str]) -> None:
    """Of camex. Raises ValueError: no such model, or a model whose name means something else."""
    if base != SEED and base in BASES and base in models:
        raise ValueError(
            f"merge=camex: base={base} is no model's name here, and a branch is called so; rename that branch"
        )
    if base not in BASES and base not in models:
        known = [*BASES, *(name for name in models if name != SEED)]
        raise ValueError(
            f"merge=camex: base={base!r} is not known, expected one of {', '.join(known)}{nearest(base, known)}"
        )


def statistics_of(config: MergeConfig) -> tuple[str, ...]:
    """The kinds of curvature (curvature.STATISTICS) that some tensors' method reads, in sorted order."""
    return tuple(sorted({kind for way in config.ways for kind in kinds_of(way)}))


def kinds_of(way: RoleConfig) -> set[str]:
    """The kinds of curvature that a method reads with its options."""
    keys = () if way.method == KEPT else needed_statistics(way.method, way.options)
    return {key.split("_")[0] for key in keys}


def learned_options(config: MergeConfig) -> dict[str, Any]:
    """All options of the camex merge whose curvature is learned. Raises ValueError: two roles would learn it differently."""
    found = [check_options(way.method, way.options) for way in config.ways if "camex" in kinds_of(way)]
    if any(one != found[0] for one in found):
        raise ValueError(
            "merge: two roles learn camex with different options, and one learning serves all tensors; give them the same options"
        )
    if others := set(statistics_of(config)) - {"camex"}:
        raise ValueError(
            f"merge: camex is learned beside a role that reads other curvature ({', '.join(sorted(others))}), which is not there yet; choose a method "
            "without curvature for that role, or curvature=fisher or kfac for camex"
        )
    return found[0]


def learning(
    config: MergeConfig,
    models: Iterable[str],
    texts: Mapping[str, Mapping[str, float]],
    sequence_length: int,
    rng_seed: int,
    assemble: Any = None,
) -> dict[str, Any]:
    """What `stages.learn_camex` is told of a merge of these models: the settings, and the shares of domains of each model's text."""
    return {
        "options": learned_options(config),
        "merge": config,
        "weights": {name: config.weights.get(name, 1.0) for name in models},
        "texts": dict(texts),
        "sequence_length": sequence_length,
        "rng_seed": rng_seed,
        "assemble": assemble,
    }


def readers(config: MergeConfig, members: Iterable[str]) -> dict[str, list[str]]:
    """{kind of curvature: the models whose it is} that a merge of these members reads; the seed's also where it is no member."""
    weighed = [name for name in members if config.weights.get(name, 1.0) > 0]
    seeds = {
        kind for way in config.ways if way.method != KEPT and METHODS[way.method].reads_seed for kind in kinds_of(way)
    }
    return {kind: ([SEED] if kind in seeds and SEED not in weighed else []) + weighed for kind in statistics_of(config)}


def by_linears_only(way: RoleConfig, in_axis: int | None) -> bool:
    """Whether the method reads what only linears' weights have, and the tensor is none: it is averaged."""
    return in_axis is None and way.method != KEPT and bool(OF_LINEARS & set(needed_statistics(way.method, way.options)))
