"""`tokens=` and `budget=`: the rule that shares tokens out, and time as tokens, against arithmetic by hand."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

import evals.throughput
from evals.throughput import training_flops_per_second
from launch.budget import read_seconds, read_tokens, shared_out, tokens_within
from launch.config import build
from launch.recipes import upcycle
from launch.speed import Speed, worked_out
from tests.test_config import settings
from tests.test_recipes import configured, declared
from tests.tiny import VOCAB, dense_models, mixture_of
from upcycle.config import TrainConfig
from upcycle.cost import Shape
from upcycle.store import Store


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("50M", 50_000_000), ("1.5B", 1_500_000_000), ("2G", 2_000_000_000), ("300k", 300_000), (1234, 1234), ("7", 7),
     (5e7, 50_000_000), ("0.1T", 100_000_000_000)],
)  # fmt: skip
def test_tokens_are_read(given, tokens):
    assert read_tokens(given) == tokens


@pytest.mark.parametrize("given", ["50MB", "many", "0", "-5", "1.0001k", "", True, "5m", 0.5, float("inf")])
def test_tokens_of_another_form_say_which_is_valid(given):
    with pytest.raises(ValueError, match=r"^tokens=.*: expected a whole number of tokens above 0, such as tokens=50M"):
        read_tokens(given)


@pytest.mark.parametrize(("given", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("0.5h", 1800)])
def test_a_budget_is_read(given, seconds):
    assert read_seconds(given) == seconds


@pytest.mark.parametrize("given", ["2x", "2", 2, "h", "30s", "m30", "0h", "2 hours", "", True, "-1h", "30m1h"])
def test_a_budget_of_another_form_says_which_is_valid(given):
    with pytest.raises(ValueError, match=r"^budget=.*: expected hours and minutes, such as budget=2h, budget=90m or"):
        read_seconds(given)


def test_tokens_are_shared_among_branches_and_mixture_and_so_the_dense_run_has_them():
    cfg, found = configured("experiment=demo", "tokens=3M"), declared("experiment=demo", "tokens=3M")
    assert {branch.train.tokens for branch in cfg.branches.values()} == {800_000}  # 80 % of 3M, three ways
    assert {mixture.train.tokens for mixture in cfg.mixtures.values()} == {600_000}
    dense = found.store.stages["dense"].config["train"]
    assert dense.tokens == pytest.approx(3_000_000, abs=4 * dense.batch_tokens)
    assert cfg.seed == configured("experiment=demo").seed and cfg.tokens == 3_000_000
    other = configured("experiment=demo", "tokens=3M", "shares={branches: 0.25, mixture: 0.75}")
    assert other.branches["law"].train.tokens == 250_000 and other.mixtures["bam"].train.tokens == 2_250_000


def test_what_is_not_trained_gets_no_tokens():
    untrained = {"tokens": "1M", "mixtures.btx.train.tokens": 0}
    cfg = build(settings(untrained))
    assert cfg.mixtures["btx"].train is None and cfg.mixtures["bam"].train.tokens == 200_000
    brought = {name: {"path": "here"} for name in ("code", "law", "math")}
    raw = shared_out(settings({"tokens": "1M", "branches": brought}))
    assert raw["mix"]["tokens"] == 1_000_000 and raw["branch"] == settings({})["branch"]
    raw = shared_out(settings({"tokens": "1M", "mixtures": {}}))
    assert raw["branch"]["tokens"] == 333_333
    assert shared_out(settings({}))["branch"] == settings({})["branch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "1M", "branches.law.train.tokens": 5}, r"branches\.law\.train\.tokens=5 beside tokens=1000000, which is"),
        ({"tokens": "1M", "mixtures.bam.train.tokens": 5}, r"mixtures\.bam\.train\.tokens=5 beside tokens=1000000"),
        ({"tokens": "1M", "shares": {"branches": 1}}, r"shares=\{'branches': 1\}: expected two numbers above 0 that sum to 1, branches and"),
        ({"tokens": "200k", "shares": {"branches": 1.0, "mixture": 0.2}}, r"shares=.*: expected two numbers above 0 that sum to 1"),
        ({"shares": {"branches": 0.7, "mixture": 0.2}}, r"shares=.*: expected two numbers above 0 that sum to 1"),
        ({"tokens": "1M", "shares": {"branches": 1, "mixture": 0}}, r"shares=.*: expected two numbers above 0"),
        ({"tokens": "1M", "branches": {}, "mixtures": {}}, r"tokens=1000000: no branch and no mixture is trained"),
        ({"tokens": "1X"}, r"tokens=1X: expected a whole number"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_shared_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(settings(changes))


@pytest.mark.parametrize("budget", [30.0, 100.0, 5000.0, 12_345.6, 3e7])
def test_the_most_tokens_within_a_time_are_found(budget):
    """20 s whatever happens, 1 s for every 1,000 tokens, in steps of 4,096."""
    asked = []

    def seconds_of(tokens):
        asked.append(tokens)
        return 20 + -(-tokens // 4096) * 4.096

    found = tokens_within(budget, seconds_of, start=1_000_000)
    best = int((budget - 20) // 4.096) * 4096
    assert seconds_of(found) <= budget and 0.98 * best - 4096 <= found <= best and len(asked) < 40
    with pytest.raises(ValueError, match=r"one step of everything, takes about 24 s here after its seed; give it more"):
        tokens_within(24.0, seconds_of, start=1_000_000)


def test_seconds_are_flops_of_everything_after_the_seed_over_what_was_measured():
    cfg = configured("experiment=demo", "btm={}")
    experiment = upcycle(cfg, Store("nowhere"))
    dense, mixture = 2e10, 1e10
    lineages, expected = experiment.lineages, 0.0
    for name in ("code", "law", "math", "dense"):
        expected += (lineages[name].flops - lineages["seed"].flops) / dense
    for name in cfg.mixtures:
        expected += (lineages[name].flops - lineages["soup"].flops) / mixture
    for name in ("seed", "code", "law", "math", "soup", "dense", *cfg.mixtures, "btm"):
        tokens = 30_000 * 6 * (4 if name == "btm" else 1)
        shape = lineages[name].shape
        expected += tokens * shape.forward_flops_per_token(128) / (mixture if name in cfg.mixtures else dense)
    assert Speed(dense, mixture).seconds(experiment, cfg) == pytest.approx(expected)


def quiet():
    return Console(quiet=True)


def nothing():
    pass


def test_a_budget_becomes_tokens_that_fill_it_and_stays_so_when_the_run_goes_on(tmp_path, monkeypatch):
    measured = []

    def speed(cfg):
        measured.append(cfg)
        return Speed(1e9, 5e8)

    monkeypatch.setattr("launch.speed.measure_speed", speed)
    raw = settings({"budget": "10m"})
    changed, record = worked_out(raw, tmp_path, quiet(), nothing)
    cfg = build(changed)
    assert cfg.tokens == record["tokens"] and changed["budget"] is None
    seconds = Speed(1e9, 5e8).seconds(upcycle(cfg, Store("nowhere")), cfg)
    assert 0.97 * 600 < seconds <= 600 and record["seconds"] == pytest.approx(seconds)
    (tmp_path / "manifest.json").write_text(json.dumps({"budget": record}))
    again, _ = worked_out(raw | {"plan": True}, tmp_path, quiet(), nothing)
    assert again["tokens"] == record["tokens"] and len(measured) == 1
    worked_out(settings({"budget": "10m", "seed.sizes.hidden_size": 96}), tmp_path, quiet(), nothing)
    worked_out(settings({"budget": "20m"}), tmp_path, quiet(), nothing)
    assert len(measured) == 3  # other settings, another budget
    assert worked_out(settings({}), tmp_path, quiet(), nothing) == (settings({}), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "2x"}, r"budget=2x: expected hours and minutes"),
        ({"budget": "2h", "tokens": "1M"}, r"budget=2h and tokens=1M both say how long the run is; give one of them"),
        ({"budget": "2h", "launch.config": "ddp"}, r"budget=2h is measured in one process, and launch\.config asks for a group"),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_named_before_anything_is_measured(tmp_path, changes, message):
    def prepare():
        raise AssertionError("measuring")

    with pytest.raises(ValueError, match=message):
        worked_out(settings(changes), tmp_path, quiet(), prepare)


def test_what_a_run_starts_again_has_its_tokens_and_no_budget(monkeypatch):
    from types import SimpleNamespace

    from launch.overrides import own_arguments

    typed = ["experiment=tiny", "budget=2h", "stage=seed"]
    task = SimpleNamespace(overrides=SimpleNamespace(task=OmegaConf.create(typed)))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: task)
    monkeypatch.setattr("sys.argv", ["upcycle", *typed])
    assert own_arguments(7) == ["experiment=tiny", "budget=null", "tokens=7"]
    assert own_arguments() == ["experiment=tiny", "budget=2h"]


TRAIN = TrainConfig(
    tokens=64, proportions={"code": 1.0}, sequence_length=16, batch_sequences=2, micro_batch_sequences=1, lr=1e-3
)


def test_speed_is_the_median_of_steps_after_the_first_ones(monkeypatch):
    def rows(model, config, data, out, run, flops):
        rates = [1, 1, 50, 10, 40, 20, 30]
        assert config.steps == len(rates) and config.batch_tokens == TRAIN.batch_tokens
        (out / "metrics.jsonl").write_text("".join(f'{{"tokens_per_second": {rate}}}\n' for rate in rates))
        return dense_models  # something with `close`

    monkeypatch.setattr(dense_models, "close", lambda: None, raising=False)
    monkeypatch.setattr(evals.throughput, "train", rows)
    model = dense_models("llama", 1, dtype=torch.float32)[0]
    flops = Shape.of_config(model.config.to_dict()).train_flops_per_token(16)
    assert training_flops_per_second(model, TRAIN) == 30 * flops


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_speed_is_measured_by_the_training_loop_itself(kind):
    models = dense_models("llama", 3, dtype=torch.float32)
    model = models[0] if kind == "dense" else mixture_of(models)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert training_flops_per_second(model, TRAIN) > 0 and model.config.vocab_size == VOCAB
    assert any(not torch.equal(before[name], weight) for name, weight in model.named_parameters())
