"""Merges in a run: which stages they are, whose curvature they read on which text, and what is refused before anything runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.config import build
from launch.merges import texts_of
from launch.overrides import rewritten
from launch.recipes import upcycle
from tests.tiny import dense_models
from upcycle.checkpoint import Checkpoint
from upcycle.merge import METHODS
from upcycle.merge_config import MergeConfig
from upcycle.store import Store

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("eval.sequence_length=64", "curvature.sequence_length=64")  # as many as these models have positions
BROUGHT = ("experiment=merge", "seed.path={A}", "++branches.code.path={B}", "++branches.law.path={C}")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    first, *others = dense_models("llama", 3, dtype=torch.float32)
    for model in others:
        for own, start in zip(model.parameters(), first.parameters(), strict=True):
            own.data = start.data + 0.05 * own.data
    for name, model in zip("ABC", (first, *others), strict=True):
        model.save_pretrained(root / name)
    return {name: root / name for name in "ABC"}


def configured(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=list(overrides))
    return build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))


def declared(*overrides: str):
    return upcycle(configured(*overrides), Store("nowhere"))


def brought(models: dict[str, Path], *more: str) -> list[str]:
    return [one.format(**models) for one in BROUGHT] + list(more)


def test_merges_are_stages_and_curvature_is_measured_once_for_all_of_them():
    found = declared(
        "experiment=tiny", "+merges={a: fisher, b: gradient_matching, c: {method: regmean, weights: {seed: 0, law: 0}}}",
        "mixtures.btx.assemble.merge=fisher", "mixtures.bam_shared_kv.assemble.merge=ties",
    )  # fmt: skip
    stages, models = found.store.stages, ("seed", "code", "law", "math")
    assert {name for name in stages if name.startswith("curvature/")} == {
        *(f"curvature/fisher/{name}" for name in models), "curvature/gram/code", "curvature/gram/math",
    }  # fmt: skip
    fisher = {name: stages[f"curvature/fisher/{name}"] for name in models}
    assert stages["merge/a"].inputs["fisher"] == stages["assemble/btx"].inputs["fisher"] == fisher
    assert set(stages["merge/c"].inputs["gram"]) == {"code", "math"}
    assert set(stages["assemble/bam_shared_kv"].inputs) == {"seed", "branches"}
    assert {"eval/a", "eval/b", "eval/c"} <= set(stages) and set(found.merges) == {"a", "b", "c"}
    assert stages["curvature/fisher/code"].config["proportions"] == {"code": 0.9, "general": 0.1}
    before = [["seed"], ["branch/code", "branch/law", "branch/math"]]
    assert found.lineages["a"].stages == [*before, [f"curvature/fisher/{name}" for name in models], ["merge/a"]]
    passes = 4 * 256 * 128 * found.lineages["seed"].shape.train_flops_per_token(128)  # models, sequences, tokens
    assert found.lineages["a"].flops == pytest.approx(found.lineages["soup"].flops + passes)
    assert found.lineages["a"].tokens == found.lineages["soup"].tokens
    assert found.lineages["btx"].stages[2][0] == "curvature/fisher/seed"


def test_estimates_of_curvature_are_compared_where_that_is_asked_for():
    stages = declared("experiment=tiny", "curvature.compare=true", "merge=fisher").store.stages
    compared = stages["curvature/compared/law"]
    assert compared.inputs["fisher"] == stages["curvature/fisher/law"]
    assert {name for name in stages if name.startswith("curvature/hessian/")} == {
        f"curvature/hessian/{name}" for name in ("seed", "code", "law", "math")
    }


def test_task_arithmetic_is_held_against_the_dense_continuation():
    stages = declared("experiment=tiny", "curvature.compare=true").store.stages
    error = stages["curvature/task_arithmetic"]
    assert error.inputs["target"] == stages["dense"] and error.inputs["fisher"] == stages["curvature/fisher/seed"]
    for name in ("code", "law", "math"):
        at_target, at_branch = error.inputs["at_target"][name], error.inputs["at_branch"][name]
        assert at_target.config == at_branch.config and at_target.config["curvature"].labels == "observed"
        assert at_target.inputs["model"] == stages["dense"] and at_branch.inputs["model"] == stages[f"branch/{name}"]
        assert at_target.inputs["data"] == at_branch.inputs["data"]
    assert (
        "curvature/task_arithmetic"
        not in declared("experiment=tiny", "curvature.compare=true", "dense=null").store.stages
    )


def test_what_is_measured_is_part_of_the_key_and_nothing_else_changes():
    keys = {
        more: {
            name: one.key
            for name, one in declared("experiment=tiny", "+merges={a: fisher, b: ties}", *more).store.stages.items()
        }
        for more in ((), ("curvature.sequences=7",), ("+curvature.texts.law={code: 1.0}",))
    }
    plain, *others = keys.values()
    changed = [{name for name in plain if plain[name] != other[name]} for other in others]
    measured = {f"curvature/fisher/{name}" for name in ("seed", "code", "law", "math")}
    assert changed == [
        measured | {"merge/a", "eval/a", "report"},
        {"curvature/fisher/law", "merge/a", "eval/a", "report"},
    ]


@pytest.mark.parametrize(
    "setting, kinds",
    [("curvature.labels=observed", {"fisher", "kfac"}), ("curvature.largest_factor=5", {"gram", "kfac"})],
)
def test_a_setting_that_a_kind_does_not_read_is_no_part_of_its_key(setting, kinds):
    overrides = ("experiment=tiny", "curvature.compare=true", "+merges={a: regmean, b: mats}")
    before, after = (declared(*overrides, *more).store.stages for more in ((), (setting,)))
    measured = {name for name in before if name.startswith("curvature/") and before[name].key != after[name].key}
    assert {name.split("/")[1] for name in measured} - {"compared", "task_arithmetic"} == kinds


def test_on_which_text_a_model_is_measured(models):
    domains = ("+domains@domains.code=code", "+domains@domains.math=math")
    cfg = configured(*brought(models, "merge=fisher", *domains, *SHORT, "+curvature.texts.law={math: 2, code: 1}"))
    assert texts_of(cfg, "code") == {"code": 1.0}  # the domain of its name
    assert texts_of(cfg, "seed") == {"code": 1.0, "math": 1.0}
    assert texts_of(cfg, "law") == {"math": 2, "code": 1}
    trained = configured("experiment=tiny")
    assert texts_of(trained, "seed") == trained.seed.train.proportions


MISTAKES = {
    ("merge=tie",): "merge='tie' is not known; expected one of average, .*did you mean ties",
    ("merge={metod: ties}",): "merge.metod: unknown key; did you mean method",
    (
        "merge={method: ties, options: {dens: 0.1}}",
    ): "merge=ties has no option 'dens'; expected density, scale; did you mean density",
    (
        "+merges.x={method: ties, weights: {cod: 1}}",
    ): r"merges.x: merge.weights.cod: not one of the models .*did you mean code",
    ("merge={method: ties, roles: {norms: average}}",): "merge.roles.norms: ",
    (
        "merge=fisher",
    ): r"a merge reads the curvature of seed, which was brought along, .*\(there is none\), after adding one",
    (
        "merge=fisher",
        "+domains@domains.code=code",
    ): r"reads the curvature of law, which was brought along.*write curvature.texts.law=",
    (
        "merge=fisher",
        "+domains@domains.code=code",
        "+curvature.texts.lwa={code: 1}",
    ): "curvature.texts.lwa: expected one of seed, code, law",
    (
        "merge=fisher",
        "+domains@domains.code=code",
        "+curvature.texts.law={cod: 1}",
    ): "curvature.texts.law names 'cod', expected one of",
    (
        "merge=fisher",
        "+domains@domains.code=code",
        "+curvature.texts.law={code: 1}",
        "eval.sequence_length=64",
        "curvature.sequence_length=65",
    ): ("curvature.sequence_length=65 exceeds the seed's 64 positions"),
    ("+merges.code=ties",): "merges.code: that name belongs to branches.code",
    ("+merges.x=ties", "out=x"): r"this experiment makes 2 mixtures and merges \(merged, x\), expected exactly one",
    ("+merges.merged=dare",): "merge and merges.merged are two settings of one model",
    (
        "+curvature.texts.law={code: 1}",
        "+domains@domains.code=code",
    ): "curvature.texts has no effect: no merge of this run reads curvature",
    (
        "merge=fisher",
        "+domains@domains.code=code",
        "+curvature.texts.law={}",
    ): r"curvature: texts.law=\{\} must name domains with shares",
    (
        "merge=fisher",
        "+domains@domains.code=code",
        "+curvature.texts.law={code: -1}",
    ): "must name domains with shares >= 0",
    ("~branches.code", "~branches.law"): "merge has no branch to be made of, expected at least one",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_merge_that_cannot_be_made_is_refused_before_anything_runs(models, overrides):
    with pytest.raises(ValueError, match=MISTAKES[overrides]):
        configured(*brought(models, *overrides))


def test_a_mixture_that_is_drawn_merges_nothing():
    with pytest.raises(
        ValueError, match="scratch=true draws every weight at random, and assemble.merge=ties merges weights"
    ):
        configured("experiment=tiny", "+mixtures.btx.scratch=true", "mixtures.btx.assemble.merge=ties")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_names_of_ones_own_need_no_plus():
    typed = [
        "merges={a: ties}",
        "merges.b=ties",
        "curvature.texts.law={code: 1}",
        "curvature.sequences=3",
        "+merges.c=dare",
    ]
    assert rewritten(typed) == ["++merges={a: ties}", "++merges.b=ties", "++curvature.texts.law={code: 1}", *typed[3:]]


@pytest.mark.slow
def test_checkpoints_are_merged_by_one_command(models, tmp_path):
    words = [one.format(**models).replace("++", "") for one in BROUGHT]
    done = run(*words, "merge={method: ties, options: {density: 0.5}, weights: {law: 2}}", "out=merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "merge/merged: 3 checkpoints fit together" in done.stdout and "merged: merged" in done.stdout
    found, made = Checkpoint(tmp_path / "merged"), json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert made["merge"] == {"method": "ties", "options": {"density": 0.5}, "weights": {"law": 2.0}}
    assert found.names == Checkpoint(models["A"]).names
    again = run(*words, "merge={method: ties, options: {density: 0.5}, weights: {law: 2}}", "out=merged", cwd=tmp_path)
    assert again.returncode == 0 and "made in" not in again.stdout
    explained = run("explain", "merged", cwd=tmp_path)
    assert explained.stdout.startswith("merge       ties (density 0.5); weights: law 2\nof          seed, code, law\n")
    other = run(*words, "merge=average", "out=merged", cwd=tmp_path)
    assert other.returncode == 2 and "out=merged exists already and is not an empty directory" in other.stderr


def test_every_method_has_its_merge_in_the_experiment():
    cfg = configured("experiment=merging", "rng_seed=7")
    ways = set(METHODS) - {"average", "weighted", "camex"}  # which has an experiment of its own
    assert {name: merge.method for name, merge in cfg.merges.items()} == {name: name for name in ways}
    assert cfg.merges["dare"].options == {"rng_seed": 7} and cfg.merges["ties"].record == "ties"
    for kind in ("btx", "bam"):
        assert cfg.mixtures[kind].assemble.merge == MergeConfig()
        for name in ways:
            start, trained = cfg.mixtures[f"{kind}_{name}_start"], cfg.mixtures[f"{kind}_{name}"]
            assert start.assemble == trained.assemble and trained.assemble.merge == cfg.merges[name]
            assert start.train is None and trained.train == cfg.mixtures[kind].train
