"""What of a run's settings does not fit together, found before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evals.suites import check_tasks
from launch.merges import check_merges, reads
from upcycle.config import SeedConfig, TrainConfig, nearest
from upcycle.cost import Shape, placed
from upcycle.directories import read_config, resolve, weight_files
from upcycle.init_texts import check_texts, sources_of
from upcycle.mixture_config import MixtureConfig
from upcycle.phases import check_experts, plan_phases

if TYPE_CHECKING:
    from launch.config import Config

LEAST_SAMPLES = 100  # of the bootstrap; below, 2.5% are fewer than three draws
# What the report calls the models that are neither branch nor mixture.
OWN_NAMES = ("seed", "soup", "greedy_soup", "btm", "dense", "dense_compute", "oracle")


def check(cfg: Config) -> None:
    """The parts of a run fit together. Raises ValueError, naming the key's path."""
    _check_names(cfg)
    for where, train in cfg.runs().items():
        _check_proportions(cfg, where, train)
        if where not in _matched_runs(cfg):  # the recipe lays their phases over the tokens that it gives them
            plan_phases(train, where)
        check_experts(train, _experts_of(cfg, where), where)
    _check_dense(cfg)
    _check_matching(cfg)
    _check_together(cfg)
    _check_evaluation(cfg)
    _check_tasks(cfg)
    _check_checkpoint("seed.path", cfg.seed.path)
    for name, branch in cfg.branches.items():
        _check_checkpoint(f"branches.{name}.path", branch.path)
    members = {name: _check_experts(cfg, name, mixture) for name, mixture in cfg.mixtures.items()}
    check_merges(cfg, members)
    _check_positions(cfg)
    models = [*cfg.mixtures, *cfg.merges]
    if cfg.out is not None and len(models) != 1:
        names, what = ", ".join(models) or "none", "mixtures and merges" if cfg.merges else "mixtures"
        raise ValueError(
            f"out={cfg.out}: this experiment makes {len(models)} {what} ({names}), expected exactly one to "
            "copy there; leave out= out and take them from the store"
        )


def _check_names(cfg: Config) -> None:
    taken = dict.fromkeys(OWN_NAMES, "a model of every report")
    for where, names in (("branches", cfg.branches), ("merges", cfg.merges), ("mixtures", cfg.mixtures)):
        for name in names:
            if name in taken:
                raise ValueError(
                    f"{where}.{name}: that name belongs to {taken[name]}, expected names that are all different "
                    f"(and none of {', '.join(OWN_NAMES)}); rename {where}.{name}"
                )
            taken[name] = f"{where}.{name}"


def _check_proportions(cfg: Config, where: str, train: TrainConfig) -> None:
    trained = cfg.trained_domains
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
    """Every domain needs documents in the split that models are measured on, and intervals enough draws."""
    if cfg.domains and cfg.eval.bootstrap_samples < LEAST_SAMPLES:
        raise ValueError(
            f"eval.bootstrap_samples={cfg.eval.bootstrap_samples}: expected at least {LEAST_SAMPLES}, of which the ends of a 95% "
            "interval can be read; raise it"
        )
    for name, domain in cfg.domains.items():
        if getattr(domain, f"{cfg.eval.split}_fraction") == 0:
            raise ValueError(
                f"domains.{name}.{cfg.eval.split}_fraction is 0, but eval.split={cfg.eval.split} measures every domain on "
                "that split; raise it or choose the other split"
            )
    ahead = {name: mixture.assemble.router.pool for name, mixture in cfg.mixtures.items()}
    for name, pool in ahead.items() if cfg.domains else ():
        if pool.first == "own_mean" and pool.tokens > cfg.eval.skip_first:
            raise ValueError(
                f"eval.skip_first={cfg.eval.skip_first}: mixtures.{name} routes the first {pool.tokens} tokens of a window by these very tokens "
                f"(pool.first=own_mean), so they are no test; write eval.skip_first={pool.tokens}, for all models alike"
            )


