"""The pipelines, as plain Python: one line a stage. Declaring a stage computes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from evals.stages import compare_models, evaluate_model
from launch.config import Config
from upcycle.batches import consumed_tokens
from upcycle.config import TrainConfig
from upcycle.cost import Shape
from upcycle.directories import fingerprint as model_fingerprint
from upcycle.directories import resolve
from upcycle.documents import fingerprint
from upcycle.stages import (
    assemble_moe,
    collect_documents,
    import_model,
    merge_models,
    prepare_seed,
    tokenize_documents,
    train_model,
    train_tokenizer,
)
from upcycle.store import Artifact, Store


@dataclass
class Lineage:
    """What a model is and what it took: known from the settings, before anything runs.

    tokens and flops are None for a branch that was brought along: nobody here knows what it cost. A seed that was brought
    along counts nothing: all models have it in common.
    """

    shape: Shape
    tokens: int | None = 0
    flops: float | None = 0.0
    stages: list[list[str]] = field(default_factory=list)

    def trained(self, config: TrainConfig, stages: list[str]) -> Lineage:
        """This lineage after one more training run of `config.steps` steps."""
        tokens = config.steps * config.batch_tokens
        flops = tokens * self.shape.train_flops_per_token(config.sequence_length)
        return Lineage(self.shape, _sum(self.tokens, tokens), _sum(self.flops, flops), [*self.stages, stages])


@dataclass
class Experiment:
    """The stages of a run in order (`store.stages`), every model's lineage by stage name, the mixtures as they end up
    (trained, if they are), and the report's stage; without domains there is nothing to measure on, and no report."""

    store: Store
    lineages: dict[str, Lineage]
    mixtures: dict[str, Artifact]
    report: Artifact | None


def upcycle(cfg: Config, store: Store) -> Experiment:
    """seed -> branches -> soup, dense continuation, mixtures -> evaluations -> report."""
    data, tokenizer = _data(cfg, store) if cfg.seed.path is None else ({}, None)
    seed = _seed(cfg, store, tokenizer, data)
    if cfg.seed.path is not None:
        data, _ = _data(cfg, store, tokenizer=seed)
    seed_used = _consumed(cfg.seed.train) if cfg.seed.train else {}
    models, kinds, lineages = {"seed": seed}, {"seed": "seed"}, {"seed": _seed_lineage(cfg)}

    branches, used = {}, dict(seed_used)
    for name, branch in cfg.branches.items():
        if branch.train is None:
            branches[name] = _imported(store, f"branch/{name}", str(branch.path))
            lineages[name] = Lineage(lineages["seed"].shape, None, None, [[f"branch/{name}"]])
        else:
            branches[name] = _train(store, f"branch/{name}", branch.train, used, seed, data)
            lineages[name] = lineages["seed"].trained(branch.train, [f"branch/{name}"])
            used = _add(used, _consumed(branch.train))  # the next branch's share of a common domain is other text
        models[name], kinds[name] = branches[name], "branch"
    together = _together(cfg, lineages)

    if cfg.soup:
        settings = {"method": "average", "include_seed": True}
        models["soup"] = store.stage("soup", merge_models, settings, seed=seed, branches=branches)
        kinds["soup"], lineages["soup"] = "soup", replace(together, stages=[*together.stages, ["soup"]])

    for name, mixture in cfg.mixtures.items():
        assembled = store.stage(f"assemble/{name}", assemble_moe, mixture.assemble, seed=seed, branches=branches)
        shape = lineages["seed"].shape.assembled(mixture.assemble, len(branches) + mixture.assemble.include_seed)
        start = replace(together, shape=shape, stages=[*together.stages, [f"assemble/{name}"]])
        models[name], kinds[name], lineages[name] = assembled, mixture.kind, start
        if mixture.train is not None:
            models[name] = _train(store, f"mix/{name}", mixture.train, used, assembled, data)
            lineages[name] = start.trained(mixture.train, [f"mix/{name}"])

    if cfg.dense is not None:
        dense = _dense(cfg)
        models["dense"] = _train(store, "dense", dense, seed_used, seed, data)
        kinds["dense"], lineages["dense"] = "dense", lineages["seed"].trained(dense, ["dense"])

    mixtures = {name: models[name] for name in cfg.mixtures}
    return Experiment(store, lineages, mixtures, _measured(cfg, store, models, kinds, lineages, data))


def _measured(
    cfg: Config,
    store: Store,
    models: dict[str, Artifact],
    kinds: dict[str, str],
    lineages: dict[str, Lineage],
    data: dict[str, Artifact],
) -> Artifact | None:
    """Every model on every domain, and the report that compares them; None without domains."""
    if not data:
        return None
    measured = replace(cfg.eval, bootstrap_samples=0)  # the report's business
    evaluations = {
        name: store.stage(f"eval/{name}", evaluate_model, measured, model=model, data=data)
        for name, model in models.items()
    }
    settings = {
        "experiment": cfg.name,
        "rows": [_row(cfg, name, kinds[name], lineages[name]) for name in models],
        "domains": {name: domain.trained for name, domain in cfg.domains.items()},
        "baseline": "dense" if cfg.dense is not None else None,
        "settings": {
            "rng_seed": cfg.rng_seed,
            "artifacts": {name: stage.key[:8] for name, stage in store.stages.items()},
        },
        "eval": cfg.eval,
    }
    return store.stage("report", compare_models, settings, evaluations=evaluations, stages=dict(store.stages))


