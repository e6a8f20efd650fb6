"""`upcycle doctor`: one screen of checks on a mixture, assembled, in training or trained, from its files alone.

No model is loaded: metrics.jsonl, config.json and proof.json are read, and the weights streamed. Each check compares a figure
with a threshold (reasons beside the constants) and is ok, look (worth knowing, may be meant) or bad (do not go on like
this), with the setting to change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.doctor_case import Case, Finding, is_mixture
from evals.doctor_identity import experts_learn, gates, proof, router_learns
from evals.doctor_training import collapse, dead, gradient, load_trend, logits, loss, progress, soft_gates
from evals.doctor_weights import survey, weights
from upcycle.explain import read_json, stages_of

OF_LOAD = (collapse, dead, load_trend, soft_gates, logits)  # each for feed-forward and attention routers


def examine(case: Case) -> list[Finding]:
    """Every check that the case's files allow, in the order in which they are read best."""
    found = survey(case.directory) if case.state != "training" else None
    findings: list[Finding | None] = [proof(case, found), gates(case), router_learns(case)]
    if case.state != "assembled":
        findings.append(progress(case))
    if case.rows:
        findings.append(experts_learn(case))
        findings += [check(case, part) for part in ("ffn", "attention") for check in OF_LOAD]
        findings += [gradient(case), loss(case)]
    if found is not None:
        findings.append(weights(found))
    return [finding for finding in findings if finding is not None]


def worst(findings: Sequence[Finding]) -> str:
    verdicts = {finding.verdict for finding in findings}
    return next(verdict for verdict in ("bad", "look", "ok") if verdict in verdicts or verdict == "ok")


def prove_again(case: Case, given: Mapping[str, Path]) -> None:
    """Prove the assembled mixture against its models: those `given` by name, else their artifacts beside it.

    Raises ValueError: its assembly or a model is not at hand; a given one is no directory; the proof failed.
    """
    from upcycle.proof import prove

    for name, path in given.items():
        if not path.is_dir():
            raise ValueError(f"{name}={path}: no such directory; give that of the model it was assembled from")
    if case.assembled is None or not is_mixture(case.assembled):
        raise ValueError(f"{case.directory}: the mixture as it was assembled is not at hand; name its directory")
    made, record = (
        read_json(case.assembled / "assembly.json", "placed", "merge"),
        read_json(case.assembled / "stage.json"),
    )
    if made is None:
        raise ValueError(f"{case.assembled}: no assembly.json, so nobody knows what to prove it against")
    stored = {
        name: case.assembled.parent / path
        for name, path in stages_of(["seed", *made["placed"]["models"]], record).items()
    }
    models = {name: path for name, path in {**stored, **given}.items() if path.is_dir()}
    prove(case.assembled, models)
