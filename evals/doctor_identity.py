"""Is the mixture what was proved, do its gates have the scale of a dense model's, and can its routers learn?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evals.doctor_case import LAST, Case, Finding, now
from evals.doctor_weights import Weights
from upcycle.config import PhaseConfig
from upcycle.configuration import UpcycledConfig
from upcycle.durable import reading
from upcycle.explain import read_json
from upcycle.kinds import FACTS
from upcycle.optim import group_of, trainable_names
from upcycle.phases import phase_at
from upcycle.proof import TOLERANCE, changed_experts
from upcycle.routing import Rule

GATE_SLACK = 0.1  # a sublayer's output off by a tenth; an indifferent bare top-1 gate is off by (E - 1)/E
EPS_MULTIPLE = 10.0  # AdamW divides g by (sqrt(v) + eps): at 10 eps a step is a tenth shorter, at eps half as long
PROVE = "`upcycle doctor DIR --prove` (with the seed and the branches at hand)"


# -------------------------------------------------------------------------------------------------------------- proof


def proof(case: Case, found: Weights | None) -> Finding:
    """Does proof.json hold for these weights; of a trained mixture, was its assembly proved?"""
    if case.assembled is None:
        said = "its assembly is not at hand: whether it was proved is not known"
        return Finding("proof", "look", said, None, "proof.json", "keep the assembled mixture beside the trained one")
    path = case.assembled / "proof.json"
    written = read_json(path, "one_hot_errors")
    where = "" if case.assembled == case.directory else f"before its training ({case.assembled.name}): "
    if written is None:
        do = f"{PROVE}; or assemble again with {case.setting('assemble.prove')}=true"
        return Finding(
            "proof", "look", f"{where}absent: experts were not compared with their models", None, "proof.json", do
        )
    with reading(path, "prove it again (--prove), or assemble again"):
        alone, others = written["one_hot_errors"], ("gated_sum_error", "base_error", "fold_error")
        worst = max(map(float, [0.0, *alone.values(), *(written[name] for name in others if name in written)]))
    if not worst <= TOLERANCE:
        said = f"{where}an expert alone, the base, the gated sum or the fold is off by {worst:.1e} of the largest value"
        return Finding("proof", "bad", said, worst, f"at most {TOLERANCE:g}", "assemble again; do not use this mixture")
    what = "logits equal those before folding" if "fold_error" in written else "experts equal their models"
    said = f"{where}{what} within {worst:.1e}"
    if not alone and "fold_error" not in written:
        said = f"{where}expert tensors are their models'; none was compared alone, because α or an election changes it at once"
    ok = Finding("proof", "ok", said, worst, f"at most {TOLERANCE:g}")
    if case.state != "assembled" or found is None:
        return ok
    return _changed(case.directory, written, found) or ok


def _changed(directory: Path, written: dict[str, Any], found: Weights) -> Finding | None:
    """What became of the weights since the proof. Without a hash in it (older proofs) the experts' own hashes and the files'
    times must do."""
    do = f"if that was meant, {PROVE}; else assemble again"
    if "weights_sha256" in written and written["weights_sha256"] == found.sha256:
        return None
    changed, count = _changed_experts(directory)
    if changed:
        said = (
            f"weights changed after the proof: {changed[0]} and {len(changed) - 1} more" if changed[1:] else changed[0]
        )
        return Finding(
            "proof", "bad", f"not what was assembled: {said}", len(changed), f"0 of {count} expert tensors", do
        )
    if "weights_sha256" in written:
        said = "weights changed after the proof, those of no expert: what is merged, routers or norms"
        return Finding("proof", "bad", said, None, "the hash in proof.json", do)
    late = (
        max(path.stat().st_mtime for path in directory.glob("*.safetensors"))
        - (directory / "proof.json").stat().st_mtime
    )
    if late > 1.0:  # file systems round times
        said = f"proof.json is {late:.0f} s older than the weights; the {count} expert tensors are as assembled"
        return Finding("proof", "look", said, late, "at most 1 s", do)
    return None


def _changed_experts(directory: Path) -> tuple[list[str], int]:
    """See `proof.changed_experts`; nothing can be said of experts that were trained before the mixture was edited."""
    made = read_json(directory / "assembly.json", "tensors")
    if made is None or any("trained_before" in edit for edit in made.get("edits", [])):
        return [], 0
    return changed_experts(directory)


# -------------------------------------------------------------------------------------------------------------- gates


def gates(case: Case) -> Finding | None:
    """The mean sum of a token's feed-forward gates: 1, or the residual stream gets less than a dense model's."""
    if case.config is None:
        return None
    rule, E = case.config.rule("ffn", case.config.routed[-1]), case.config.num_experts
    written = (read_json(case.assembled / "proof.json") if case.assembled else None) or {}
    series = case.series("gate_sum")
    if case.config.gates_sum_to_one:
        total, when = 1.0, "by construction"
    elif len(series):
        total, when = float(now(series)), f"over the last {min(LAST, len(series))} steps"
    elif "mean_gate_sum" in written:
        total, when = written["mean_gate_sum"], "at assembly"
    else:
        total, when = rule.top_k / E, "expected of a fresh router, K/E"
    copies = copies_are_the_seed(case.config, case.assembled)
    said = f"sum to {total:.3f} {when}; copies of the seed {'are the seed' if not copies else f'are not the seed ({copies[0]})'}"
    threshold = f"1 within {GATE_SLACK}"
    if abs(total - 1) <= GATE_SLACK:
        return Finding("gates", "ok", said, total, threshold)
    if rule.top_k == 1:
        said = f"bare top-1 gates start at about 1/{E}, and feed-forwards that much weaker: they {said}"
    return Finding(
        "gates", "look", said, total, threshold, f"{case.router_setting('ffn', 'gate_scale')}={_scale(rule)}"
    )


def _scale(rule: Rule) -> str:
    """The gate_scale that mends the sum and leaves the router its gradient."""
    return "straight_through" if rule.top_k == 1 and rule.kind != "expert_choice" else "sum_to_one"


def copies_are_the_seed(config: UpcycledConfig, assembled: Path | None) -> list[str]:
    """Why a mixture of copies of the seed, placed like this one, would not be the seed; [] if it would."""
    placed = (read_json(assembled / "assembly.json", "placed") or {}).get("placed", {}) if assembled else {}
    experts = placed.get("experts", [])
    grouped = len({expert["row"] for expert in experts}) * config.split == len(experts)
    reasons = {
        "gates do not sum to 1": not config.gates_sum_to_one,
        "hidden units were drawn anew": bool(placed.get("drop_fraction")),
        "the shared expert is added whole": config.shared_expert != "none" and config.shared_gate == "sum",
        "shards are not scaled": config.split > 1 and not placed.get("scale_weights"),
        "shards are chosen one by one": config.split > 1 and not grouped,
        "experts are blends": any(len({chunk["source"] for chunk in expert["chunks"]}) > 1 for expert in experts),
    }
    return [reason for reason, holds in reasons.items() if holds]


# ------------------------------------------------------------------------------------------------------------ learning


def constant_gates(rule: Rule) -> bool:
    """Whether every gate is 1 whatever the logits, so that the language-model loss has no gradient for the router."""
    if FACTS[rule.kind].every or FACTS[rule.kind].weightless or rule.top_k != 1:
        return False
    return rule.kind == "topk_softmax" or rule.gate_scale == "sum_to_one"


def router_learns(case: Case) -> Finding | None:
    """Does anything train the routers: constant gates, frozen phases, gradients of zero or below AdamW's eps."""
    if case.config is None:
        return None
    rules = {part: case.config.rule(part, case.config.routed[-1]) for part in case.config.parts}
    if case.config.tie == "sublayers":
        rules = {"attention": rules["attention"]}
    learning = {part: rule for part, rule in rules.items() if not FACTS[rule.kind].weightless and rule.trained}
    if not learning:
        rule = next(iter(rules.values()))
        why = FACTS[rule.kind].weightless or "random by choice, trained=false"
        return Finding("router learns", "ok", f"no, and is not to: {why}", None, "")
    for part, rule in learning.items():
        if constant_gates(rule):
            return _constant(case, part)
    return _moved(case, "router", "router_gradient_norm", _router_count(case.config, list(learning)))


