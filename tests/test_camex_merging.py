"""CAMEx as a merge: what is learned, from what, and that the merge is then what was learned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from tests.test_merges import declared
from tests.test_merging import NAMES, write_models, write_tokens
from upcycle.batches import Batches
from upcycle.camex_learning import learn_from, mapped_sides, merged_tensors
from upcycle.checkpoint import Checkpoint
from upcycle.kronecker import FACTORS
from upcycle.merge import check_merge, check_options, readers
from upcycle.merge_config import ROLES, MergeConfig, RoleConfig
from upcycle.merged import merge_in_words
from upcycle.merger import Merger, Statistics
from upcycle.mixture_config import AssembleConfig
from upcycle.roles import TensorFacts
from upcycle.stages import assemble_moe, learn_camex, merge_models
from upcycle.store import Run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    return {name: write_tokens(root / name, rng_seed=n) for n, name in enumerate(NAMES)}


def settings(assemble=None, weights=None, merge=None, **options) -> dict:
    own = {"steps": 12, "batch_sequences": 2, **options}
    return {
        "options": check_options("camex", own),
        "merge": merge or MergeConfig(method="camex", options=own),
        "weights": weights or dict.fromkeys(NAMES, 1.0),
        "texts": {name: {name: 1.0} for name in NAMES},
        "sequence_length": 8,
        "rng_seed": 3,
        "assemble": assemble,
    }


def quiet(*_args, **_figures) -> None:
    pass


@torch.no_grad()
def mean_loss(models, data, states, merged: dict, config: dict) -> float:
    """Of the models' texts, with `merged` in place of those tensors and each model's own beside them; over the first step's batches."""
    model, total = AutoModelForCausalLM.from_pretrained(models["seed"], dtype=torch.float32), 0.0
    for name in config["weights"]:
        texts = Batches(dict(data), config["texts"][name], 8, config["options"]["batch_sequences"], config["rng_seed"])
        ids = torch.from_numpy(texts.batch(0))
        logits = functional_call(model, {**states[name], **merged}, (ids,)).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    return total / len(config["weights"])


def states_of(models) -> dict:
    return {
        name: {t: one.get(t).float() for t in one.names}
        for name, one in ((n, Checkpoint(p)) for n, p in models.items())
    }


@pytest.mark.parametrize("weights", [None, {"code": 3.0, "law": 1.0}], ids=["equal", "weighed"])
def test_learning_starts_from_the_weighted_average_and_lowers_the_loss(models, data, weights):
    config, states = settings(weights=weights, rank=2, lr=0.02, steps=40), states_of(models)
    learned, losses = learn_from(config, models, data, quiet)
    total = sum(config["weights"].values())
    average = {
        name: sum(weight / total * states[model][name] for model, weight in config["weights"].items())
        for name in states["seed"]
    }
    assert losses[0] == pytest.approx(mean_loss(models, data, states, average, config), rel=1e-5)
    assert np.mean(losses[-5:]) < losses[0] - 0.02
    assert sum(learned.scores).item() == pytest.approx(1) and learned.names == list(config["weights"])
    assert np.ptp([score.item() for score in learned.scores]) > 1e-3


def test_gradients_are_those_of_the_loss_through_written_out_maps(models, data):
    """One step of plain Adam moves each parameter by the sign of its gradient: compared with autograd through reference.kronecker_map."""
    config, states = settings(rank=2, steps=1, lr=1e-3, base="code"), states_of(models)
    learned, _ = learn_from(config, models, data, quiet)
    before, _ = learn_from(config | {"options": config["options"] | {"lr": 1e-30}}, models, data, quiet)
    leaves = [one.detach().double().requires_grad_() for one in before.parameters()]
    logits, rest = leaves[0], iter(leaves[1:])
    made = {}
    own = {
        model: {t: {f: next(rest) for f in factors} for t, factors in tensors.items()}
        for model, tensors in before.factors.items()
    }
    for name, base in states["code"].items():
        base, differences = base.double(), []
        for model in NAMES:
            tau, factors = states[model][name].double() - base, own[model].get(name)
            if factors and len(factors) == 4:
                matrix = reference.kronecker_map(list(zip(*[factors[f] for f in FACTORS], strict=True)))
                tau = (matrix @ tau.flatten()).view_as(tau)
            elif factors:
                tau = tau @ sum(torch.kron(a, b) for a, b in zip(factors["in1"], factors["in2"], strict=True)).T
            differences.append(tau)
        made[name] = reference.camex_merged(base, differences, list(logits.softmax(0)))
    model = AutoModelForCausalLM.from_pretrained(models["seed"], dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for name in NAMES:
        texts = Batches(dict(data), config["texts"][name], 8, 2, config["rng_seed"])
        ids = torch.from_numpy(texts.batch(0))
        out = functional_call(model, made, (ids,)).logits[:, :-1]
        loss = loss + torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()) / 3
    gradients = torch.autograd.grad(loss, leaves)
    for place, (after, start, gradient) in enumerate(
        zip(learned.parameters(), before.parameters(), gradients, strict=True)
    ):
        clear = gradient.abs() > 1e-5
        assert torch.equal((after - start).sign()[clear], -gradient.sign()[clear].float()), place
    assert sum((gradient.abs() > 1e-5).sum().item() for gradient in gradients) > 500


