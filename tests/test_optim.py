"""Schedules, phases and parameter groups."""

import math

import pytest
import torch
from torch import nn

from tests import reference
from tests.tiny import dense_config
from upcycle.config import GroupConfig, OptimizerConfig, PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.configuration import UpcycledConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    plan_phases,
    schedule_factor,
    set_learning_rate,
    set_trainable,
    trainable_names,
)


def config(**changes):
    settings = dict(tokens=1000, proportions={"a": 1.0}, sequence_length=10, batch_sequences=1, micro_batch_sequences=1)
    return TrainConfig(**settings | dict(lr=1.0) | changes)


def mixture():
    seed = dense_config("gpt_neox")
    return UpcycledForCausalLM._from_config(
        UpcycledConfig(seed=seed.to_dict(), experts=["a", "b"], attention="mixture")
    )


def test_schedules_start_at_the_first_warmup_step_and_end_where_they_say():
    for kind, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("wsd", 0.1)):
        schedule = ScheduleConfig(kind=kind, warmup_steps=9, final_fraction=0.1, decay_fraction=0.5)
        rates = [schedule_factor(schedule, step, 1009) for step in range(1009)]
        assert rates[0] == pytest.approx(0.1) and rates[8] == pytest.approx(0.9) and rates[9] == 1.0
        assert rates[-1] == pytest.approx(end, abs=2e-3)
        assert rates[9:] == sorted(rates[9:], reverse=True)
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, final_fraction=0.0, decay_fraction=0.25)
    assert [schedule_factor(wsd, step, 100) for step in (0, 74, 75)] == [1.0, 1.0, 1.0]
    assert schedule_factor(wsd, 99, 100) == pytest.approx(0.04)
    cosine = ScheduleConfig(kind="cosine", warmup_steps=0, final_fraction=0.0)
    assert schedule_factor(cosine, 50, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_every_phase_runs_the_schedule_with_its_own_peak():
    train = config(
        phases=(PhaseConfig(steps=20, trainable=("router",), lr=3.0), PhaseConfig(tokens=300), PhaseConfig()),
        schedule=ScheduleConfig(kind="constant", warmup_steps=4),
    )
    phases = plan_phases(train)
    assert [(phase.start, phase.stop, phase.lr) for phase in phases] == [(0, 20, 3.0), (20, 50, 1.0), (50, 100, 1.0)]
    rates = [learning_rate(train, phases, step) for step in (0, 19, 20, 24, 50)]
    assert rates == pytest.approx([0.6, 3.0, 0.2, 1.0, 0.2])


def test_phases_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"train.phases\[0\] takes 101 steps, but 100 of 100 are left"):
        plan_phases(config(phases=(PhaseConfig(steps=101), PhaseConfig())))
    with pytest.raises(ValueError, match=r"train.phases\[1\] takes 10 steps, but 90 of 100 are left"):
        plan_phases(config(phases=(PhaseConfig(steps=10), PhaseConfig(steps=10))))


def test_every_parameter_is_in_exactly_one_group_and_vectors_do_not_decay():
    model = mixture()
    options = OptimizerConfig(weight_decay=0.1, groups={"router": GroupConfig(lr_multiplier=10.0, weight_decay=0.0)})
    groups = parameter_groups(model, config(optimizer=options))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            vector = "bias" in name or "norm" in name
            assert group["weight_decay"] == (0.0 if vector or ".router." in name else 0.1), name
            assert group["lr_multiplier"] == (10.0 if ".router." in name else 1.0)


def test_trainable_patterns_are_groups_or_expressions_and_must_match():
    names = [name for name, _ in mixture().named_parameters()]
    assert all(".router." in name for name in trainable_names(names, PhaseConfig(trainable=("router",))))
    frozen = trainable_names(names, PhaseConfig(frozen=("router", r"layers\.0\.")))
    assert frozen == {name for name in names if ".router." not in name and "layers.0." not in name}
    with pytest.raises(ValueError, match=r"'routers' matches no parameter of this model; nearest: router"):
        trainable_names(names, PhaseConfig(trainable=("routers",)))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        trainable_names(names, PhaseConfig(trainable=("router",), frozen=("router",)))


def test_frozen_parameters_stay_bit_equal_and_do_not_decay():
    model = mixture()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config(lr=0.1))
    set_trainable(model, PhaseConfig(frozen=("router", "experts")))
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = ".router." in name or ".experts." in name
        assert torch.equal(before[name], parameter) == frozen, name


def test_adamw_steps_equal_the_slow_twin():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    weight = model.weight.detach().clone()
    options = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6, clip_norm=0.5)
    optimizer = build_optimizer(model, config(lr=0.05, optimizer=options))
    gradients = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        set_learning_rate(optimizer, 0.05)
        optimizer.step()
    states = [{}]
    for gradient in gradients:
        (weight,), _ = reference.clip_and_adamw([weight], [gradient], states, 0.05, (0.8, 0.9), 1e-6, 0.1, 0.5)
    torch.testing.assert_close(model.weight.detach(), weight)
