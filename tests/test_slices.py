"""Training some experts only: theirs is what moves, everything else stays bit for bit, under every strategy that can."""

import json
import re
from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.domains import two_domains
from tests.ranks import run_job
from tests.test_config import settings
from tests.test_ranks import facts, largest_difference, launch, rows, weights
from tests.tiny import dense_models, mixture_of, tokens
from upcycle.batches import Batches
from upcycle.config import OptimizerConfig, PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.engine import MOMENTS
from upcycle.optim import decays, learning_rate
from upcycle.phases import check_strategy, plan_phases
from upcycle.router import RoutingTrace
from upcycle.slices import expert_masks, phase_masks, small
from upcycle.store import Run
from upcycle.train import train

NAMES = ("seed", "code", "law")
KINDS = ("llama", "gpt_neox", "family/gpt2", "family/olmo2", "family/qwen3")
MIXTURES = {"btx": {}, "bam": {"attention": "mixture"}, "bam_shared_kv": {"attention": "mixture", "kv": "shared"}}
OWN = {"trainable": ("router", "experts", "attention"), "experts": ("law",)}
SHARED = {
    "bam_shared_kv": (r"self_attn\.[kv]_proj", r"(query_key_value|c_attn)\.(key|value)", r"k_norm\."),
    "btx": ("attention",),
}


def tiny(kind="llama", dtype=torch.float32, **choices):
    choices = {"balance": "btx", "balance_coefficient": 0.05, "z_coefficient": 0.001} | choices
    return mixture_of(dense_models(kind, 3, dtype=dtype), **choices)


def masks_of(model, *chosen: int):
    return expert_masks(model.config, {name: p.shape for name, p in model.named_parameters()}, chosen)


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", MIXTURES)
def test_a_mask_is_where_an_expert_alone_has_gradients(kind, choice):
    """With every router forced to one expert, elements of the others get none; and each element is one expert's."""
    model = tiny(kind, torch.float64, **MIXTURES[choice])
    total = {}
    for expert in range(3):
        masks = masks_of(model, expert)
        model.zero_grad()
        logits = model(tokens(), trace=RoutingTrace(forced=expert)).logits
        (logits * torch.linspace(-1, 2, logits.numel(), dtype=torch.float64).view_as(logits)).sum().backward()
        touched = 0
        for name, parameter in model.named_parameters():
            if name not in masks:
                continue
            mask = masks[name].expand_as(parameter)
            total[name] = total.get(name, 0) + mask.int()
            if ".router." not in name and parameter.grad is not None:
                assert not parameter.grad[~mask].any(), name
                touched += parameter.grad[mask].count_nonzero().item() > 0.9 * mask.sum().item() > 0
        stacked = [name for name in masks if ".router." not in name and masks[name].any()]
        assert touched >= len(stacked) - 2 * 2  # a key's bias has no gradient: the softmax takes it out
    for name, count in total.items():
        assert (count == 1).all(), name
    wide = (".experts.", ".router.") + ((".attn.", ".attention.", ".self_attn.") if choice == "bam" else ())
    assert set(total) == {name for name, _ in model.named_parameters() if any(part in name for part in wide)} or (
        choice == "bam_shared_kv"
    )


def test_masks_of_several_experts_are_the_union_and_small():
    model = tiny("gpt_neox", attention="mixture", kv="shared")
    both, one, other = masks_of(model, 0, 2), masks_of(model, 0), masks_of(model, 2)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, mask in both.items():
        assert torch.equal(mask.expand(shapes[name]), (one[name] | other[name]).expand(shapes[name]))
        assert mask.numel() <= max(shapes[name])
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[1, :, 2:] = True
    assert small(mask).shape == (3, 1, 5) and torch.equal(small(mask).expand_as(mask), mask)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def config(steps=6, **changes):
    options = dict(
        tokens=steps * 4 * 16, proportions={"low": 0.5, "high": 0.5}, sequence_length=16, batch_sequences=4,
        micro_batch_sequences=2, lr=1e-2, schedule=ScheduleConfig(warmup_steps=1), precision="fp32",
        optimizer=OptimizerConfig(weight_decay=0.1),
    )  # fmt: skip
    return TrainConfig(**options | changes)


