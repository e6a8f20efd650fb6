"""The doctor: constructed mixtures and metrics, each sick in one way, with exactly that finding; the healthy ones with none."""

import json
import math
import os
import re
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from evals.doctor import examine, prove_again
from evals.doctor_case import read_case
from evals.doctor_identity import constant_gates, copies_are_the_seed
from evals.doctor_training import (
    BLOCKS,
    DEAD_SHARE,
    LOST_NATS,
    OVERFLOWING,
    SATURATED,
    Load,
    trend,
)
from evals.doctor_weights import NEAR_FP16_MAX, survey
from launch.cli import WORDS
from tests.test_launch import ROOT
from tests.tiny import dense_models, randomise
from upcycle.proof import changed_experts
from upcycle.routing import Rule

KEY = "0123abcd" + "0" * 56
NAMES = ("seed", "code", "law", "math")
STEPS, BATCH = 64, 64
TRAIN = {
    "tokens": STEPS * BATCH, "proportions": {"code": 1.0}, "sequence_length": 16, "batch_sequences": 4,
    "micro_batch_sequences": 4, "lr": 1e-3, "schedule": {"warmup_steps": 4}, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A seed and three branches that are it, moved a little."""
    root = tmp_path_factory.mktemp("sources")
    for index, name in enumerate(NAMES):
        model = dense_models("llama", 1, dtype=torch.float32, rng_seed=0)[0]
        if index:
            moved = deepcopy(model)
            randomise(moved, torch.Generator().manual_seed(index))
            with torch.no_grad():
                for ours, theirs in zip(model.parameters(), moved.parameters(), strict=True):
                    ours.lerp_(theirs, 0.02)
        model.save_pretrained(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def assemblies(sources, tmp_path_factory):
    """Assembled and proved mixtures of them, one for each choice, in a store."""
    made, root = {}, tmp_path_factory.mktemp("store")
    branches = {name: sources[name] for name in NAMES[1:]}

    def of(method="btx", **choices):
        name = f"{method}{len(made)}"
        key = json.dumps([method, choices], sort_keys=True)
        if key not in made:
            out = root / f"assemble-{name}-01234567"
            upcycle.assemble(seed=sources["seed"], branches=branches, out=out, method=method, **choices)
            made[key] = out
        return made[key]

    return of


@pytest.fixture
def place(assemblies, tmp_path):
    """A copy of an assembly, as the store `tmp_path` would hold it."""

    def copied(method="btx", **choices):
        out = tmp_path / "assemble-moe-0123abcd"
        shutil.copytree(assemblies(method, **choices), out)
        record = {"stage": "assemble/moe", "function": "assemble_moe", "key": KEY, "config": {}}
        keys = {"seed": "1" * 64, **{f"branch/{name}": f"{index}" * 64 for index, name in enumerate(NAMES[1:], 2)}}
        (out / "stage.json").write_text(json.dumps(record | {"inputs": keys}))
        return out

    return copied


def healthy_rows(steps=STEPS, layers=2, experts=4):
    """Even load with 2 % of noise, a falling loss, steady gradients, as train.py writes them."""
    rng, rows = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        share = 1 + 0.02 * rng.standard_normal((layers, experts))
        load = (share / share.sum(1, keepdims=True)).round(4).tolist()
        loss = 3 + 2 * math.exp(-step / 10) + 0.02 * rng.standard_normal()
        rows.append(
            {
                "step": step, "tokens": step * BATCH, "lr": 1e-3, "loss": loss, "cross_entropy": loss, "load": load,
                "attention_load": load, "gradient_norm": 0.5 + 0.05 * rng.random(), "router_gradient_norm": 0.05,
                "expert_gradient_norm": 0.3, "gate_sum": 1.0, "ffn_entropy": 1.1, "attention_entropy": 1.1,
                "ffn_logits": 1.5, "attention_logits": 1.6, "tokens_per_second": 1000.0, "peak_share": 0.1,
            }
        )  # fmt: skip
    return rows


def write_rows(directory, rows):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(assembled, rows, **train):
    """That mixture after a training whose metrics are `rows`."""
    out = assembled.parent / "mix-moe-ffff0000"
    shutil.copytree(assembled, out)
    (out / "proof.json").unlink()
    config = {"train": TRAIN | train, "skip_tokens": None}
    record = {"stage": "mix/moe", "function": "train_model", "config": config, "inputs": {"assemble/moe": KEY}}
    (out / "stage.json").write_text(json.dumps(record))
    write_rows(out, rows)
    return out


def unfinished(assembled, rows, **train):
    out = assembled.parent / "mix-moe-ffff0000.partial"
    out.mkdir()
    write_rows(out, rows)
    return read_case(out, "mix/moe", TRAIN | train, assembled)


def findings(case):
    """{check: verdict} of what is not ok."""
    return {found.check: found.verdict for found in examine(case) if found.verdict != "ok"}


def the(check, case):
    (found,) = [found for found in examine(case) if found.check == check]
    return found


def changed(rows, last=None, **values):
    """The rows with other values, those of the `last` only; a function is given the row's step."""
    at = 0 if last is None else len(rows) - last
    for row in rows[at:]:
        row |= {name: value(row["step"]) if callable(value) else value for name, value in values.items()}
    return rows


# -------------------------------------------------------------------------------------------------------- the healthy


@pytest.mark.parametrize(
    "method", ["btx", "btx_top1", "btx_soft", "btx_hash", "btx_random", "bam", "bam_top1_attention"]
)
def test_a_healthy_mixture_has_no_findings_at_any_stage(place, method):
    start = place(method)
    seen = examine(read_case(start))
    assert {found.verdict for found in seen} == {"ok"} and len(seen) == 4
    rows = healthy_rows()
    if method in ("btx_hash", "btx_random"):
        changed(rows, router_gradient_norm=0.0)
    assert findings(read_case(trained(start, rows))) == {}
    assert findings(unfinished(start, rows[:30])) == {}
    assert all(not found.do for found in examine(read_case(start)))


def test_every_check_speaks_of_a_soft_mixture(place):
    checks = [found.check for found in examine(read_case(trained(place("bam_top1_attention"), healthy_rows())))]
    assert checks == [
        "proof", "gates", "router learns", "progress", "experts learn", "ffn collapse", "ffn dead experts", "ffn load trend",
        "ffn logits", "attention collapse", "attention dead experts", "attention load trend", "attention logits", "gradient",
        "loss", "weights",
    ]  # fmt: skip
    assert len(set(checks)) == len(checks)


# ----------------------------------------------------------------------------------------------------------- the load

COLLAPSE = [[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]
DEAD = [[0.25, 0.25, 0.25, 0.25], [0.33, 0.33, 0.33, 0.01]]


def test_a_collapsed_router_is_found_and_the_loss_that_is_off_is_named(place):
    off = {"losses": {"balance": "none", "balance_coefficient": 0.0, "z_coefficient": 0.0}}
    case = read_case(trained(place("btx_top1", router=off), changed(healthy_rows(), load=COLLAPSE)))
    assert findings(case) == {"ffn collapse": "bad"}
    found = the("ffn collapse", case)
    assert found.figure == pytest.approx((math.exp(-0.97 * math.log(0.97) - 0.03 * math.log(0.01)) - 1) / 3)
    assert "layer 0: seed has 97% of the places" in found.said
    assert found.do.startswith(
        "mixtures.moe.assemble.router.losses.balance=switch mixtures.moe.assemble.router.losses.balance_coefficient=0.01"
    )


def test_a_balance_loss_that_is_on_is_raised(place):
    case = read_case(trained(place("btx_top1"), changed(healthy_rows(), load=COLLAPSE)))
    assert the("ffn collapse", case).do == (
        "mixtures.moe.assemble.router.losses.balance_coefficient=0.1 (is 0.01); or ++mixtures.moe.train.lr=0.0005 (is 0.001); or "
        "mixtures.moe.assemble.router.bias_rate=0.001"
    )


def test_top2_collapses_when_all_tokens_share_a_pair(place):
    """Half of the places each is as far as top-2 can go."""
    pair = [[0.49, 0.49, 0.01, 0.01]] * 2
    assert findings(read_case(trained(place("btx"), changed(healthy_rows(), load=pair)))) == {"ffn collapse": "bad"}


def test_a_dead_expert_is_named(place):
    case = read_case(trained(place("btx_top1"), changed(healthy_rows(), load=DEAD)))
    assert findings(case) == {"ffn dead experts": "bad"}
    found = the("ffn dead experts", case)
    assert found.said == "dead: math in layer 1 (0.04)" and found.figure == pytest.approx(0.04)
    alive = [DEAD[0], [0.33, 0.33, 0.34 - 0.26 * DEAD_SHARE, 0.26 * DEAD_SHARE]]
    write_rows(case.directory, changed(healthy_rows(), load=alive))
    assert findings(read_case(case.directory)) == {}


def test_only_the_last_steps_count(place):
    rows = healthy_rows()
    changed(rows[:30], load=COLLAPSE)
    assert findings(read_case(trained(place("btx_top1"), rows))) == {}


def test_attention_routers_are_looked_at_too(place):
    case = read_case(trained(place("bam_top1_attention"), changed(healthy_rows(), attention_load=DEAD)))
    assert findings(case) == {"attention dead experts": "bad"}
    assert "attention_router.losses.balance" in the("attention dead experts", case).do


def drifting(step):
    """Evenness falls; 0.66 at step 64, 0.55 twenty steps before the end of 100 ... below a half at the end."""
    top = 0.25 + 0.0055 * step
    return [[0.25] * 4, [top] + [(1 - top) / 3] * 3]


def test_a_load_that_drifts_apart_is_seen_before_it_has(place):
    case = unfinished(place("btx_top1"), changed(healthy_rows(), load=drifting), tokens=100 * BATCH)
    assert findings(case) == {"ffn load trend": "look"}
    assert "evenness of layer 1" in the("ffn load trend", case).said


def test_evenness_equals_its_loop():
    shares, taken = np.random.default_rng(1).dirichlet(np.ones(5), size=3), [1, 2, 5]
    load = Load(shares[None], [0, 1, 2], taken, list("abcde"))
    for row, k, found in zip(shares, taken, load.evenness(shares), strict=True):
        effective = math.exp(-sum(p * math.log(p) for p in row))
        assert (math.isnan(found) and k == 5) or found == pytest.approx((effective - k) / (5 - k))
    even, one = np.full((1, 4), 0.25), np.eye(4)[:1]
    top1 = Load(even[None], [0], [1], list("abcd"))
    assert top1.evenness(even) == pytest.approx(1) and top1.evenness(one) == pytest.approx(0)


def test_a_trend_is_the_line_and_its_interval_holds_nothing_in_noise():
    steps = np.arange(1, 129)
    line = trend(steps, 3 - 0.01 * steps)
    assert line == pytest.approx((-0.01, -0.01, -0.01), abs=1e-9)
    assert trend(steps[: 4 * BLOCKS - 2], steps[: 4 * BLOCKS - 2]) is None
    rng, outside = np.random.default_rng(2), 0
    for _ in range(2000):
        found = trend(steps, rng.standard_normal(128))
        outside += not found.low <= 0 <= found.high
    assert 0.035 < outside / 2000 < 0.065  # 5 %, and three standard errors of 0.5 %


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("logits", "verdict"),
    [
        (lambda step: 1.1**step, "bad"),  # 446 at the end
        (lambda step: 1.05**step + 2 * SATURATED / 3, "look"),
        (lambda step: 0.2 * step, "ok"),
    ],
)
def test_growing_router_logits_are_found(place, logits, verdict):
    case = read_case(trained(place("btx"), changed(healthy_rows(), ffn_logits=logits)))
    assert findings(case) == ({"ffn logits": verdict} if verdict != "ok" else {})
    found = the("ffn logits", case)
    assert found.figure == pytest.approx(np.mean([logits(step) for step in range(STEPS - 9, STEPS + 1)]))
    if verdict != "ok":
        assert found.do.startswith("mixtures.moe.assemble.router.losses.z_coefficient=0.001")


def test_logits_that_will_overflow_are_seen_before_they_saturate(place):
    rows = changed(healthy_rows(), ffn_logits=lambda step: 0.25 * step)
    assert findings(unfinished(place("btx"), rows, tokens=1000 * BATCH)) == {"ffn logits": "look"}
    assert 0.25 * STEPS < SATURATED < OVERFLOWING < 0.25 * 1000


def test_older_metrics_have_the_z_loss(place):
    rows = healthy_rows()
    for row in rows:
        del row["ffn_logits"]
        row["z"] = 100.0**2
    assert findings(read_case(trained(place("btx_top1"), rows))) == {"ffn logits": "bad"}


@pytest.mark.parametrize(("last", "rise", "verdict"), [(10, 1.0, "bad"), (1, 1.0, "look"), (10, 0.3, "ok")])
def test_a_loss_that_rises_or_jumps_is_found(place, last, rise, verdict):
    rows = healthy_rows()
    for row in rows[-last:]:
        row["cross_entropy"] += rise
    case = read_case(trained(place(), rows))
    assert findings(case) == ({"loss": verdict} if verdict != "ok" else {})
    assert the("loss", case).threshold == f"at most {LOST_NATS} nats"


@pytest.mark.parametrize(("last", "verdict"), [(1, "look"), (10, "bad")])
def test_gradients_that_spike_are_found(place, last, verdict):
    case = read_case(trained(place(), changed(healthy_rows(), last=last, gradient_norm=40.0 * last)))
    assert findings(case) == {"gradient": verdict}
    assert "++mixtures.moe.train.optimizer.clip_norm=0.5 (is 1)" in the("gradient", case).do


def test_warm_up_is_no_spike(place):
    rows = healthy_rows()
    for row in rows[:4]:
        row["gradient_norm"], row["cross_entropy"] = 100.0, 11.0
    assert findings(read_case(trained(place(), rows))) == {}


@pytest.mark.parametrize("share", [0.995, 0.05])
def test_soft_gates_that_say_nothing_are_found(place, share):
    rows = changed(healthy_rows(), attention_entropy=share * math.log(4))
    case = read_case(trained(place("bam"), rows))
    assert findings(case) == {"attention soft gates": "look"}
    assert the("attention soft gates", case).figure == pytest.approx(share)


@pytest.mark.parametrize(("value", "verdict"), [(math.nan, "bad"), (math.inf, "bad"), (2 * NEAR_FP16_MAX, "look")])
def test_weights_that_are_no_numbers_or_huge_are_found(place, value, verdict):
    out = trained(place(), healthy_rows())
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if "router" in name)
    tensors[name][0, 0] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert findings(read_case(out)) == {"weights": verdict}