def _check_tasks(cfg: Config) -> None:
    """Every task exists before anything runs, and oracles, which must be told a domain, get none without."""
    if cfg.tasks is None:
        return
    try:
        found = check_tasks(cfg.tasks, list(cfg.domains))
    except ValueError as error:
        raise ValueError(f"tasks.{error}".replace("tasks.tasks.", "tasks.")) from None
    for name, mixture in cfg.mixtures.items():
        if mixture.assemble.router.pool.first == "own_mean":
            raise ValueError(
                f"mixtures.{name} routes its first tokens by later ones (router.pool.first=own_mean), the answers of tasks among them; leave out "
                "that mixture, or tasks"
            )
        kinds = (mixture.assemble.router.kind, mixture.assemble.attention_router.kind)
        if "oracle" in kinds and (outside := [one.name for one in found if one.domain is None]):
            raise ValueError(
                f"mixtures.{name} has an oracle router, which must be told a text's domain, and {outside[0]} of tasks.names "
                "has none; leave out that mixture, or all tasks but the continuations"
            )


def _check_dense(cfg: Config) -> None:
    """The dense continuation's phases must fit the tokens that the recipe will give it."""
    if cfg.dense is None:
        return
    tokens = sum(train.steps * train.batch_tokens for train in dense_runs(cfg))
    if tokens == 0:
        raise ValueError("dense: no branch or mixture is trained, so there are no tokens to match; set dense=null")
    plan_phases(replace(cfg.dense, tokens=tokens), "dense")
    check_experts(cfg.dense, [], "dense")


def dense_runs(cfg: Config) -> list[TrainConfig]:
    """The runs whose tokens the dense continuation gets: every branch's, and the longest mixture's of those not matched."""
    runs = [branch.train for branch in cfg.branches.values() if branch.train]
    longest = max(cfg.unmatched.values(), key=lambda train: train.steps * train.batch_tokens, default=None)
    return runs + ([longest] if longest else [])


def _matched_runs(cfg: Config) -> list[str]:
    return [f"mixtures.{name}.train" for name, mixture in cfg.mixtures.items() if mixture.match != "none"]


def _check_matching(cfg: Config) -> None:
    """There is a mixture to be matched to, and everything it took is known."""
    can = ", ".join(cfg.unmatched) or "none here"
    if cfg.match_to is not None and cfg.match_to not in cfg.unmatched:
        raise ValueError(
            f"match_to={cfg.match_to}: expected a mixture that is trained, from branches and on tokens of its own ({can})"
            f"{nearest(cfg.match_to, cfg.unmatched)}"
        )
    wanting = [f"mixtures.{name}.match" for name, mixture in cfg.mixtures.items() if mixture.match != "none"]
    wanting += ["dense_compute"] if cfg.dense_compute else []
    if wanting and not cfg.unmatched:
        raise ValueError(
            f"{wanting[0]}: there is no mixture to match, expected one that is trained, from branches and on tokens of its own; "
            "add one, or leave it out"
        )
    for name, mixture in cfg.mixtures.items():
        if mixture.scratch and mixture.match != "none" and cfg.seed.train is None:
            raise ValueError(
                f"mixtures.{name}: scratch=true with match={mixture.match} takes the seed's tokens too, and nobody here knows "
                f"what {cfg.seed.path} was trained on; write match=none and its tokens"
            )
    if cfg.dense_compute is not None:
        check_experts(cfg.dense_compute, [], "dense_compute")


def _check_together(cfg: Config) -> None:
    """The ensemble and the greedy soup have models to be made of, and the soup a split of its own to be chosen on."""
    for name, wanted in (("btm", cfg.btm), ("greedy_soup", cfg.greedy_soup)):
        if wanted and not cfg.branches:
            raise ValueError(f"{name} has no branch to be made of, expected at least one; add one, or leave {name} out")
        if wanted and not cfg.trained_domains:
            raise ValueError(
                f"{name} needs the text of a trained domain, and there is none; add one, or leave {name} out"
            )
    count = 1 + len(cfg.branches)
    if cfg.btm is not None and (cfg.btm.top_k or 0) > count:
        raise ValueError(
            f"btm.top_k={cfg.btm.top_k} exceeds the {count} models (seed and {count - 1} branches); lower it, or write null for all"
        )
    if not cfg.greedy_soup:
        return
    if cfg.eval.split == "valid":
        raise ValueError(
            "greedy_soup is chosen on the validation split, and eval.split=valid would measure it there; write eval.split=test, or "
            "greedy_soup=false"
        )
    for name in cfg.trained_domains:
        if cfg.domains[name].valid_fraction == 0:
            raise ValueError(
                f"domains.{name}.valid_fraction is 0, but greedy_soup is chosen on the validation split of every trained "
                "domain; raise it, or write greedy_soup=false"
            )


