"""The measuring stages. As in upcycle/stages.py, heavy imports are inside the functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upcycle.config import EvalConfig, TasksConfig
from upcycle.durable import write_json
from upcycle.store import Run, versioned


@versioned(4, together=True)
def evaluate_model(
    config: EvalConfig, *, out: Path, run: Run, model: Path, data: dict[str, Path], assembled: Path | None = None
) -> None:
    """evaluation.json and documents.npz of one model over every domain. assembled: the mixture that it started from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
    from evals.drift import drift
    from evals.perplexity import evaluate

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    result, documents = evaluate(loaded, data, config, run.advance, run.team, tokenizer)
    if not run.team.leads:
        return
    if assembled is not None:
        result["routing"]["drift"] = drift(assembled, model)
    _write(out, result, documents, data)


@versioned(2, together=True)
def evaluate_ensemble(
    config: dict[str, Any], *, out: Path, run: Run, models: dict[str, Path], data: dict[str, Path]
) -> None:
    """evaluation.json and documents.npz of several models as one (ensemble.py). config: `eval`, `top_k`.

    Every rank holds all models, and of what they compute one batch.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from evals.ensemble import Ensemble
    from evals.perplexity import measure, scorer_of

    settings, team = config["eval"], run.team
    loaded = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models.values())
    ensemble = Ensemble([scorer_of(model, settings.precision, team) for model in loaded], config["top_k"])
    result, documents = measure(ensemble, data, settings, run.advance, team)
    if team.leads:
        _write(out, result | {"models": list(models), "top_k": config["top_k"]}, documents, data)


@versioned(1, together=True)
def greedy_soup(
    config: EvalConfig, *, out: Path, run: Run, seed: Path, branches: dict[str, Path], data: dict[str, Path]
) -> None:
    """A dense model, the greedy soup of seed and branches (soups.py), and soup.json: what was tried, on which split.

    config: with the split that it is chosen on. data: of the domains whose average counts. The ranks measure together, and
    the first one merges.
    """
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from evals.perplexity import evaluate
    from evals.soups import greedy, mean_nats
    from upcycle.dense_merge import write_merged

    trial, team = out / "trial", run.team
    trials, tried = 2 * len(branches) + 1, 0  # every model alone, then each of the others beside those that are kept

    def advance(done: int, total: int, doing: str) -> None:
        run.advance(tried * total + done, trials * total, doing=doing)

    def merge(names: tuple[str, ...], where: Path) -> None:
        others = {name: branches[name] for name in names if name != "seed"}
        write_merged(seed, others, where, include_seed="seed" in names, report=False)

    def nats(names: tuple[str, ...]) -> float:
        if team.leads:
            shutil.rmtree(trial, ignore_errors=True)
            trial.mkdir()
            merge(names, trial)
        team.wait()
        model = AutoModelForCausalLM.from_pretrained(trial, dtype=torch.float32)
        found, _ = evaluate(model, data, config, advance, team)
        nonlocal tried
        tried += 1
        team.wait()  # before the next one takes its place
        return mean_nats(found["domains"])

    made = greedy(["seed", *branches], nats)
    if not team.leads:
        return
    shutil.rmtree(trial)
    merge(tuple(made["ingredients"]), out)
    write_json(
        out / "soup.json", made | {"split": config.split, "max_tokens": config.max_tokens, "domains": list(data)}
    )
    run.say(f"greedy soup: {', '.join(made['ingredients'])}; tried on the {config.split} split, kept if better")


def _write(out: Path, result: dict, documents: dict, data: dict[str, Path]) -> None:
    import numpy as np

    for domain, path in data.items():
        result["domains"][domain]["overlap"] = json.loads((path / "overlap.json").read_text())["test_in_train"]
    np.savez(out / "documents.npz", **documents)
    write_json(out / "evaluation.json", result)


@versioned(2, together=True)
def ablate_model(config: EvalConfig, *, out: Path, run: Run, model: Path, data: dict[str, Path]) -> None:
    """ablation.json of one mixture: every domain without each expert, and with it alone."""
    import torch

    from evals.ablation import ablate
    from upcycle.modeling import UpcycledForCausalLM

    loaded = UpcycledForCausalLM.from_pretrained(model, dtype=torch.float32)
    result = ablate(loaded, data, config, run.advance, run.team)
    if run.team.leads:
        write_json(out / "ablation.json", result)


@versioned(1)
def write_questions(config: dict[str, Any], *, out: Path, run: Run, documents: Path) -> None:
    """questions.jsonl of one domain. config: `domain`, `split`, `continuations` (ContinuationsConfig),
    `near_duplicate_similarity`."""
    import pyarrow.parquet as pq

    from evals.suites.continuations import make_questions

    texts = pq.read_table(documents / f"{config['split']}.parquet")["text"].to_pylist()
    same = config["near_duplicate_similarity"]
    rows = make_questions(texts, config["domain"], config["continuations"], same, run.advance)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


@versioned(1, together=True)
def run_tasks(config: TasksConfig, *, out: Path, run: Run, model: Path, questions: dict[str, Path]) -> None:
    """tasks.json of one model: lm-eval's figures on every task. questions: of each domain that has continuations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
    from evals.harness import measure
    from evals.suites import planned

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = planned(config, list(questions))
    # Among what an interrupted attempt leaves to the next one (store.RESUMABLE).
    found = measure(loaded, tokenizer, tasks, questions, config, out / "checkpoints", run.advance, run.team)
    if run.team.leads:
        write_json(out / "tasks.json", found, sort_keys=False)


@versioned(5)
def compare_models(
    config: dict[str, Any],
    *,
    out: Path,
    run: Run,
    evaluations: dict[str, Path],
    stages: dict[str, Path],
    tasks: dict[str, Path] | None = None,
    ablations: dict[str, Path] | None = None,
    composed: dict[str, Any] | None = None,
) -> None:
    """report.json and report.html over all models. config: `experiment`, `rows`, `domains`,
    `baseline`, `reference`, `settings`, `eval`. composed: the settings of the run that makes it."""
    from evals.provenance import origins
    from evals.report import build_report, write_report
    from evals.task_table import add_tasks
    from upcycle.machine import describe

    report = build_report(
        config["experiment"],
        config["rows"],
        config["domains"],
        evaluations,
        stages,
        baseline=config["baseline"],
        reference=config["reference"],
        machine=describe(),
        provenance=origins(stages, composed or {}) | config["settings"],
        samples=config["eval"].bootstrap_samples,
        rng_seed=config["eval"].rng_seed,
        ablations=ablations or {},
    )
    run.advance(1, 2, doing="models compared; the page and its figures are next")
    if tasks:
        add_tasks(report, tasks)
    write_report(report, out)
    run.advance(2, 2)
