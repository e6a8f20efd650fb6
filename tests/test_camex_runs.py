"""CAMEx from assembly to training: proofs, counts, copies, and runs that go on, on ranks, under every strategy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evals.doctor import examine
from evals.doctor_case import read_case
from evals.drift import drift
from launch.lineage import train_flops
from tests.domains import two_domains
from tests.ranks import run_job
from tests.test_ranks import largest_difference, launch, rows
from tests.test_routers import settings
from upcycle.assembly import write_mixture
from upcycle.checkpoint import Checkpoint
from upcycle.combine_config import CombineConfig
from upcycle.config import TrainConfig
from upcycle.cost import Shape
from upcycle.explain import explain, explain_plan
from upcycle.folding import fold
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.placement_config import PlacementConfig
from upcycle.proof import prove
from upcycle.router_config import InitConfig, PoolConfig, RouterConfig

BRANCHES = ("code", "law")


def choosing(first: str = "base", more: dict | None = None, **combine):
    pool = PoolConfig(per="segment", tokens=3, first=first)  # pyright: ignore[reportArgumentType]
    router = RouterConfig(kind="soft", top_k=1, pool=pool, init=InitConfig(std=0.5))
    return AssembleConfig(**{"router": router, "combine": CombineConfig(of="weights", **combine)} | (more or {}))


CURVED = {"curvature": "kronecker", "rank": 2}
BAM = {"attention": "mixture"}
CHOICES = {
    "soft_merging": choosing("uniform"),
    "domain": choosing(base="code"),
    "ca": choosing(base="seed", **CURVED),
    "mean": choosing(base="mean", **CURVED),
    "zeros": choosing("uniform", base="zeros", **CURVED),
    "ties": choosing(base="seed", election="sign", alpha=0.9, **CURVED),
    "travel": choosing("uniform", base="seed", update="travel", **CURVED),
    "previous": choosing("uniform", base="mean", update="previous_merged", curvature="kronecker"),
    "per_layer": choosing(base="seed", update="per_layer", train_base=False, **CURVED),
    "shared_map": choosing(base="seed", share="all", **CURVED),
    "linear_last_layer": choosing(base="seed", curvature="linear", more={"placement": PlacementConfig(layers=(-1,))}),
    "bam": choosing(base="seed", more=BAM, **CURVED),
    "shared_expert": choosing(base="seed", more={"placement": PlacementConfig(shared_expert="seed")}, **CURVED),
    "own_mean": choosing("own_mean", base="seed", **CURVED),
}
KINDS = ("llama", "gpt_neox", "family/gpt2", "family/phi3", "family/starcoder2")


class Made:
    def __init__(self, root: Path):
        self.root, self.mixtures = root, {}

    def sources(self, kind: str, copies: bool = False) -> dict[str, Path]:
        where, names = self.root / f"{kind.replace('/', '-')}-{copies}", ("seed", *BRANCHES)
        if not where.exists():
            models = tiny.dense_models(kind, 1 if copies else 3, dtype=torch.float32)
            for name, model in zip(names, models * 3, strict=False):
                model.save_pretrained(where / name)
        return {name: where / name for name in names}

    def mixture(self, name: str, kind: str = "llama", copies: bool = False) -> Path:
        key = name, kind, copies
        if key not in self.mixtures:
            out, sources = self.root / "-".join(map(str, key)).replace("/", "-"), self.sources(kind, copies)
            out.mkdir()
            write_mixture(sources["seed"], {branch: sources[branch] for branch in BRANCHES}, out, CHOICES[name])
            self.mixtures[key] = out
        return self.mixtures[key]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("camex"))


def loaded(path: Path) -> UpcycledForCausalLM:
    return UpcycledForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_holds_and_every_count_is_the_models(made, kind, name):
    out, sources, choice = made.mixture(name, kind), made.sources(kind), CHOICES[name]
    proof = prove(out, sources)
    assert set(proof["one_hot_errors"]) == (set() if name == "ties" else set(loaded(out).config.experts))
    assert all(error < 1e-5 for error in proof["one_hot_errors"].values())
    model = loaded(out)
    planned = explain_plan(sources["seed"], {branch: sources[branch] for branch in BRANCHES}, choice)
    found = explain(out)
    for field in ("experts", "routers", "parameters", "active_parameters", "bytes", "tensors"):
        assert getattr(planned, field) == getattr(found, field), field
    dense = Shape.of_config(AutoModelForCausalLM.from_pretrained(sources["seed"]).config.to_dict())
    shape = dense.assembled(choice, list(BRANCHES))
    assert shape == Shape.of_config(model.config.to_dict())
    kept = [tensor for name, tensor in model.named_buffers() if ".base_" in name]
    assert shape.active_parameters == found.active_parameters
    assert "combined    weights are merged once a decision: " in found.summary()
    assert shape.parameters == found.parameters == sum(one.numel() for one in (*model.parameters(), *kept))


@pytest.mark.parametrize("name", ["domain", "ca", "per_layer", "bam"])
@torch.no_grad()
def test_the_base_alone_is_proved_and_takes_the_first_segment(made, name, tmp_path):
    """With positions for one segment only, nothing else is at work."""
    choice = CHOICES[name]
    wide = replace(choice, router=replace(choice.router, pool=PoolConfig(per="segment", tokens=16, first="base")))
    sources = made.sources("llama")
    write_mixture(sources["seed"], {branch: sources[branch] for branch in BRANCHES}, tmp_path, wide)
    proof = prove(tmp_path, sources)
    assert ("base_error" in proof) == (name != "per_layer")  # whose base has moved
    assert proof.get("base_error", 0) < 1e-5
    if name == "per_layer":
        return
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    broken = next(key for key in state if "base_down_proj" in key)
    save_file(state | {broken: 1.01 * state[broken]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the tensors of its branch|with its base expert alone"):
        prove(tmp_path, sources)


def test_a_base_that_is_not_the_mean_is_noticed(made, tmp_path):
    sources = made.sources("llama")
    write_mixture(sources["seed"], {branch: sources[branch] for branch in BRANCHES}, tmp_path, CHOICES["mean"])
    state = load_file(tmp_path / "model.safetensors")
    broken = next(key for key in state if "base_down_proj" in key)
    save_file(state | {broken: state[broken] + 0.01}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the mean of the experts'"):
        prove(tmp_path, sources)


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_copies_of_the_seed_are_the_seed(made, name):
    ours, seed = (
        loaded(made.mixture(name, copies=True)),
        AutoModelForCausalLM.from_pretrained(made.sources("llama")["seed"]),
    )
    ids = tiny.tokens()
    torch.testing.assert_close(ours(ids).logits, seed(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHOICES)
def test_training_reaches_every_weight(made, name):
    mixture, ids = loaded(made.mixture(name)).train(), tiny.tokens(4, 12)
    mixture(ids, labels=ids).loss.backward()
    silent = {
        key.rpartition(".")[2] for key, gradient in tiny.gradients_of(mixture).items() if gradient.abs().max() < 1e-12
    }
    # Second and further terms start as 0 ⊗ N ⊗ N ⊗ N, so their other factors wait for the first; but the first term's learn at once.
    # A base that cancels (α = 1, scores of 1, M = I) learns once M has moved.
    cancelling = {"base_gate_up_proj", "base_down_proj"} if name in ("travel", "previous") else set()
    assert silent <= cancelling, silent


def job(made, data: Path, name: str, out: str, **changes) -> dict:
    domains = {domain: str(data / domain) for domain in ("low", "high")}
    where = {"model": str(made.mixture(name)), "data": domains, "out": str(data / out / name)}
    return where | {"train": settings()} | changes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("camex-data")
    two_domains(root)
    return root


@pytest.mark.parametrize("name", ["ca", "travel", "shared_map", "bam"])
def test_a_run_goes_on_bit_for_bit_and_its_curvature_has_moved(made, data, name):
    run_job(job(made, data, name, "straight"))
    run_job(job(made, data, name, "cut", stop=5, checkpoint_steps=3))
    run_job(job(made, data, name, "cut", checkpoint_steps=3))
    straight, cut = (Checkpoint(data / out / name) for out in ("straight", "cut"))
    assert straight.names == cut.names
    for tensor in straight.names:
        assert torch.equal(straight.get(tensor), cut.get(tensor)), tensor
    before = Checkpoint(made.mixture(name))
    moved = [tensor for tensor in straight.names if "curvature_" in tensor]
    assert moved and all(not torch.equal(straight.get(one), before.get(one)) for one in moved)
    found = fold(straight.directory, data / "folded" / name)
    assert found.difference is not None and found.difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_are_one_under_every_strategy(made, data, strategy):
    names = ["ca", "travel", "previous", "shared_map", "soft_merging"]
    ways = [settings() | {"gradient_checkpointing": bool(number % 2)} for number in range(len(names))]
    launch([job(made, data, name, strategy, train=way) for name, way in zip(names, ways, strict=True)], data, strategy)
    for name in names:
        run_job(job(made, data, name, f"single-{strategy}"))
        ours, single = (rows(data / out / name) for out in (strategy, f"single-{strategy}"))
        assert largest_difference(ours, single) <= 1e-4, name


@pytest.mark.parametrize("name", ["ca", "shared_map", "mean", "soft_merging"])
def test_drift_knows_experts_router_base_and_curvature_apart(made, tmp_path, name):
    """One of each grows by a tenth, and that one alone has moved."""
    before = made.mixture(name)
    state = load_file(before / "model.safetensors")
    parts = {
        "experts": ".experts.down_proj",
        "router": ".router.weight",
        "base": ".base_down_proj",
        "curvature": "curvature_down_in1",
    }
    for part, word in parts.items():
        touched = {key: 1.1 * one for key, one in state.items() if word in key}
        if not touched:
            continue
        after = tmp_path / part
        shutil.copytree(before, after)
        save_file(state | touched, after / "model.safetensors", metadata={"format": "pt"})
        found = drift(before, after)
        moved = {"experts": found["ffn"]["distance"], "router": found["ffn"]["router"]}
        moved |= {key: [[found[key]]] for key in ("base", "curvature") if key in found}
        assert found["rest"] == 0 and all(
            (one > 0) == (key == part) for key, rows in moved.items() for row in rows for one in row
        )


def test_a_run_costs_its_forwards_once_each_and_its_decisions(made):
    dense = Shape.of_config(AutoModelForCausalLM.from_pretrained(made.sources("llama")["seed"]).config.to_dict())
    plain, curved = (dense.assembled(CHOICES[name], list(BRANCHES)) for name in ("domain", "ca"))
    train = TrainConfig(**{**settings(), "tokens": 6 * 64})
    fixed = 6 * 4 * 3 * curved.fixed_flops  # steps, micro-batches of one sequence, forward and backward
    per_token = [train_flops(shape, train) for shape in (plain, curved)]
    assert fixed > 0 and per_token[1] - per_token[0] == fixed
    # 16 tokens in segments of 3 are 6 decisions, the first of which is the base's.
    merging = 2 * plain.experts * plain.mlp * plain.mixtures * 5 // 16
    assert plain.train_flops_per_token(16) == 3 * plain.forward_flops_per_token(16) + merging
    one = replace(plain, combine=replace(plain.combine, segment=16))
    assert plain.forward_flops_per_token(16) - one.forward_flops_per_token(16) == merging


def test_the_doctor_and_explain_know_a_folded_mixture_and_one_that_was_proved_in_part(made, tmp_path):
    prove(made.mixture("ties"), made.sources("llama"))
    found = {finding.check: finding for finding in examine(read_case(made.mixture("ties")))}
    assert found["proof"].verdict == "ok" and "none was compared alone, because α or an election" in found["proof"].said
    fold(made.mixture("ties"), tmp_path / "folded")
    found = {finding.check: finding for finding in examine(read_case(tmp_path / "folded"))}
    assert found["proof"].verdict == "ok" and "logits equal those before folding within" in found["proof"].said
    notes = explain(tmp_path / "folded").notes
    assert any(note.startswith("folded; before that, weights are merged once a decision: B + 0.9") for note in notes)