def _experts_of(cfg: Config, where: str) -> list[str] | None:
    """The experts of the model that is trained there; None where they are known only when it is assembled."""
    kind, _, name = where.partition(".")
    if kind != "mixtures":
        return []
    assemble = cfg.mixtures[name.removesuffix(".train")].assemble
    if assemble.placement != type(assemble.placement)():
        return None
    return ["seed"] * assemble.include_seed + list(cfg.branches)


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


def _check_positions(cfg: Config) -> None:
    """No window of training or evaluation is longer than the seed's positions, where its sizes or its config.json say them."""
    sizes = cfg.seed.sizes if cfg.seed.path is None else read_config(resolve(cfg.seed.path))
    positions = sizes.get("max_position_embeddings") or sizes.get("n_positions")
    if not isinstance(positions, int):
        return
    windows = {where: train.sequence_length for where, train in cfg.runs().items()}
    windows |= {"eval": cfg.eval.sequence_length} if cfg.domains else {}
    merges = [*cfg.merges.values(), *(one.assemble.merge for one in cfg.mixtures.values())]
    windows |= (
        {"curvature": cfg.curvature.sequence_length}
        if cfg.curvature.compare or any(reads(one, ["seed"]) for one in merges)
        else {}
    )
    for where, length in windows.items():
        if length > positions:
            raise ValueError(
                f"{where}.sequence_length={length} exceeds the seed's {positions} positions; expected at most as many; shorten "
                "it, or take a seed that reads longer text"
            )


def _check_experts(cfg: Config, name: str, mixture: MixtureConfig) -> list[str]:
    """The models that have experts: all, where a config.json that leaves its sizes to its class does not tell."""
    if not cfg.branches:
        raise ValueError(
            f"mixtures.{name} has no branch to be made of, expected at least one; give it as branches.NAME.path=DIR "
            "with a name of your choice"
        )
    choice = mixture.assemble
    _check_router_phases(name, mixture)
    try:
        shape = seed_shape(cfg.seed)
        found = placed(shape, choice, list(cfg.branches))
        shape.assembled(choice, list(cfg.branches))
    except KeyError:  # assembly will see
        return ["seed", *cfg.branches]
    except ValueError as error:
        raise ValueError(f"mixtures.{name}.assemble.{error}") from None
    try:
        check_texts(choice, sources_of(choice, cfg.branches), cfg.trained_domains)
    except ValueError as error:
        raise ValueError(f"mixtures.{name}.assemble.{error}") from None
    sides = [("router", choice.router, found.experts)]
    sides += [("attention_router", choice.attention_router, found.attention)] if found.attention else []
    for where, router, experts in sides:
        top_k = found.top_k if where == "router" else router.top_k
        if router.kind == "top_k" and top_k > len(experts):
            names = [expert.name for expert in experts]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"mixtures.{name}.assemble.{where}.top_k={top_k} exceeds the {len(names)} experts ({shown}); "
                "lower top_k or add a branch"
            )
    return list(found.models)


def _check_router_phases(name: str, mixture: MixtureConfig) -> None:
    """No phase names the routers of a mixture that has none to train."""
    if mixture.train is None or any(router.learns for router in mixture.assemble.routers.values()):
        return
    router = mixture.assemble.router
    why = router.facts.weightless or "trained=false"
    for number, phase in enumerate(mixture.train.phases):
        for field in ("trainable", "frozen"):
            if "router" in getattr(phase, field):
                raise ValueError(
                    f"mixtures.{name}.train.phases[{number}].{field} names router, and the routers of this mixture have nothing to "
                    f"train (router.kind={router.kind}, {why}); give it phases of its own: "
                    f"'mixtures.{name}.train.phases=[{{}}]'"
                )


def seed_shape(seed: SeedConfig) -> Shape:
    """The sizes of the seed, known before it is made or read."""
    if seed.path is not None:
        return Shape.of_config(read_config(resolve(seed.path)))
    assert seed.tokenizer is not None
    return Shape.of_config({**seed.sizes, "model_type": seed.architecture, "vocab_size": seed.tokenizer.vocab_size})
