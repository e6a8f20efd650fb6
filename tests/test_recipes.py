"""The recipe: which stages a config means, what they share, and what each model is said to have cost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.config import build
from launch.recipes import upcycle
from tests.tiny import dense_models
from upcycle.batches import consumed_tokens
from upcycle.checkpoint import Checkpoint
from upcycle.store import Run, Store

ROOT = Path(__file__).resolve().parent.parent


def configured(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=list(overrides))
    return build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))


def declared(*overrides):
    return upcycle(configured(*overrides), Store("nowhere"))


def test_dense_continuation_has_the_tokens_of_branches_and_mixture_domain_by_domain():
    cfg = configured("experiment=demo")
    experiment = upcycle(cfg, Store("nowhere"))
    dense = experiment.store.stages["dense"].config["train"]
    expected: dict[str, int] = {}
    for train in [branch.train for branch in cfg.branches.values()] + [cfg.mixtures["btx"].train]:
        sequences = train.steps * train.batch_sequences
        for domain, count in consumed_tokens(
            train.proportions, train.rng_seed, train.sequence_length, sequences
        ).items():
            expected[domain] = expected.get(domain, 0) + count
    assert dense.tokens == sum(expected.values())
    drawn = consumed_tokens(
        dense.proportions, dense.rng_seed, dense.sequence_length, dense.steps * dense.batch_sequences
    )
    for domain, count in expected.items():
        assert drawn[domain] == pytest.approx(count, abs=2 * dense.batch_tokens)
    lineages = experiment.lineages
    assert lineages["dense"].tokens == pytest.approx(lineages["btx"].tokens, abs=2 * dense.batch_tokens)


def test_streams_go_on_where_earlier_stages_stopped():
    cfg = configured("experiment=demo")
    stages = upcycle(cfg, Store("nowhere")).store.stages
    seed, code = cfg.seed.train, cfg.branches["code"].train
    used = consumed_tokens(seed.proportions, 1, seed.sequence_length, seed.steps * seed.batch_sequences)
    more = consumed_tokens(code.proportions, 1, code.sequence_length, code.steps * code.batch_sequences)
    assert stages["branch/code"].config["skip_tokens"] == {name: used[name] for name in ("code", "general")}
    assert stages["dense"].config["skip_tokens"] == used
    assert stages["branch/math"].config["skip_tokens"]["general"] == used["general"] + 2 * more["general"]
    after = stages["mix/bam"].config["skip_tokens"]
    assert after["code"] == used["code"] + more["code"] and after["general"] == used["general"] + 3 * more["general"]


def test_a_mixture_costs_the_seed_once_and_every_branch():
    cfg = configured("experiment=demo")
    found = upcycle(cfg, Store("nowhere")).lineages
    seed, mix = found["seed"], cfg.mixtures["bam"].train
    branches = sum(found[name].tokens - seed.tokens for name in cfg.branches)
    assert found["bam"].tokens == seed.tokens + branches + mix.steps * mix.batch_tokens
    assert found["soup"].tokens == seed.tokens + branches and found["soup"].flops < found["bam"].flops
    assert found["bam"].stages == [
        ["seed"], ["branch/code", "branch/law", "branch/math"], ["assemble/bam"], ["mix/bam"],
    ]  # fmt: skip
    own = mix.steps * mix.batch_tokens * found["bam"].shape.train_flops_per_token(mix.sequence_length)
    assert found["bam"].flops == pytest.approx(found["soup"].flops + own)


def keys(*overrides):
    return {name: stage.key for name, stage in declared(*overrides).store.stages.items()}


def test_a_setting_changes_the_keys_of_what_it_touches_only():
    base = keys("experiment=demo")

    def changed(*overrides):
        return {name for name, key in keys("experiment=demo", *overrides).items() if base.get(name) != key}

    assert changed("launch.threads=1", "launch.checkpoint_seconds=5", "track=wandb", "track.tensorboard=true") == set()
    assert changed("+mixtures.bam.train.lr=1.0e-5") == {"mix/bam", "eval/bam", "report"}
    assert {"branch/law", "soup", "assemble/btx", "mix/btx", "report"} <= changed("+branches.law.train.lr=1.0e-5")
    assert not {"seed", "branch/code", "dense", "eval/code"} & changed("+branches.law.train.lr=1.0e-5")
    assert changed("eval.max_tokens=7") == {name for name in base if name.startswith("eval/")} | {"report"}
    assert {name for name in base if "/" in name and not name.startswith(("documents", "tokens", "eval"))} <= changed(
        "rng_seed=2"
    )


def test_tasks_are_off_and_change_no_other_key():
    off, on = keys("experiment=demo"), keys("experiment=demo", "tasks=continuations")
    assert not any(name.startswith(("tasks/", "questions/")) for name in off)
    assert {name for name in off if off[name] != on[name]} == {"report"}
    models = {name.removeprefix("eval/") for name in off if name.startswith("eval/")}
    domains = {name.removeprefix("documents/") for name in off if name.startswith("documents/")}
    added = {f"tasks/{name}" for name in models} | {f"questions/{name}" for name in domains}
    assert set(on) - set(off) == added

    def changed(*overrides):
        other = keys("experiment=demo", "tasks=continuations", *overrides)
        return {name for name in on if on[name] != other.get(name)}

    tasks = {name for name in added if name.startswith("tasks/")}
    assert changed("tasks.limit=5") == tasks | {"report"}
    assert changed("tasks.continuations.choices=3") == added | {"report"}
    assert changed("tasks.names=[continuations_law]") == tasks | {"report"} | {
        f"questions/{name}" for name in domains - {"law"}
    }
    stages = list(declared("experiment=demo", "tasks=continuations").store.stages)
    assert stages.index("questions/law") < stages.index("seed")  # too little text stops there


def test_an_oracle_has_no_tasks_without_a_domain(monkeypatch):
    import evals.harness

    monkeypatch.setattr(evals.harness, "check_names", lambda *arguments: None)
    oracle = ("experiment=demo", "+assemble@mixtures.told.assemble=btx_oracle", "+mixtures.told.train.tokens=0")
    assert "tasks/told" in declared(*oracle, "tasks=continuations").store.stages
    with pytest.raises(ValueError, match="mixtures.told has an oracle router, .* and gsm8k of tasks.names has none"):
        declared(*oracle, "tasks=continuations", "tasks.names=[continuations,gsm8k]")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in zip(("seed", "code"), dense_models("llama", 2, dtype=torch.float32), strict=True):
        model.save_pretrained(root / name)
    return root


def test_a_checkpoint_enters_the_store_by_content(checkpoints, tmp_path):
    def imported(path):
        cfg = configured("experiment=tiny")
        branches = {"code": replace(cfg.branches["code"], path=str(path), train=None)}
        small = replace(cfg, branches=branches, mixtures={"btx": cfg.mixtures["btx"]}, dense=None, soup=False)
        store = Store(tmp_path / "artifacts")
        return store, upcycle(small, store).store.stages["branch/code"]

    store, stage = imported(checkpoints / "code")
    store.make(stage, Run(say=lambda text: None))
    ours, theirs = Checkpoint(stage.path), Checkpoint(checkpoints / "code")
    assert ours.names == theirs.names and all(torch.equal(ours.get(n), theirs.get(n)) for n in ours.names)
    moved = shutil.copytree(checkpoints / "code", tmp_path / "moved")
    assert imported(moved)[1].key == stage.key
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert imported(moved)[1].key != stage.key


def test_training_text_that_routers_start_from_is_an_input_of_the_assembly():
    base, centroid = keys("experiment=demo"), "mixtures.btx.assemble.router.init.kind=domain_centroid"
    stages = declared("experiment=demo", centroid).store.stages
    assert sorted(stages["assemble/btx"].inputs["data"]) == [
        "code",
        "general",
        "law",
        "math",
    ]  # and none that is held out
    assert all("data" not in stages[f"assemble/{name}"].inputs for name in ("bam", "btx_random"))
    first = keys("experiment=demo", centroid)
    assert {name for name in base if base[name] != first[name]} == {"assemble/btx", "mix/btx", "eval/btx", "report"}
    other = keys("experiment=demo", centroid, "domains.general.max_bytes=1000000")
    assert first["assemble/btx"] != other["assemble/btx"]
    fewer = keys("experiment=demo", centroid, "mixtures.btx.assemble.router.init.tokens=1000")
    assert {name for name in first if first[name] != fewer[name]} == {"assemble/btx", "mix/btx", "eval/btx", "report"}


def test_frankenmoe_is_one_override_away():
    stages = declared("experiment=demo", "+assemble@mixtures.x.assemble=frankenmoe_hidden").store.stages
    choice = stages["assemble/x"].config
    assert choice.merge.method == "seed" and not choice.router.trained and choice.router.init.kind == "hidden_mean"
    assert (
        set(choice.router.init.prompts) == {"seed", "code", "law", "math"} and "data" not in stages["assemble/x"].inputs
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+branches.x={train: {proportions: {code: 1.0}}}", "mixtures.btx.assemble.router.init.kind=domain_centroid"],
         r"mixtures\.btx\.assemble\.router\.init\.kind=domain_centroid needs the training text of every branch's domain, "
         r"got those of code, law, math, general: none is called x; "),
        (["+branches.x={train: {proportions: {code: 1.0}}}", "+assemble@mixtures.f.assemble=frankenmoe_embed"],
         r"mixtures\.f\.assemble\.router\.init\.prompts has no texts of x, expected some of every model that experts come "
         r"from \(seed, code, law, math, x\)"),
    ],
)  # fmt: skip
def test_missing_texts_are_named_before_anything_runs(overrides, message):
    with pytest.raises(ValueError, match=message):
        configured("experiment=demo", *overrides)


def test_experts_are_removed_and_forced_where_it_is_asked_for():
    assert not [name for name in declared("experiment=demo").store.stages if name.startswith("ablation/")]
    for given, tokens in (("{}", 30000), ("{max_tokens: 500}", 500)):
        experiment = declared("experiment=demo", f"ablation={given}")
        stages = {name: one for name, one in experiment.store.stages.items() if name.startswith("ablation/")}
        assert set(stages) == {f"ablation/{name}" for name in experiment.mixtures}
        assert {one.config.max_tokens for one in stages.values()} == {tokens}
        assert set(experiment.report.inputs["ablations"]) == set(experiment.mixtures)
    with pytest.raises(ValueError, match=r"ablation\.max_tokens"):
        declared("experiment=demo", "ablation={max_tokens: 0}")


def test_trained_mixtures_are_held_against_what_was_assembled():
    stages = declared("experiment=demo").store.stages
    held = {name for name, one in stages.items() if "assembled" in one.inputs}
    assert held == {f"eval/{name.removeprefix('mix/')}" for name in stages if name.startswith("mix/")}
    assert stages["eval/btx"].inputs["assembled"] is stages["assemble/btx"]
