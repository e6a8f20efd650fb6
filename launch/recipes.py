"""The pipelines, as plain Python: one line a stage. Declaring a stage computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evals.stages import (
    ablate_model,
    compare_models,
    evaluate_ensemble,
    evaluate_model,
    greedy_soup,
    run_tasks,
    write_questions,
)
from evals.suites import planned
from launch.checks import dense_runs, seed_shape
from launch.config import Config, plain
from launch.lineage import Lineage, add, consumed, together
from launch.matching import matched, reference_name
from launch.merges import Curvature, curvature_cost, curvature_stages
from upcycle.config import ContinuationsConfig, TrainConfig
from upcycle.cost import placed
from upcycle.directories import fingerprint as model_fingerprint
from upcycle.directories import resolve
from upcycle.documents import fingerprint
from upcycle.init_texts import domains_needed, sources_of
from upcycle.merge_config import MergeConfig
from upcycle.stages import (
    assemble_moe,
    collect_documents,
    draw_moe,
    import_model,
    merge_models,
    prepare_seed,
    tokenize_documents,
    train_model,
    train_tokenizer,
)
from upcycle.store import Artifact, Store


@dataclass
class Experiment:
    """The stages of a run in order (`store.stages`), every model's lineage by stage name, the mixtures as they end up
    (trained, if they are), the merged dense models, and the report's stage; without domains there is nothing to measure on,
    and no report."""

    store: Store
    lineages: dict[str, Lineage]
    mixtures: dict[str, Artifact]
    merges: dict[str, Artifact]
    report: Artifact | None


def upcycle(cfg: Config, store: Store) -> Experiment:
    """seed -> branches -> merges, mixtures, dense continuations -> evaluations -> report."""
    data, tokenizer = _data(cfg, store) if cfg.seed.path is None else ({}, None)
    seed = _seed(cfg, store, tokenizer, data)
    if cfg.seed.path is not None:
        data, _ = _data(cfg, store, tokenizer=seed)
    seed_used = consumed(cfg.seed.train) if cfg.seed.train else {}
    models, kinds, lineages = {"seed": seed}, {"seed": "seed"}, {"seed": _seed_lineage(cfg)}

    branches, used = {}, dict(seed_used)
    for name, branch in cfg.branches.items():
        if branch.train is None:
            branches[name] = _imported(store, f"branch/{name}", str(branch.path))
            lineages[name] = Lineage(lineages["seed"].shape, None, None, [[f"branch/{name}"]])
        else:
            branches[name] = _train(store, f"branch/{name}", branch.train, used, seed, data)
            lineages[name] = lineages["seed"].trained(branch.train, [f"branch/{name}"])
            used = add(used, consumed(branch.train))  # the next branch's share of a common domain is other text
        models[name], kinds[name] = branches[name], "branch"

    curvature = Curvature(cfg, store, {"seed": seed} | branches, data)
    if cfg.curvature.compare:
        curvature.compared()
    merges = _merged(cfg, store, seed, branches, data, curvature)
    for name, stage in merges.items():
        before = curvature_stages(cfg.merges[name], ["seed", *branches], name) if name in cfg.merges else []
        models[name], kinds[name] = stage, "merge" if name in cfg.merges else "soup"
        behind = _together(cfg, lineages)
        if name in cfg.merges:
            behind = behind.read(*curvature_cost(cfg, cfg.merges[name], ["seed", *branches], lineages["seed"].shape))
        lineages[name] = _followed(behind, *before, [stage.name])

    if cfg.btm is not None:
        kinds["btm"], lineages["btm"] = "ensemble", replace(_together(cfg, lineages), copies=1 + len(cfg.branches))

    reference = _reference(cfg, lineages)
    for name, mixture in cfg.mixtures.items():
        assembled = _assembled(cfg, store, name, seed, branches, data, curvature)
        start, train, skip = _before_training(cfg, name, lineages), mixture.train, used
        models[name], kinds[name], lineages[name] = assembled, mixture.kind, start
        if train is not None and mixture.match != "none":
            train = matched(train, mixture.match, start, reference, f"mixtures.{name}.train")
            skip = start.domains or {}  # what is behind it; so copies of the seed read what branches and reference read
        if train is not None:
            models[name] = _train(store, f"mix/{name}", train, skip, assembled, data)
            lineages[name] = start.trained(train, [f"mix/{name}"])

    for name, train in _dense(cfg, lineages["seed"], reference).items():
        models[name] = _train(store, name, train, seed_used, seed, data)
        kinds[name], lineages[name] = "dense", lineages["seed"].trained(train, [name])

    if cfg.curvature.compare and "dense" in models:
        curvature.error_of_task_arithmetic(models["dense"])

    mixtures, own = ({name: models[name] for name in names} for names in (cfg.mixtures, cfg.merges))
    return Experiment(store, lineages, mixtures, own, _measured(cfg, store, models, kinds, lineages, data))


def _merged(
    cfg: Config,
    store: Store,
    seed: Artifact,
    branches: dict[str, Artifact],
    data: dict[str, Artifact],
    curvature: Curvature,
) -> dict[str, Artifact]:
    """The dense models that are made of seed and branches: the soups, and the run's own merges."""
    found = {}
    if cfg.soup:
        found["soup"] = store.stage("soup", merge_models, MergeConfig(), seed=seed, branches=branches)
    if cfg.greedy_soup:
        chosen = replace(cfg.eval, split="valid", bootstrap_samples=0)  # never the split that it is measured on
        trained = {name: data[name] for name in cfg.trained_domains}
        found["greedy_soup"] = store.stage(
            "greedy_soup", greedy_soup, chosen, seed=seed, branches=branches, data=trained
        )
    for name, merge in cfg.merges.items():
        read = curvature.read_by(merge, ["seed", *branches], name)
        found[name] = store.stage(f"merge/{name}", merge_models, merge, seed=seed, branches=branches, **read)
    return found


