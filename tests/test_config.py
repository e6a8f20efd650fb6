"""Mistakes that would come out hours into a run are named before it starts, with what, got, expected and fix."""

import copy
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.checks import OWN_NAMES, _check_dense
from launch.config import build
from launch.recipes import upcycle
from upcycle.config import ARCHITECTURES, GROUPS
from upcycle.families import FAMILIES
from upcycle.router_config import RouterConfig
from upcycle.store import Store

ROOT = Path(__file__).resolve().parent.parent


@lru_cache
def composed():
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=["experiment=tiny"])
    return OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)


def settings(changes):
    """experiment=tiny with `changes`: key path -> value, DROP removes the key."""
    raw = copy.deepcopy(composed())
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        if value is DROP:
            del node[last]
        else:
            node[last] = value
    return raw


DROP = object()
SIZES = (
    "hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, "
    "max_position_embeddings, tie_word_embeddings, rms_norm_eps, layer_norm_eps, rope_theta, rope_parameters, "
    "attention_bias, hidden_act, rotary_pct, use_parallel_residual, initializer_range, attention_dropout, hidden_dropout"
)
IMPORTED = {"seed.path": "here", "seed.architecture": None}
OWN = "expected names that are all different (and none of seed, soup, greedy_soup, btm, dense, dense_compute, oracle); rename"
REST = "leave out steps and tokens in the last phase to give it the rest"
MISTAKES = {
    "unknown family": (
        {"seed.architecture": "lama"},
        "seed: architecture='lama' is not supported, expected one of gpt_neox, llama; did you mean llama? "
        "Bring a checkpoint of another family as seed.path",
    ),
    "unknown size": (
        {"seed.sizes.hiden_size": 48},
        f"seed: sizes.hiden_size: unknown size; did you mean hidden_size or hidden_act or num_hidden_layers? Valid here: {SIZES}",
    ),
    "feed-forward biases": (
        {"seed.sizes.mlp_bias": True},
        "seed: sizes.mlp_bias: a seed that is pretrained here has none in its feed-forwards; leave it out",
    ),
    "vocabulary among the sizes": (
        {"seed.sizes.vocab_size": 100},
        "seed: sizes.vocab_size: the vocabulary's size is tokenizer.vocab_size; set it there",
    ),
    "size that cost needs": (
        {"seed.sizes.intermediate_size": DROP, "seed.sizes.num_hidden_layers": DROP},
        "seed: sizes lacks intermediate_size, num_hidden_layers; a seed trained from scratch needs a value for each",
    ),
    "size that is no count": (
        {"seed.sizes.hidden_size": 48.0},
        "seed: sizes.hidden_size=48.0, expected a whole number above 0; give one",
    ),
    "two origins": (
        {"seed.path": "here"},
        "seed: got path=here and architecture=llama, expected exactly one of path (a checkpoint) and architecture "
        "(train one from scratch); set the other to null",
    ),
    "training beside a checkpoint": (
        IMPORTED,
        "seed: train has no effect beside path=here: a checkpoint is taken as it is; set seed.train=null, "
        "or give a branch the training",
    ),
    "seed on the hub": (
        IMPORTED | {"seed.path": "meta/llama", "seed.train": None},
        f"seed.path=meta/llama: no directory {Path('meta/llama').absolute()}, and the Hub's model meta/llama is not whole in "
        f"the cache {HF_HUB_CACHE} and was not downloaded (HF_HUB_OFFLINE=1 forbids downloads); check the name, or fetch it "
        "where the Hub can be reached (hf download meta/llama)",
    ),
    "branch that is nowhere": (
        {"branches.code": {"path": "code-llama"}},
        "branches.code.path=code-llama: no such directory, and not the name of a model on the Hub (org/name or "
        "org/name@revision); check the path",
    ),
    "branches without names": (
        {"branches": ["here"]},
        "branches=['here']: expected settings by name; give each as branches.NAME.KEY=VALUE",
    ),
    "branch without settings": (
        {"branches.code": "here"},
        "branches.code: Input should be an object (got 'here')",
    ),
    "mixture of nothing": (
        {"branches": {}},
        "mixtures.btx has no branch to be made of, expected at least one; give it as branches.NAME.path=DIR with a name of "
        "your choice",
    ),
    "several mixtures for one directory": (
        {"out": "moe"},
        "out=moe: this experiment makes 5 mixtures (btx, btx_top1, btx_random, bam, bam_shared_kv), expected exactly one to "
        "copy there; leave out= out and take them from the store",
    ),
    "branch of two origins": (
        {"branches.code.path": "here"},
        "branches.code: got path=here and train, expected exactly one of them; set branches.code.train=null to take the "
        "checkpoint as it is",
    ),
    "phase longer than the run": (
        {"mix.phases": [{"steps": 17}, {}]},
        f"mix.phases[0] takes 17 steps, but 16 of 16 are left for it; {REST}",
    ),
    "phase of one mixture longer than the run": (
        {"mixtures.bam.train.phases": [{"steps": 17}, {}]},
        f"mixtures.bam.train.phases[0] takes 17 steps, but 16 of 16 are left for it; {REST}",
    ),
    "shared rate of branches": (
        {"branch.lr": "fast"},
        "branch.lr: Input should be a valid number (got 'fast')",
    ),
    "shared rate of mixtures but one": (
        {"mix.lr": "fast", "mixtures.bam.train.lr": 1e-3},
        "mix.lr: Input should be a valid number (got 'fast')",
    ),
    "rate of one branch": (
        {"branches.law.train.lr": "fast"},
        "branches.law.train.lr: Input should be a valid number (got 'fast')",
    ),
    "shared rounding of batches": (
        {"mix.batch_sequences": 7},
        "mix: batch_sequences=7 is not a multiple of micro_batch_sequences=4; make it one",
    ),
    "batches of one mixture": (
        {"mixtures.bam.train.batch_sequences": 7, "mixtures.bam.train.lr": 1e-3},
        "mixtures.bam.train: batch_sequences=7 is not a multiple of micro_batch_sequences=4; make it one",
    ),
    "shared share of an unknown domain": (
        {"mix.proportions": {"cod": 1.0}},
        "mix.proportions names 'cod', expected one of the trained domains (code, law, math, general); did you mean code?",
    ),
    "share of an unknown domain in one mixture": (
        {"mixtures.bam.train.proportions": {"cod": 1.0}},
        "mixtures.bam.train.proportions names 'cod', expected one of the trained domains (code, law, math, general); did you "
        "mean code?",
    ),
    "seed's last phase too short": (
        {"seed.train.phases": [{"steps": 10}, {"steps": 10}]},
        f"seed.train.phases[1] takes 10 steps, but 54 of 64 are left for it; {REST}",
    ),
    "phases that fit a branch and not the dense continuation": (
        {"branch.phases": [{"steps": 10}, {"steps": 22}]},
        f"dense.phases[1] takes 22 steps, but 102 of 112 are left for it; {REST}",
    ),
    "no tokens to match": (
        {"branches": {}, "mixtures": {}},
        "dense: no branch or mixture is trained, so there are no tokens to match; set dense=null",
    ),
    "no phase": (
        {"seed.train.phases": []},
        "seed.train: phases=[] trains nothing; write [{}] for one phase that trains everything",
    ),
    "last phase with two lengths": (
        {"seed.train.phases": [{"steps": 64, "tokens": 65536}]},
        "seed.train: phases[0] has steps=64 and tokens=65536, expected at most one of them; leave one out",
    ),
    "phase without a length": (
        {"seed.train.phases": [{}, {}]},
        "seed.train: phases[0] has steps=None and tokens=None; every phase but the last needs exactly one of steps and tokens",
    ),
    "phase at rate 0": (
        {"seed.train.phases": [{"lr": 0.0}]},
        "seed.train.phases.0.lr: Input should be greater than 0 (got 0.0)",
    ),
    "word that is no group": (
        {"mixtures.bam.train.phases": [{"steps": 2}, {"frozen": ["experts", "roter"]}]},
        "mixtures.bam.train.phases[1].frozen: 'roter' is no parameter group, expected one of router, experts, curvature, "
        "attention, rest; did you mean router? For parameters by name write a regular expression, such as '.*roter'",
    ),
    "derived tokens": (
        {"dense.tokens": 5},
        "dense.tokens=5: the dense continuation gets the tokens of all branches and the longest mixture, domain by domain, "
        "so that the comparison is fair; leave dense.tokens out",
    ),
    "derived proportions": (
        {"dense.proportions": {"code": 1.0}},
        "dense.proportions={'code': 1.0}: the dense continuation gets the tokens of all branches and the longest mixture, "
        "domain by domain, so that the comparison is fair; leave dense.proportions out",
    ),
    "keys shared by one attention": (
        {"mixtures.btx.assemble.kv": "shared"},
        "mixtures.btx.assemble: kv=shared has no effect with attention=merged, which has one attention and so one set of "
        "keys and values; write kv=expert, or attention=mixture for attention experts that share keys and values",
    ),
    "windows beyond the positions": (
        {"eval.sequence_length": 4096},
        "eval.sequence_length=4096 exceeds the seed's 1024 positions; expected at most as many; shorten it, or take a seed that "
        "reads longer text",
    ),
    "training beyond the positions": (
        {"branch.sequence_length": 1025},
        "branch.sequence_length=1025 exceeds the seed's 1024 positions; expected at most as many; shorten it, or "
        "take a seed that reads longer text",
    ),
    "a stride with holes": (
        {"eval.stride": 129},
        "eval: stride=129 leaves tokens out between windows of sequence_length=128; expected at most that, or null",
    ),
    "soft top-2": (
        {"mixtures.btx.assemble.router.kind": "soft"},
        "mixtures.btx.assemble.router: top_k=2 has no effect with kind=soft, where every expert sees every token; "
        "write top_k=1, or kind=top_k if few experts are wanted",
    ),
}
MISTAKES |= {
    f"a branch called {name}": (
        {f"branches.{name}": {"train": {"proportions": {"code": 1.0}}}},
        f"branches.{name}: that name belongs to a model of every report, {OWN} branches.{name}",
    )
    for name in OWN_NAMES
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_runs(mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        build(settings(changes))
    assert str(error.value) == message


@pytest.mark.parametrize(("name", "owner"), [("code", "branches.code"), ("soup", "a model of every report")])
def test_a_mixture_needs_a_name_of_its_own(name, owner):
    raw = settings({f"mixtures.{name}": composed()["mixtures"]["btx"]})
    with pytest.raises(ValueError) as error:
        build(raw)
    assert str(error.value) == f"mixtures.{name}: that name belongs to {owner}, {OWN} mixtures.{name}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", " names no model_type, expected a Hugging Face config; save the model again"),
        ("nonsense", ": not whole JSON (Expecting value: line 1 column 1 (char 0)); copy it again"),
    ],
)
def test_a_directory_without_a_models_config_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError) as error:
        build(settings({"branches.code": {"path": str(tmp_path)}}))
    assert str(error.value) == f"branches.code.path={tmp_path}: {tmp_path / 'config.json'}{message}"