def run(model, options, data, out, say=lambda text: None, **extra):
    out.mkdir(parents=True, exist_ok=True)
    return train(model, options, data, out, Run(say, checkpoint_seconds=None, **extra), train_flops_per_token=1.0)


def state_of(model, engine=None):
    """Weights, buffers and, with an engine, moments, by name."""
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters() if engine else ():
        for key in MOMENTS:
            if key in (state := engine.optimizer.state.get(parameter, {})):
                found[f"{name}|{key}"] = state[key].clone()
    return found


def check_moved(before, after, masks, biases=()):
    """What masks cover has changed, everywhere but in moments and biases of keys; everything else has not by a bit."""
    for name, old in before.items():
        mask = masks.get(name.split("|")[0], torch.zeros(1, dtype=torch.bool)).expand_as(old)
        if name.endswith("router.bias"):
            mask = torch.tensor([expert in biases for expert in range(3)])
        assert torch.equal(after[name][~mask], old[~mask]), name
        if mask.any() and not name.endswith("bias"):
            assert (after[name][mask] != old[mask]).float().mean() > 0.9, name


@pytest.mark.parametrize("choice", MIXTURES)
def test_training_the_new_row_alone_changes_that_row_alone(data, tmp_path, choice):
    options = {**MIXTURES[choice], "router_options": {"bias_rate": 0.01}}
    model = tiny(**options)
    before = state_of(model)
    said = []
    run(model, config(5, phases=(PhaseConfig(trainable=("router",), experts=("law",)),)), data, tmp_path, said.append)
    masks = {name: mask for name, mask in masks_of(model, 2).items() if ".router." in name}
    assert len(masks) == (2 if choice == "btx" else 4) and not said
    after = state_of(model)
    check_moved(before, after, masks, biases=(2,))
    assert all(after[name][2] != 0 for name in after if name.endswith("router.bias"))
    assert any(name.endswith("router.bias") for name in after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", MIXTURES)
def test_training_one_expert_leaves_the_others_weights_and_moments(data, tmp_path, kind, choice):
    """After a phase that trained everything, so that there are old moments; with weight decay."""
    names = [name for name, _ in tiny(kind, **MIXTURES[choice]).named_parameters()]
    shared = tuple(
        pattern
        for pattern in SHARED.get(choice, ())
        if pattern == "attention" or any(re.search(pattern, name) for name in names)
    )
    both = (PhaseConfig(steps=3), PhaseConfig(**OWN, frozen=shared))
    model = tiny(kind, **MIXTURES[choice])
    engine = run(model, config(3, phases=(PhaseConfig(),)), data, tmp_path / "first")
    before = state_of(model, engine)
    model, said = tiny(kind, **MIXTURES[choice]), []
    engine = run(model, config(6, phases=both), data, tmp_path / "both", said.append)
    assert not said
    after = state_of(model, engine)
    assert set(before) == set(after) and any("|exp_avg_sq" in name for name in before)
    check_moved(before, after, masks_of(model, 2))
    loss = [row["cross_entropy"] for row in rows(tmp_path / "both")]
    assert loss[2] != loss[5]


def test_experts_of_attention_that_are_others_are_not_guessed(tmp_path):
    """Feed-forward shards beside whole attention experts: a name of the former does not say which of the latter."""
    model = tiny(attention="mixture")
    model.config.attention_experts = ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"the attention has experts of its own here \(a, b, c\)"):
        phase_masks(model, PhaseConfig(**OWN))


def test_a_shared_expert_trains_or_not_as_it_is_told():
    """Beside an expert it is nobody's own: a phase that names it trains it whole, and says so."""
    for shared in ("seed", "merged"):
        model = tiny(shared_expert=shared)
        masks, whole = phase_masks(model, PhaseConfig(trainable=("experts", "shared_expert"), experts=("code",)))
        assert any("shared_expert" in name for name in whole) and not any("shared_expert" in name for name in masks)


