"""The measuring stages. As in upcycle/stages.py, heavy imports are inside the functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from upcycle.config import EvalConfig
from upcycle.durable import write_json
from upcycle.store import Run, versioned


@versioned(1, together=True)
def evaluate_model(config: EvalConfig, *, out: Path, run: Run, model: Path, data: dict[str, Path]) -> None:
    """evaluation.json and documents.npz of one model over every domain."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
    from evals.perplexity import evaluate

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    result, documents = evaluate(loaded, data, config, run.advance, run.team)
    if not run.team.leads:
        return
    for domain, path in data.items():
        result["domains"][domain]["overlap"] = json.loads((path / "overlap.json").read_text())["test_in_train"]
    np.savez(out / "documents.npz", **documents)
    write_json(out / "evaluation.json", result)


@versioned(1)
def compare_models(
    config: dict[str, Any], *, out: Path, run: Run, evaluations: dict[str, Path], stages: dict[str, Path]
) -> None:
    """report.json and report.html over all models. config: `experiment`, `rows`, `domains`, `settings`, `eval`."""
    from evals.report import build_report, write_report
    from upcycle.machine import describe
    from upcycle.store import provenance

    report = build_report(
        config["experiment"],
        config["rows"],
        config["domains"],
        evaluations,
        stages,
        baseline=config["baseline"],
        machine=describe(),
        provenance=provenance() | config["settings"],
        samples=config["eval"].bootstrap_samples,
        rng_seed=config["eval"].rng_seed,
    )
    write_report(report, out)