def test_a_checkpoint_is_taken(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    changes = IMPORTED | {"seed.path": str(tmp_path), "seed.train": None, "branches.code": {"path": str(tmp_path)}}
    cfg = build(settings(changes))
    assert cfg.seed.path == cfg.branches["code"].path == str(tmp_path) and cfg.branches["law"].train is not None


def test_the_families_of_configs_are_those_of_the_models():
    assert set(ARCHITECTURES) <= set(FAMILIES)


def test_every_word_of_the_groups_and_every_expression_is_a_pattern():
    cfg = build(settings({"seed.train.phases": [{"trainable": list(GROUPS), "frozen": [r"layers\.0\.", ".*norm"]}]}))
    assert cfg.seed.train.phases[0].trainable == GROUPS


def test_sizes_may_be_nested():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert build(settings({"seed.sizes.rope_parameters": rope})).seed.sizes["rope_parameters"] == rope


def test_a_phase_keeps_its_own_rate():
    cfg = build(settings({"seed.train.phases": [{"steps": 4, "lr": 1e-9}, {}]}))
    experiment = upcycle(cfg, Store("nowhere"))
    assert [phase.lr for phase in experiment.store.stages["seed"].config.train.phases] == [1e-9, None]


def test_dense_phases_are_laid_over_the_tokens_that_the_recipe_gives(monkeypatch):
    """The config's sum of tokens is the recipe's."""
    seen = []
    monkeypatch.setattr("launch.checks.plan_phases", lambda train, where: seen.append((where, train)))
    cfg = build(settings({}))
    seen.clear()
    _check_dense(cfg)
    recipe = upcycle(cfg, Store("nowhere")).store.stages["dense"].config["train"]
    assert [(where, train.tokens) for where, train in seen] == [("dense", recipe.tokens)]


def test_soft_and_top_k_routers_stay_allowed():
    assert RouterConfig(kind="soft", top_k=1).kind == "soft" and RouterConfig(top_k=2).top_k == 2


def test_config_and_phases_import_no_torch():
    code = "import sys, launch.config, upcycle.phases; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_tokens_are_no_training():
    cfg = build(settings({"mix.tokens": 0, "mixtures.bam.train.tokens": 1024}))
    assert {name for name, mixture in cfg.mixtures.items() if mixture.train} == {"bam"}
    stages = upcycle(cfg, Store("nowhere")).store.stages
    assert "mix/bam" in stages and "mix/btx" not in stages
    assert stages["eval/btx"].inputs["model"] == stages["assemble/btx"]
    branches = sum(branch.train.steps * branch.train.batch_tokens for branch in cfg.branches.values())
    assert stages["dense"].config["train"].tokens == branches + 1024


def test_what_all_mixtures_share_can_be_said_once():
    preset = composed()["mixtures"]["bam"]["assemble"]
    raw = settings({"assemble": preset, "mixtures.bam": {}, "mixtures.third": {"assemble": {"kv": "shared"}}})
    cfg = build(raw)
    assert cfg.mixtures["bam"] == build(settings({})).mixtures["bam"] and cfg.mixtures["third"].assemble.kv == "shared"
    assert cfg.mixtures["third"].assemble.router == cfg.mixtures["bam"].assemble.router
    assert cfg.mixtures["btx"].assemble.attention == "merged"