def test_shared_tensors_that_train_beside_an_expert_are_named(data, tmp_path):
    model, said = tiny(attention="mixture", kv="shared"), []
    run(model, config(1, phases=(PhaseConfig(**OWN),)), data, tmp_path, said.append)
    (line,) = said
    assert line == (
        "experts=['law']: 8 tensors that all experts share train too (model.decoder.layers.0.self_attn.k_proj.bias, ...); "
        "freeze them if the other experts are to stay as they are"
    )


@pytest.mark.parametrize("choice", ["btx", "bam"])
def test_one_step_equals_the_slow_twin(data, tmp_path, choice):
    """Gradients of the whole model, cut to the expert's elements: clipped by their own norm, updated by AdamW."""
    options = OptimizerConfig(weight_decay=0.1, clip_norm=0.05)
    phase = PhaseConfig(**OWN, frozen=SHARED.get(choice, ()))
    train_config = config(1, optimizer=options, schedule=ScheduleConfig(warmup_steps=0), phases=(phase,))
    twin, model = tiny(**MIXTURES[choice]), tiny(**MIXTURES[choice])
    masks = masks_of(twin, 2)
    run(model, train_config, data, tmp_path)
    ids = torch.from_numpy(Batches(data, train_config.proportions, 16, 4, train_config.rng_seed).batch(0))
    twin.train()
    trace = RoutingTrace()
    nats, count = reference.next_token_cross_entropy(twin(ids, trace=trace).logits, ids)
    sums = twin.auxiliary_sums(trace, ids)
    weighted = sum(twin.auxiliary_coefficients[name] * value / ids.numel() for name, value in sums.items())
    (nats / count + weighted).backward()
    named = {name: p for name, p in twin.named_parameters() if name in masks and p.grad is not None}
    assert len(named) > 4
    cuts = {name: masks[name].expand_as(p) for name, p in named.items()}
    before = [p.detach()[cuts[name]] for name, p in named.items()]
    gradients = [p.grad[cuts[name]] for name, p in named.items()]
    wd = [options.weight_decay if decays(name, p) else 0.0 for name, p in named.items()]
    rate = learning_rate(train_config, plan_phases(train_config), 0)
    after, norm = reference.clip_and_adamw(before, gradients, [{} for _ in wd], rate, decay=wd, max_norm=0.05)
    (row,) = rows(tmp_path)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    ours = dict(model.named_parameters())
    for (name, cut), theirs in zip(cuts.items(), after, strict=True):
        torch.testing.assert_close(ours[name].detach()[cut].double(), theirs, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("stop", [2, 3, 5])  # inside the first phase, on the boundary, inside the second
def test_resume_equals_straight_run(data, tmp_path, stop):
    phases = (PhaseConfig(steps=3), PhaseConfig(**OWN))
    straight, cut = tiny(attention="mixture"), tiny(attention="mixture")
    run(straight, config(6, phases=phases), data, tmp_path / "straight")

    class Killed(BaseException):
        pass

    def advance(done, total, **figures):
        if done == stop + 1:
            raise Killed

    options = {"checkpoint_steps": stop}
    with pytest.raises(Killed):
        run(cut, config(6, phases=phases), data, tmp_path / "cut", advance=advance, **options)
    resumed = tiny(attention="mixture")
    run(resumed, config(6, phases=phases), data, tmp_path / "cut", **options)
    for (name, a), (_, b) in zip(resumed.named_parameters(), straight.named_parameters(), strict=True):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------------------------------------------------- several


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("choice", ["btx", "bam_shared_kv"])
def test_two_ranks_train_one_expert_as_one_process_does(tmp_path, strategy, choice):
    domains = two_domains(tmp_path / "data")
    tiny("family/qwen3", **MIXTURES[choice]).save_pretrained(tmp_path / "moe")
    frozen = ["attention"] if choice == "btx" else [r"self_attn\.[kv]_(proj|norm)"]
    phases = [{"steps": 3}, {"trainable": list(OWN["trainable"]), "frozen": frozen, "experts": ["law"]}]
    job = {
        "model": str(tmp_path / "moe"), "data": {name: str(path) for name, path in domains.items()},
        "train": json.loads(json.dumps({
            "tokens": 8 * 64, "proportions": {"low": 0.5, "high": 0.5}, "sequence_length": 16, "batch_sequences": 4,
            "micro_batch_sequences": 1, "lr": 3e-3, "schedule": {"warmup_steps": 1}, "precision": "fp32", "phases": phases,
        })),
    }  # fmt: skip
    first = job | {"train": job["train"] | {"tokens": 3 * 64, "phases": [{}]}}
    run_job(job | {"out": str(tmp_path / "single")})
    launch([job | {"out": str(tmp_path / "both")}, first | {"out": str(tmp_path / "first")}], tmp_path, strategy)
    assert largest_difference(rows(tmp_path / "both"), rows(tmp_path / "single")) <= 1e-4
    assert not facts(tmp_path / "both")["said"]
    check_moved(weights(tmp_path / "first"), weights(tmp_path / "both"), masks_of(tiny("family/qwen3", **MIXTURES[choice]), 2))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_strategies_that_cannot_are_refused():
    one = config(phases=(PhaseConfig(**OWN),))
    for strategy in ("single", "ddp", "fsdp2"):
        check_strategy(one, strategy)
    for strategy in ("zero1", "zero2", "zero3"):
        check_strategy(config(), strategy)
        with pytest.raises(ValueError) as error:
            check_strategy(one, strategy, "mixtures.bam.train")
        assert str(error.value) == (
            f"mixtures.bam.train.phases[0].experts=['law'] does not work under {strategy}: DeepSpeed updates whole flat "
            "buffers, so weight decay and old moments would move the other experts too; use single, ddp or fsdp2"
        )


def test_a_group_that_cannot_is_refused_before_it_starts(tmp_path):
    from launch.config import build
    from launch.group_checks import check_group
    from launch.recipes import upcycle
    from upcycle.store import Store
    from upcycle.team import ALONE

    phases = {"mixtures.bam.train.phases": [{"experts": ["law"]}]}
    for name in ("ddp", "zero2"):
        cfg = build(settings(phases | {"launch.config": name, "launch.processes": 2, "mix.micro_batch_sequences": 1}))
        stages = [*upcycle(cfg, Store(tmp_path)).mixtures.values()]
        if name == "ddp":
            check_group(cfg.launch, ALONE, stages)
            continue
        with pytest.raises(
            ValueError, match=r"mixtures.bam.train.phases\[0\].experts=\['law'\] does not work under zero2"
        ):
            check_group(cfg.launch, ALONE, stages)


MISTAKES = {
    "mixtures.bam.train.phases": "mixtures.bam.train.phases[0].experts names 'laws', expected one of seed, code, law, math; "
    "did you mean law?",
    "branches.code.train.phases": "branches.code.train.phases[0].experts names 'laws', expected none: a dense model has no "
    "experts",
    "dense.phases": "dense.phases[0].experts names 'laws', expected none: a dense model has no experts",
}


@pytest.mark.parametrize("where", MISTAKES)
def test_experts_that_are_not_there_are_named_before_anything_runs(where):
    from launch.config import build

    with pytest.raises(ValueError) as error:
        build(settings({where: [{"experts": ["laws"]}]}))
    assert str(error.value) == MISTAKES[where]


def test_experts_that_are_not_there_or_not_trained_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"train.phases\[0\].experts names 'math', expected one of seed, code, law"):
        run(tiny(), config(phases=(PhaseConfig(experts=("math",)),)), data, tmp_path)
    phase = PhaseConfig(trainable=("rest",), experts=("law",))
    with pytest.raises(
        ValueError, match=r"experts=\['law'\] has no effect with trainable=\['rest'\], frozen=\[\]: nothing of"
    ):
        run(tiny(), config(phases=(phase,)), data, tmp_path)
    assert phase_masks(tiny(), replace(phase, experts=())) == ({}, [])