def _assembled(
    cfg: Config,
    store: Store,
    name: str,
    seed: Artifact,
    branches: dict[str, Artifact],
    data: dict[str, Artifact],
    curvature: Curvature,
) -> Artifact:
    """A mixture as assembled; the domains that its routers start from, if they do, are inputs too. One from scratch takes
    the seed's config and tokenizer, and no weights."""
    choice = cfg.mixtures[name].assemble
    if cfg.mixtures[name].scratch:
        drawn = {"assemble": choice, "branches": list(cfg.branches)}
        return store.stage(f"assemble/{name}", draw_moe, drawn, seed=seed)
    domains = domains_needed(choice, sources_of(choice, branches), cfg.trained_domains)
    texts = {"data": {domain: data[domain] for domain in domains}} if domains else {}
    members = placed(seed_shape(cfg.seed), choice, list(branches)).models
    found = curvature.read_by(choice.merge, members, name, choice)
    return store.stage(f"assemble/{name}", assemble_moe, choice, seed=seed, branches=branches, **texts, **found)


def _measured(
    cfg: Config,
    store: Store,
    models: dict[str, Artifact],
    kinds: dict[str, str],
    lineages: dict[str, Lineage],
    data: dict[str, Artifact],
) -> Artifact | None:
    """Every model on every domain and task, and the report that compares them; None without domains."""
    tasks = _tasks(cfg, store, models)
    if not data:
        return None
    measured = replace(cfg.eval, bootstrap_samples=0)  # the report's business
    started = {
        name: {"assembled": store.stages[f"assemble/{name}"]}
        for name, one in cfg.mixtures.items()
        if one.train is not None
    }
    evaluations = {
        name: store.stage(f"eval/{name}", evaluate_model, measured, model=model, data=data, **started.get(name, {}))
        for name, model in models.items()
    }
    if cfg.btm is not None:
        members = {name: models[name] for name in ("seed", *cfg.branches)}
        ensemble = {"eval": measured, "top_k": cfg.btm.top_k}
        evaluations["btm"] = store.stage("eval/btm", evaluate_ensemble, ensemble, models=members, data=data)
    ablations = {}
    if cfg.ablation is not None:
        less = replace(measured, max_tokens=cfg.ablation.max_tokens or measured.max_tokens)
        ablations = {
            name: store.stage(f"ablation/{name}", ablate_model, less, model=models[name], data=data)
            for name in cfg.mixtures
        }
    settings = {
        "experiment": cfg.name,
        "rows": [_row(cfg, name, kinds[name], lineages[name]) for name in evaluations],
        "domains": {name: domain.trained for name, domain in cfg.domains.items()},
        "baseline": "dense" if cfg.dense is not None else None,
        "reference": reference_name(cfg),
        "settings": {
            "rng_seed": cfg.rng_seed,
            "artifacts": {name: stage.key[:8] for name, stage in store.stages.items()},
        },
        "eval": cfg.eval,
    }
    more = tasks | ({"ablations": ablations} if ablations else {})
    composed = {"composed": plain(cfg)}  # how it was run is told, and makes no other report
    made = dict(store.stages)
    return store.stage("report", compare_models, settings, None, composed, evaluations=evaluations, stages=made, **more)


def _questions(cfg: Config, store: Store, documents: dict[str, Artifact]) -> None:
    """The questions of every domain that has any, right after its documents: too few of these stop the run there."""
    if cfg.tasks is None:
        return
    for one in planned(cfg.tasks, list(cfg.domains)):
        if one.domain is not None:
            settings = {
                "domain": one.domain,
                "split": cfg.eval.split,
                "continuations": cfg.tasks.continuations,
                "near_duplicate_similarity": cfg.data.near_duplicate_similarity,
            }
            store.stage(f"questions/{one.domain}", write_questions, settings, documents=documents[one.domain])