def test_the_merge_is_what_was_learned(models, data, tmp_path):
    config = settings(rank=2, alpha=0.9, base="mean")
    (tmp_path / "learned").mkdir()
    branches = {name: path for name, path in models.items() if name != "seed"}
    said = []
    learn_camex(
        config, out=tmp_path / "learned", run=Run(said.append), seed=models["seed"], branches=branches, data=data
    )
    assert len(said) == 1 and said[0].startswith("loss ") and "scores: seed 0." in said[0]
    learned, losses = learn_from(config, models, data, quiet)
    found = json.loads((tmp_path / "learned" / "camex.json").read_text())
    assert found["losses"] == losses and set(found["scores"]) == set(NAMES)
    options = {name: config["options"][name] for name in ("rank", "alpha", "base", "steps", "batch_sequences")}
    (tmp_path / "merged").mkdir()
    inputs = {"camex": dict.fromkeys(NAMES, tmp_path / "learned")}
    merge = MergeConfig(method="camex", options=options)
    merge_models(merge, out=tmp_path / "merged", run=Run(), seed=models["seed"], branches=branches, **inputs)
    made, states = Checkpoint(tmp_path / "merged"), states_of(models)
    for name in made.names:
        base = sum(states[model][name] for model in NAMES) / 3
        maps = None
        if name in learned.factors["seed"] and "embed" not in name:
            maps = [
                reference.kronecker_map(list(zip(*learned.factors[m][name].values(), strict=True))).detach()
                for m in NAMES
            ]
        elif "embed" in name:
            sides = [
                sum(torch.kron(a, b) for a, b in zip(*learned.factors[m][name].values(), strict=True)).detach()
                for m in NAMES
            ]
            maps = [torch.kron(torch.eye(base.shape[0]), side) for side in sides]
        differences = reference.camex_differences([states[m][name] for m in NAMES], base, maps, 0.9, election=False)
        expected = reference.camex_merged(base, differences, learned.scores)
        torch.testing.assert_close(made.get(name), expected.detach(), rtol=1e-4, atol=1e-5, msg=name)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["curvature"]["code"][0]["split"] == "train" and record["curvature"]["code"][0]["tokens"] == {
        "code": 12 * 2 * 8
    }
    assert "code: camex on 24 sequences of 8 tokens (code 192)" in merge_in_words(tmp_path / "merged")
    about = {name: Statistics(tmp_path / "learned" / name) for name in NAMES}
    Merger(
        merge, Checkpoint(models["seed"]), AutoConfig.from_pretrained(models["seed"]), list(NAMES), about
    ).check_statistics()


@pytest.mark.parametrize("attention", ["merged", "mixture"])
def test_a_mixtures_own_experts_stay_and_only_the_rest_is_learned(models, data, tmp_path, attention):
    choice = AssembleConfig(
        attention=attention, merge=MergeConfig(method="camex", options={"steps": 12, "batch_sequences": 2})
    )
    config = settings(assemble=choice)
    names = Checkpoint(models["seed"]).names

    taken = merged_tensors(AutoConfig.from_pretrained(models["seed"]), names, list(NAMES), choice)
    assert taken and not any(".mlp." in name for name in taken)
    assert any("self_attn" in name for name in taken) == (attention == "merged")
    (tmp_path / "learned").mkdir()
    branches = {name: path for name, path in models.items() if name != "seed"}
    learn_camex(config, out=tmp_path / "learned", run=Run(), seed=models["seed"], branches=branches, data=data)
    states = states_of(models)
    average = {name: sum(states[model][name] for model in NAMES) / 3 for name in taken}
    losses = json.loads((tmp_path / "learned" / "camex.json").read_text())["losses"]
    assert losses[0] == pytest.approx(mean_loss(models, data, states, average, config), rel=1e-5)
    (tmp_path / "moe").mkdir()
    inputs = {"camex": dict.fromkeys(NAMES, tmp_path / "learned")}
    assemble_moe(choice, out=tmp_path / "moe", run=Run(), seed=models["seed"], branches=branches, **inputs)
    assert json.loads((tmp_path / "moe" / "proof.json").read_text())["one_hot_errors"].keys() == set(NAMES)