def _constant(case: Case, part: str) -> Finding:
    assert case.config is not None
    losses = ", ".join(case.config.loss_names(part))
    said = f"{part} gates are the constant 1: the language-model loss has no gradient for the router"
    said += f"; only {losses} trains it" if losses else ", and no other loss is on: it stays as it was drawn"
    do = f"{case.router_setting(part, 'gate_order')}=softmax_topk {case.router_setting(part, 'gate_scale')}=straight_through"
    return Finding("router learns", "look" if losses else "bad", said, 0.0, "a gradient", do)


def _router_count(config: UpcycledConfig, parts: list[str]) -> int:
    layers = 1 if config.tie == "layers" else len(config.routed)
    return sum(layers * len(config.names_of(part)) * config.hidden_size for part in parts)


def experts_learn(case: Case) -> Finding | None:
    """The same of the experts."""
    if case.config is None or not case.series("expert_gradient_norm").size:
        return None
    seed = case.config.seed
    width = getattr(seed, "intermediate_size", None) or getattr(seed, "n_inner", None) or 4 * case.config.hidden_size
    count = len(case.config.routed) * case.config.num_experts * 2 * width * case.config.hidden_size // case.config.split
    return _moved(case, "experts", "expert_gradient_norm", count)


def _moved(case: Case, group: str, figure: str, count: int) -> Finding | None:
    """Do the `count` parameters of a group get gradients that AdamW can use?"""
    check, norms = f"{group} {'learns' if group == 'router' else 'learn'}", case.series(figure)
    if case.state == "assembled":
        return Finding(check, "ok", "not trained yet, or not since it was changed", None, "")
    if not norms.size:
        return None
    trained_in, names = [], case.parameter_names()
    for number, phase in enumerate(case.phases()):
        if phase.start < case.step and group in trained_groups(names, phase.config):
            trained_in.append(number)
    phases = case.phases()
    present = f"phase {phases.index(phase_at(phases, case.step - 1)) + 1} of {len(phases)}" if phases else "its phase"
    if phases and not trained_in:
        do = f"take {group} out of phases[].frozen, or name it in phases[].trainable, in {case.setting('train.phases')}"
        said = f"frozen so far ({present}): {group} as assembled"
        verdict = "ok" if case.state == "training" and _comes(case, group, names) else "look"
        return Finding(check, verdict, said, 0.0, "trained in a phase", do if verdict == "look" else "")
    seen = norms[norms > 0][-LAST:]
    eps = case.train.optimizer.eps if case.train else 1e-8
    size = float(seen.mean()) / np.sqrt(count) if len(seen) else 0.0
    said = f"{present}, gradient norm {float(now(norms)):.2g}, {size:.1e} a parameter"
    threshold = f"at least {EPS_MULTIPLE * eps:.0e}, {EPS_MULTIPLE:g} of AdamW's eps"
    if not size:
        do = "nothing reaches it: gates may be constant (router.gate_scale), or experts take no token"
        return Finding(check, "bad", f"{present}, its gradient is 0 at every step", 0.0, threshold, do)
    do = case.scaled("optimizer.eps", 0.01)
    low = size < EPS_MULTIPLE * eps
    return Finding(check, "look" if low else "ok", said, size, threshold, do if low else "")


def trained_groups(names: list[str], phase: PhaseConfig) -> set[str]:
    """The groups of parameters that a phase trains something of."""
    return {group_of(name) for name in trainable_names(names, phase)} if names else set()


def _comes(case: Case, group: str, names: list[str]) -> bool:
    """Whether a phase that is still to come trains the group."""
    return any(group in trained_groups(names, phase.config) for phase in case.phases() if phase.start >= case.step)