def _tasks(cfg: Config, store: Store, models: dict[str, Artifact]) -> dict[str, dict[str, Artifact]]:
    """{"tasks": every model's stage by name}; nothing where no task is wanted, so that the report's key stays as it was."""
    if cfg.tasks is None:
        return {}
    questions = {
        domain: store.stages[f"questions/{domain}"] for domain in cfg.domains if f"questions/{domain}" in store.stages
    }
    settings = replace(cfg.tasks, continuations=ContinuationsConfig())  # the questions' business
    return {
        "tasks": {
            name: store.stage(f"tasks/{name}", run_tasks, settings, model=model, questions=questions)
            for name, model in models.items()
        }
    }


def _data(cfg: Config, store: Store, tokenizer: Artifact | None = None) -> tuple[dict[str, Artifact], Artifact]:
    """Token artifacts by domain, and the tokenizer: the seed's, or one trained on the domains' training text."""
    documents = {}
    for name, domain in cfg.domains.items():
        keyed, outside = {"domain": replace(domain, num_proc=None), "data": cfg.data}, {"num_proc": domain.num_proc}
        documents[name] = store.stage(f"documents/{name}", collect_documents, keyed, fingerprint(domain), outside)
    _questions(cfg, store, documents)
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


def _before_training(cfg: Config, name: str, lineages: Mapping[str, Lineage]) -> Lineage:
    """An assembled mixture: what its experts' models took (nothing, where it is drawn), and its own shape."""
    choice, seed = cfg.mixtures[name].assemble, lineages["seed"].shape
    if cfg.mixtures[name].scratch:
        return Lineage(seed.assembled(choice, list(cfg.branches)), stages=[[f"assemble/{name}"]])
    models = placed(seed, choice, list(cfg.branches)).models
    measured = curvature_stages(choice.merge, models, name)
    start = together(lineages["seed"], {one: lineages[one] for one in cfg.branches if one in models})
    shape = seed.assembled(choice, list(cfg.branches))
    start = start.read(*curvature_cost(cfg, choice.merge, models, seed, choice))
    return _followed(replace(start, shape=shape), *measured, [f"assemble/{name}"])


def _together(cfg: Config, lineages: Mapping[str, Lineage]) -> Lineage:
    return together(lineages["seed"], {name: lineages[name] for name in cfg.branches})


def _followed(lineage: Lineage, *stages: list[str]) -> Lineage:
    """The lineage after stages that train nothing; those of one list can run side by side."""
    return replace(lineage, stages=[*lineage.stages, *stages])


def _reference(cfg: Config, lineages: Mapping[str, Lineage]) -> Lineage | None:
    """The mixture that others are matched to, as trained."""
    name = reference_name(cfg)
    if name is None:
        return None
    train = cfg.mixtures[name].train
    assert train is not None
    return _before_training(cfg, name, lineages).trained(train, [f"mix/{name}"])


def _dense(cfg: Config, seed: Lineage, reference: Lineage | None) -> dict[str, TrainConfig]:
    """Dense continuations of the seed: `dense` on as many tokens of each domain as branches and (the longest) mixture
    together, `dense_compute` with as many FLOPs as the reference mixture."""
    found = {}
    if cfg.dense is not None:
        tokens: dict[str, int] = {}
        for run in dense_runs(cfg):
            tokens = add(tokens, consumed(run))
        total = sum(tokens.values())
        shares = {domain: count / total for domain, count in tokens.items()}
        found["dense"] = replace(cfg.dense, tokens=total, proportions=shares)
    if cfg.dense_compute is not None:
        found["dense_compute"] = matched(cfg.dense_compute, "compute", seed, reference, "dense_compute")
    return found


def _seed_lineage(cfg: Config) -> Lineage:
    if cfg.seed.train is None:
        return Lineage(seed_shape(cfg.seed), stages=[["seed"]])
    return Lineage(seed_shape(cfg.seed)).trained(cfg.seed.train, ["seed"])


def _row(cfg: Config, name: str, kind: str, lineage: Lineage) -> dict[str, Any]:
    own = (
        {"dense": cfg.dense, "dense_compute": cfg.dense_compute}
        | {n: b.train for n, b in cfg.branches.items()}
        | {n: m.train for n, m in cfg.mixtures.items()}
    )
    train = cfg.seed.train if name == "seed" else own.get(name)
    return {
        "name": name,
        "kind": kind,
        "parameters": lineage.parameters,
        "active_parameters": lineage.active_parameters,
        "train_tokens": lineage.tokens,
        "train_domains": lineage.domains,
        "train_flops": lineage.flops,
        "stages": lineage.stages,
        "learning_rate": train.lr if train else None,
        "flops_per_token": lineage.shape.step_flops_per_token(train.sequence_length, train.micro_batch_sequences)
        if train
        else None,
    }