def test_one_call_learns_and_merges(models, data, tmp_path):
    branches = {name: path for name, path in models.items() if name != "seed"}
    samples = {"sequence_length": 8, "rng_seed": 3}
    out = upcycle.merge_models(
        seed=models["seed"], branches=branches, out=tmp_path / "out", method="camex", data=data, samples=samples,
        steps=12, batch_sequences=2,
    )  # fmt: skip
    learned, _ = learn_from(settings(), models, data, quiet)
    made, states = Checkpoint(out), states_of(models)
    norm = next(name for name in made.names if "norm" in name)
    start = states["seed"][norm]
    expected = start + sum(score * (states[m][norm] - start) for score, m in zip(learned.scores, NAMES, strict=True))
    torch.testing.assert_close(made.get(norm), expected.detach(), rtol=1e-5, atol=1e-6)


def test_decay_pulls_the_map_to_the_identity(models, data):
    strong, free = (learn_from(settings(rank=2, lr=0.02, decay=decay), models, data, quiet)[0] for decay in (20.0, 0.0))

    def distance(learned):
        whole = (
            one - torch.eye(one.shape[-1]) * (torch.arange(2) == 0).view(2, 1, 1) for one in learned.parameters()[1:]
        )
        return math.sqrt(sum(one.square().sum().item() for one in whole))

    assert distance(strong) < 0.5 * distance(free)


def test_what_has_which_factors_and_what_is_refused():
    kinds = {role: TensorFacts(role) for role in ("attention", "embedding", "head", "norm")}  # pyright: ignore[reportArgumentType]
    assert mapped_sides("w", (4, 6), kinds["attention"]) == FACTORS
    assert (
        mapped_sides("w", (1021, 6), kinds["embedding"])
        == mapped_sides("w", (1021, 6), kinds["head"])
        == ("in1", "in2")
    )
    assert mapped_sides("w", (6,), kinds["norm"]) == ()
    with pytest.raises(ValueError, match=r"1021 splits into 1 × 1021 at best.*; w \(1021, 6\): write merge=camex's"):
        mapped_sides("w", (1021, 6), kinds["attention"])
    two = MergeConfig(method="camex", roles={"norm": RoleConfig(method="camex", options={"rank": 2})})
    with pytest.raises(ValueError, match="two roles learn camex with different options"):
        check_merge(two, NAMES)
    beside = MergeConfig(method="camex", roles={"norm": RoleConfig(method="fisher")})
    with pytest.raises(ValueError, match=r"learned beside a role that reads other curvature \(fisher\)"):
        check_merge(beside, NAMES)
    with pytest.raises(ValueError, match="rank has no effect beside the other options"):
        check_options("camex", {"curvature": "fisher", "rank": 2})
    with pytest.raises(ValueError, match="base has no effect beside the other options"):
        check_options("camex", {"curvature": "kfac", "base": "mean"})
    assert readers(MergeConfig(method="camex", weights={"seed": 0.0}), NAMES) == {"camex": ["code", "law"]}
    assert readers(MergeConfig(method="camex", options={"curvature": "fisher"}), NAMES) == {"fisher": list(NAMES)}


def test_a_base_that_is_no_model_is_named_before_any_work():
    with pytest.raises(
        ValueError, match=r"base='lww' is not known, expected one of seed, mean, zeros, code, law; did you mean law\?"
    ):
        check_merge(MergeConfig(method="camex", options={"base": "lww"}), NAMES)
    with pytest.raises(ValueError, match=r"base='x' is not known"):
        check_merge(MergeConfig(roles={"norm": RoleConfig(method="camex", options={"base": "x"})}), NAMES)
    with pytest.raises(ValueError, match="base=mean is no model's name here, and a branch is called so"):
        check_merge(MergeConfig(method="camex", options={"base": "mean"}), [*NAMES, "mean"])
    check_merge(MergeConfig(method="camex", options={"base": "law"}), NAMES)


def test_learning_stops_at_a_loss_that_is_no_number(models, data):
    with pytest.raises(
        FloatingPointError, match=r"step 2 of 3: the loss of the merged model is nan; lower merge=camex's lr \(1e\+20\)"
    ):
        learn_from(settings(steps=3, lr=1e20), models, data, quiet)