def test_the_largest_weight_of_each_role_is_that_of_a_loop(place):
    out = place("bam")
    found, expected = survey(out).largest, {}
    for name, tensor in load_file(out / "model.safetensors").items():
        role = "router" if ".router." in name else "experts" if ".experts." in name else "attention"
        role = role if role != "attention" or ".self_attn." in name else "rest"
        expected[role] = max(expected.get(role, 0), max(abs(value) for value in tensor.flatten().tolist()))
    assert found == pytest.approx(expected)


def test_the_settings_it_names_are_settings(place):
    """Each `key=value` of its advice, composed with the demo's own mixture of that kind."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from launch.config import build

    rows = changed(healthy_rows(), ffn_logits=100.0, attention_entropy=1.385, router_gradient_norm=1e-7)
    sick = read_case(
        trained(place("bam"), changed(rows, last=10, load=COLLAPSE, gradient_norm=40.0, cross_entropy=9.0))
    )
    found = findings(sick)
    assert len(found) == 6
    named = re.findall(r"\S*mixtures\.moe\.\S+=[^\s;,]+", " ".join(one.do for one in examine(sick)))
    assert len(set(named)) == 9
    for override in set(named):
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            raw = compose("config", overrides=["experiment=demo", override.replace(".moe.", ".bam.")])
        cfg = build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
        path, value = override.lstrip("+").replace(".moe.", ".bam.").split("=")
        node = cfg
        for key in path.split("."):
            node = node[key] if isinstance(node, dict) else getattr(node, key)
        assert str(node) == value or node == pytest.approx(float(value)), override


# ---------------------------------------------------------------------------------------------------------- learning


def test_bare_top1_gates_are_found(place):
    start = place("bam_paper")
    case = read_case(start)
    assert findings(case) == {"gates": "look"}
    found = the("gates", case)
    assert found.figure == json.loads((start / "proof.json").read_text())["mean_gate_sum"] < 0.7
    assert found.do == "mixtures.moe.assemble.router.gate_scale=straight_through"
    rows = changed(healthy_rows(), gate_sum=0.95)
    assert findings(read_case(trained(start, rows))) == {}  # the training has made up for it
    (start / "proof.json").unlink()
    assert the("gates", read_case(start)).figure == 0.25


@pytest.mark.parametrize(("coefficient", "verdict"), [(0.01, "look"), (0.0, "bad")])
def test_constant_gates_are_found(place, coefficient, verdict):
    losses = {"balance": "btx" if coefficient else "none", "balance_coefficient": coefficient}
    router = {"top_k": 1, "router_gradient": "none", "losses": losses}
    start = place("btx", router=router)
    assert findings(read_case(start)) == {"router learns": verdict}
    assert findings(read_case(trained(start, changed(healthy_rows(), router_gradient_norm=0.0)))) == {
        "router learns": verdict
    }
    assert the("router learns", read_case(start)).do.endswith("router.gate_scale=straight_through")


def test_gates_are_constant_where_the_routers_own_function_says_so():
    from tests.tiny import route

    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    for kind in ("topk_softmax", "softmax_topk", "switch", "soft"):
        for k in (1, 2):
            for scale in ("none", "sum_to_one"):
                gates = route(kind, logits, k, scale).gates
                assert (
                    constant_gates(Rule(kind, k if kind != "soft" else 4, scale)) == bool((gates == 1).all()) or k == 2
                )


FROZEN = {"phases": [{"frozen": ["router"]}]}
LATER = {"phases": [{"steps": 40, "frozen": ["router"]}, {}]}


def test_a_frozen_router_is_found(place):
    rows, start = changed(healthy_rows(), router_gradient_norm=0.0), place()
    case = read_case(trained(start, rows, **FROZEN))
    assert findings(case) == {"router learns": "look"}
    assert "++mixtures.moe.train.phases" in the("router learns", case).do
    waiting = unfinished(start, rows[:30], **LATER)
    assert findings(waiting) == {} and "frozen so far (phase 1 of 2)" in the("router learns", waiting).said


def test_gradients_of_zero_or_below_eps_are_found(place):
    start = place()
    out = trained(start, changed(healthy_rows(), router_gradient_norm=0.0))
    assert findings(read_case(out)) == {"router learns": "bad"}
    write_rows(out, changed(healthy_rows(), router_gradient_norm=1e-7))  # 256 parameters: 6e-9 each
    assert findings(read_case(out)) == {"router learns": "look"}
    write_rows(out, changed(healthy_rows(), expert_gradient_norm=0.0))
    assert findings(read_case(out)) == {"experts learn": "bad"}


# ---------------------------------------------------------------------------------------------------------- identity


def test_a_missing_proof_is_found_and_can_be_made_good(place, sources):
    start = place()
    (start / "proof.json").unlink()
    assert findings(read_case(start)) == {"proof": "look"}
    with pytest.raises(ValueError, match="seed is not given to prove it against"):
        prove_again(read_case(start), {})
    prove_again(read_case(start), sources)
    assert findings(read_case(start)) == {}
    (start / "proof.json").unlink()
    for number, name in enumerate(NAMES, 1):  # beside it, where the store has them
        shutil.copytree(
            sources[name], start.parent / f"{'seed' if name == 'seed' else f'branch-{name}'}-{str(number) * 8}"
        )
    prove_again(read_case(start), {})
    assert findings(read_case(start)) == {}


@pytest.mark.parametrize("which", ["mlp.experts.down_proj", "router.weight", "embed_tokens"])
def test_weights_changed_after_the_proof_are_found(place, which):
    start = place()
    assert changed_experts(start) == ([], 24)
    tensors = load_file(start / "model.safetensors")
    name = next(name for name in tensors if which in name)
    tensors[name][-1] *= 1.001
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    assert findings(read_case(start)) == {"proof": "bad"}
    found = the("proof", read_case(start))
    if "experts" in which:
        assert changed_experts(start)[0] == ["model.layers.0.mlp.down_proj.weight of math"]
        assert "model.layers.0.mlp.down_proj.weight of math" in found.said
    else:
        assert "those of no expert" in found.said


def test_a_proof_without_a_hash_goes_by_times_and_experts(place):
    start = place()
    proof = json.loads((start / "proof.json").read_text())
    assert len(proof.pop("weights_sha256")) == 64
    (start / "proof.json").write_text(json.dumps(proof))
    assert findings(read_case(start)) == {}
    os.utime(start / "proof.json", (1e9, 1e9))
    assert findings(read_case(start)) == {"proof": "look"}


def test_a_proof_of_something_else_is_bad(place):
    start = place()
    proof = json.loads((start / "proof.json").read_text())
    (start / "proof.json").write_text(json.dumps(proof | {"gated_sum_error": 0.1}))
    assert findings(read_case(start)) == {"proof": "bad"}


def test_what_would_keep_copies_from_being_the_seed(place):
    for choices, reason in (
        ({"placement": {"drop_fraction": 0.5}}, "hidden units were drawn anew"),
        ({"placement": {"shared_expert": "seed", "shared_gate": "sum"}}, "the shared expert is added whole"),
        ({"placement": {"split": 2}, "router": {"top_k": 4}}, "shards are not scaled"),
        ({}, None),
    ):
        start = place(**choices)
        case = read_case(start)
        assert copies_are_the_seed(case.config, start)[:1] == ([reason] if reason else [])
        assert findings(case) == {}
        shutil.rmtree(start)


# ---------------------------------------------------------------------------------------------------- whole and parts


def test_an_unfinished_training_runs_or_has_stopped(place):
    start, rows = place(), healthy_rows()[:30]
    case = unfinished(start, rows)
    assert "running: step 30 of 64" in the("progress", case).said and case.state == "training"
    metrics = case.directory / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 31, "tok')  # being written
    assert read_case(case.directory, train=TRAIN).step == 30
    os.utime(metrics, (1e9, 1e9))
    stopped = read_case(case.directory, train=TRAIN)
    assert stopped.assembled == start  # the only one of that name beside it
    assert findings(stopped) == {"progress": "look"}
    assert the("progress", stopped).do.startswith("start the same command again")
    (case.directory / "failed.json").write_text('{"error": "FloatingPointError: step 30, rank 0: loss nan"}')
    failed = read_case(case.directory, train=TRAIN)
    assert findings(failed) == {"progress": "bad"}
    assert "failed after step 30: FloatingPointError: step 30, rank 0: loss nan" in the("progress", failed).said


def test_metrics_without_rows_are_found(place):
    case = read_case(trained(place(), []))
    assert findings(case) == {"progress": "look"} and the("progress", case).said.startswith("metrics.jsonl has no rows")
    write_rows(case.directory, healthy_rows()[:50])
    assert findings(read_case(case.directory)) == {"progress": "look"}


def test_what_is_known_without_the_assembly_is_said(place, tmp_path):
    case = unfinished(place(), changed(healthy_rows(), load=COLLAPSE)[:40])
    shutil.rmtree(case.assembled)
    found = read_case(case.directory)
    assert found.config is None and findings(found) == {"proof": "look", "ffn collapse": "bad"}


def test_what_is_no_mixture_is_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="no mixture; expected config.json with model_type 'upcycled'"):
        read_case(sources["seed"])
    with pytest.raises(ValueError, match="no mixture"):
        read_case(tmp_path)
    branch = tmp_path / "branch-code-01234567.partial"
    branch.mkdir()
    write_rows(branch, [{"step": 1, "loss": 3.0}])
    with pytest.raises(ValueError, match="tells of no experts"):
        read_case(branch)
    (branch / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no row of metrics"):
        read_case(branch)


def test_a_directory_that_is_not_there_is_named_before_the_proof(place, capsys):
    start = place()
    before = (start / "proof.json").read_bytes()
    assert WORDS["doctor"]([str(start), "--prove", "seed=/nonexistent"]) == 2
    assert "upcycle: seed=/nonexistent: no such directory; give" in capsys.readouterr().err
    assert (start / "proof.json").read_bytes() == before


def test_the_table_folds_what_is_long_and_a_trend_ends_at_zero(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    start = place()
    with torch.no_grad():
        weights = load_file(start / "model.safetensors")
        name = max((name for name in weights if "experts" in name), key=len)
        weights[name][..., 0] = math.nan
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    assert WORDS["doctor"]([str(start)]) == 1
    printed = capsys.readouterr().out
    assert "…" not in printed and name in "".join(printed.split())
    shutil.rmtree(start)
    rows = changed(healthy_rows(), load=lambda step: [[(step + 10) / 80, *[(70 - step) / 240] * 3]] * 2)
    case = read_case(trained(place("btx_top1"), rows))
    assert "; 0.00 after 32 more" in the("ffn load trend", case).said


GOOD = json.dumps(healthy_rows(1)[0]) + "\n"
DAMAGED = {
    "metrics.jsonl": {
        GOOD + '{"step": "x"}\n': "line 2 is no row of metrics (no figures of a step)",
        GOOD + GOOD.replace('"lr": 0.001', '"lr": null'): "line 2 is no row of metrics (lr=None is no number)",
        GOOD + GOOD.replace('"loss": ', '"loss": null, "was": '): "line 2 is no row of metrics (loss=None is no number)",
        GOOD.replace('"lr": 0.001, ', ""): "lacks 'lr'",
        GOOD + GOOD.replace('"load": [[', '"load": [[[0.5], '): "damaged (",
        b"\xff\xfe\x00garbage": "damaged ('utf-8' codec",
    },
    "stage.json": {"[]": "got list, expected an object", '{"function": "train_model"}': "lacks 'config'"},
    "assemble/proof.json": {
        "[]": "got list", "{}": "lacks 'one_hot_errors'", '{"one_hot_errors": {"code": "x"}}': "damaged (could not convert",
    },
    "assemble/assembly.json": {"[]": "got list, expected an object", "{}": "lacks 'placed'"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_is_named_in_one_line(place, capsys, name, text):
    start = place()
    out = trained(start, healthy_rows())
    path = start / name.removeprefix("assemble/") if name.startswith("assemble/") else out / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert WORDS["doctor"]([str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"upcycle: {path}: ") and DAMAGED[name][text] in said and said.count("\n") == 1, said


def test_the_word_prints_a_table_or_json_and_its_exit_status_is_the_verdict(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    start = place("btx_top1")
    assert WORDS["doctor"]([str(start)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{start}: assembled, not trained: ok" and not any("->" in line for line in printed)
    out = trained(start, changed(healthy_rows(), load=DEAD))
    assert WORDS["doctor"]([str(out)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: trained: bad\n")
    assert "-> ffn dead experts: mixtures.moe.assemble.router.losses.balance_coefficient=0.1 (is 0.01)" in printed
    assert WORDS["doctor"]([str(out), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["state"], found["step"], found["steps"]) == ("bad", "trained", 64, 64)
    (dead,) = [check for check in found["checks"] if check["verdict"] != "ok"]
    assert dead["check"] == "ffn dead experts" and dead["figure"] == pytest.approx(0.04)
    assert WORDS["doctor"]([]) == 2 and WORDS["doctor"]([str(out), "--jsn"]) == 2
    assert WORDS["doctor"]([str(start.parent / "nowhere")]) == 2
    assert "expected DIR|RUN [--json] [--prove [NAME=DIR ...]]" in capsys.readouterr().err


def test_a_run_is_all_its_mixtures(place, capsys, tmp_path):
    start, run = place(), tmp_path / "runs" / "one"
    case = unfinished(start, changed(healthy_rows(), load=[[0.5, 0.5, 0.0, 0.0]] * 2)[:40])
    other = shutil.copytree(start, tmp_path / "assemble-other-01234567")
    run.mkdir(parents=True)
    manifest = {
        "seed": "seed-00000000", "assemble/moe": start.name, "mix/moe": "mix-moe-ffff0000", "assemble/none": "assemble-none-0",
        "assemble/other": "assemble-other-01234567",
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(json.dumps({"artifacts": str(tmp_path), "mixtures": {"moe": {"train": TRAIN}}}))
    assert WORDS["doctor"]([str(run)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{case.directory}: training is not finished: bad"
    assert printed[-2:] == [f"{other}: assembled, not trained: ok", "1 bad, 0 look, 1 ok"]
    (run / "manifest.json").write_text(json.dumps({"assemble/none": "assemble-none-0"}))
    assert WORDS["doctor"]([str(run)]) == 2
    assert "none of its mixtures is assembled yet" in capsys.readouterr().err