def _data(cfg: Config, store: Store, tokenizer: Artifact | None = None) -> tuple[dict[str, Artifact], Artifact]:
    """Token artifacts by domain, and the tokenizer: the seed's, or one trained on the domains' training text."""
    documents = {}
    for name, domain in cfg.domains.items():
        keyed, outside = {"domain": replace(domain, num_proc=None), "data": cfg.data}, {"num_proc": domain.num_proc}
        documents[name] = store.stage(f"documents/{name}", collect_documents, keyed, fingerprint(domain), outside)
    if tokenizer is None:
        assert cfg.seed.tokenizer is not None
        sources = {name: documents[name] for name in cfg.seed.tokenizer.proportions}
        tokenizer = store.stage("tokenizer", train_tokenizer, cfg.seed.tokenizer, documents=sources)
    data = {
        name: store.stage(
            f"tokens/{name}", tokenize_documents, None, outside={"num_proc": cfg.domains[name].num_proc},
            documents=found, tokenizer=tokenizer,
        )
        for name, found in documents.items()
    }  # fmt: skip
    return data, tokenizer


def _seed(cfg: Config, store: Store, tokenizer: Artifact | None, data: dict[str, Artifact]) -> Artifact:
    if cfg.seed.path is not None:
        return _imported(store, "seed", cfg.seed.path)
    assert cfg.seed.train is not None
    used = {name: data[name] for name in cfg.seed.train.proportions}
    return store.stage("seed", prepare_seed, cfg.seed, tokenizer=tokenizer, data=used)


def _imported(store: Store, name: str, path: str) -> Artifact:
    directory = resolve(path)
    return store.stage(name, import_model, None, model_fingerprint(directory), {"path": str(directory)})


def _train(
    store: Store, name: str, train: TrainConfig, skip: dict[str, int], model: Artifact, data: dict[str, Artifact]
) -> Artifact:
    """A training stage; only the domains it draws from are its inputs."""
    settings = {"train": train, "skip_tokens": {domain: skip.get(domain, 0) for domain in sorted(train.proportions)}}
    used = {name: data[name] for name in train.proportions}
    return store.stage(name, train_model, settings, model=model, data=used)


def _consumed(train: TrainConfig) -> dict[str, int]:
    sequences = train.steps * train.batch_sequences
    return consumed_tokens(train.proportions, train.rng_seed, train.sequence_length, sequences)


def _add(used: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {domain: used.get(domain, 0) + more.get(domain, 0) for domain in {*used, *more}}


def _together(cfg: Config, lineages: dict[str, Lineage]) -> Lineage:
    """All branches: their tokens and FLOPs add up, the seed's counted once; they can run side by side."""
    seed, branches = lineages["seed"], [lineages[name] for name in cfg.branches]
    return Lineage(
        seed.shape,
        _sum(seed.tokens, *(_sum(branch.tokens, seed.tokens, sign=-1) for branch in branches)),
        _sum(seed.flops, *(_sum(branch.flops, seed.flops, sign=-1) for branch in branches)),
        [*seed.stages, [f"branch/{name}" for name in cfg.branches]],
    )


def _sum(first: Any, *more: Any, sign: int = 1) -> Any:
    """first + sign · (the rest); None if any of them is."""
    return None if first is None or None in more else first + sign * sum(more)


def _dense(cfg: Config) -> TrainConfig:
    """Dense continuation: one model on as many tokens of each domain as branches and (the longest) mixture together."""
    assert cfg.dense is not None
    runs = [branch.train for branch in cfg.branches.values() if branch.train]
    if mixtures := [mixture.train for mixture in cfg.mixtures.values() if mixture.train]:
        runs.append(max(mixtures, key=lambda train: train.tokens))
    tokens: dict[str, int] = {}
    for run in runs:
        tokens = _add(tokens, _consumed(run))
    total = sum(tokens.values())
    return replace(cfg.dense, tokens=total, proportions={domain: count / total for domain, count in tokens.items()})


def _seed_lineage(cfg: Config) -> Lineage:
    if cfg.seed.path is not None:
        config = json.loads((resolve(cfg.seed.path) / "config.json").read_text())
        return Lineage(Shape.of_config(config), stages=[["seed"]])
    assert cfg.seed.train is not None and cfg.seed.tokenizer is not None
    sizes = {**cfg.seed.sizes, "model_type": cfg.seed.architecture, "vocab_size": cfg.seed.tokenizer.vocab_size}
    return Lineage(Shape.of_config(sizes)).trained(cfg.seed.train, ["seed"])


def _row(cfg: Config, name: str, kind: str, lineage: Lineage) -> dict[str, Any]:
    own = (
        {"dense": cfg.dense}
        | {n: b.train for n, b in cfg.branches.items()}
        | {n: m.train for n, m in cfg.mixtures.items()}
    )
    train = cfg.seed.train if name == "seed" else own.get(name)
    return {
        "name": name,
        "kind": kind,
        "parameters": lineage.shape.parameters,
        "active_parameters": lineage.shape.active_parameters,
        "train_tokens": lineage.tokens,
        "train_flops": lineage.flops,
        "stages": lineage.stages,
        "learning_rate": train.lr if train else None,
    }