def test_a_size_without_factors_stops_only_where_it_would_be_learned():
    wide = declared(
        "experiment=tiny", "+merges.c={method: camex, roles: {mlp: average}}", "seed.sizes.intermediate_size=1031"
    )
    assert wide.lineages["c"].flops > wide.lineages["soup"].flops
    with pytest.raises(ValueError, match="write merge=camex's curvature=fisher, or another method for its role"):
        declared("experiment=tiny", "+merges.c=camex", "seed.sizes.intermediate_size=1031")


def test_what_learning_reads_and_computes_is_counted():
    """Of a dense merge and of a mixture: tokens by domain, FLOPs of forward and backward, and of the maps."""
    words = [
        "+merges.ties=ties",
        "+merges.camex={method: camex, options: {steps: 10, batch_sequences: 2, rank: 2}}",
        "+merges.fisher=fisher",
    ]
    words += [
        "mixtures.btx.assemble.merge={method: camex, options: {steps: 10, batch_sequences: 2}}",
        "curvature.sequence_length=64",
    ]
    found = declared("experiment=tiny", *words).lineages
    seed, plain, camex = found["seed"].shape, found["ties"], found["camex"]
    fisher = 4 * 256 * 64 * seed.train_flops_per_token(64)  # models, sequences, tokens
    assert found["fisher"].tokens == plain.tokens and found["fisher"].flops - plain.flops == pytest.approx(fisher)
    tokens = 4 * 10 * 2 * 64  # models, steps, sequences, tokens
    assert camex.tokens - plain.tokens == tokens
    assert set(camex.domains) == {"code", "law", "math", "general"} and camex.domains["code"] > plain.domains["code"]
    maps = 3 * 10 * seed.map_flops(4, 2, ROLES)
    assert camex.flops - plain.flops == pytest.approx(tokens * seed.train_flops_per_token(64) + maps)
    assert found["btx"].tokens - found["btx_top1"].tokens == tokens
    matrices = [(48, 48)] * 2 + [(24, 48)] * 2 + [(48, 128), (128, 48), (128, 48)]  # of a layer
    of = {48: (6, 8), 24: (4, 6), 128: (8, 16)}
    slow = sum(2 * rows * columns * (sum(of[rows]) + sum(of[columns])) for rows, columns in matrices)
    table = 2 * 1024 * 48 * sum(of[48])
    assert seed.map_flops(1, 1, ROLES) == 2 * slow + table
    assert seed.map_flops(1, 1, ["embedding", "norm"]) == table
    assert seed.map_flops(1, 1, ["attention"]) + seed.map_flops(1, 1, ["mlp"]) == 2 * slow
    shown = found["btx"].flops - found["btx_top1"].flops  # training differs too: top-2 and top-1
    assert shown > tokens * seed.train_flops_per_token(64)


def test_roles_that_go_another_way_are_that_in_learning_too(models, data, tmp_path):
    """Norms averaged, embeddings the seed's: the first loss is of that very model, and the merge is what was learned."""
    own = {"steps": 12, "batch_sequences": 2, "alpha": 0.7, "base": "code"}
    roles = {"norm": RoleConfig(method="average"), "embedding": RoleConfig(method="seed")}
    merge = MergeConfig(method="camex", options=own, roles=roles)  # pyright: ignore[reportArgumentType]
    config, states = settings(merge=merge, alpha=0.7, base="code"), states_of(models)
    learned, losses = learn_from(config, models, data, quiet)
    start = {}
    for name in states["seed"]:
        mean = sum(states[model][name] for model in NAMES) / 3
        start[name] = states["code"][name] + 0.7 * (mean - states["code"][name])
        start[name] = mean if "norm" in name else states["seed"][name] if "embed" in name else start[name]
    assert losses[0] == pytest.approx(mean_loss(models, data, states, start, config), rel=1e-5)
    assert not any("norm" in name or "embed" in name for name in learned.factors["code"])


def test_a_base_may_be_a_model_without_a_share(models, data):
    config, states = settings(weights={"seed": 1.0, "law": 1.0}, base="code"), states_of(models)
    learned, losses = learn_from(config, models, data, quiet)
    start = {name: (states["seed"][name] + states["law"][name]) / 2 for name in states["seed"]}
    assert losses[0] == pytest.approx(mean_loss(models, data, states, start, config), rel=1e-5)
    assert learned.names == ["seed", "law"]
