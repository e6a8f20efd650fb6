"""Where experts sit and what they are: every option from assembly to generation, against loops and against its own proof."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import upcycle
from evals.microscope import Vocabulary
from evals.routing import RoutingCounter
from tests.domains import two_domains
from tests.ranks import run_job
from tests.tables import assert_table
from tests.test_families import parts
from tests.test_ranks import largest_difference, launch, rows
from tests.test_routers import settings
from upcycle.assembly import write_mixture
from upcycle.attention import stack_heads, unstack_heads
from upcycle.checkpoint import Checkpoint
from upcycle.config import EvalConfig
from upcycle.cost import Shape, matched
from upcycle.experts import routed_layers
from upcycle.explain import explain, explain_plan
from upcycle.families import family_of
from upcycle.mixture_config import AssembleConfig, PlacementConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.proof import prove
from upcycle.router import Router, RoutingTrace
from upcycle.router_config import InitConfig, NoiseConfig, PoolConfig, RouterConfig
from upcycle.shards import dropped_units, redrawn
from upcycle.team import ALONE

WIDE = {"init": InitConfig(std=0.5)}
TOP2, TOP4 = RouterConfig(top_k=2, **WIDE), RouterConfig(top_k=4, **WIDE)
BAM = {"attention": "mixture", "attention_router": RouterConfig(kind="soft", top_k=1, **WIDE)}
REPEATED = ("seed", "code", "code")


def placing(router=TOP2, more=None, **placement) -> dict:
    return {"router": router, "placement": PlacementConfig(**placement)} | (more or {})


# Every option as AssembleConfig takes it, for a seed and a branch "code" of any family.
PLACEMENTS: dict[str, dict] = {
    "some_layers": placing(layers=(-1,)),
    "some_layers_bam": placing(layers=(0,), more=BAM),
    "some_layers_bam_shared_kv": placing(layers=(-1,), more=BAM | {"kv": "shared"}),
    "shared_seed": placing(shared_expert="seed"),
    "shared_seed_sum": placing(shared_expert="seed", shared_gate="sum"),
    "shared_merged": placing(shared_expert="merged", layers=(0,)),
    "seed_copies": placing(experts="seed"),
    "seed_copies_bam": placing(experts="seed", more=BAM),
    "repeated": placing(experts=REPEATED),
    "repeated_bam": placing(experts=REPEATED, more=BAM),
    "one_per_domain": placing(experts=REPEATED, one_per_domain=True),
    "split": placing(split=2),
    "split_bam": placing(split=2, more=BAM),
    "virtual_groups": placing(split=2, virtual_groups=True, scale_weights=True),
    "virtual_groups_shared": placing(
        TOP4, split=2, virtual_groups=True, scale_weights=True, experts=REPEATED, shared_expert="seed"
    ),
    "virtual_groups_bam": placing(split=2, virtual_groups=True, scale_weights=True, experts=REPEATED, more=BAM),
    "blend": placing(blend=True),
    "blend_bam": placing(blend=True, more=BAM | {"kv": "shared"}),
    "drop": placing(drop_fraction=0.5),
    "drop_split_bam": placing(drop_fraction=0.3, split=2, experts="seed", more=BAM),
    "match_seed": placing(match="seed", scale_weights=True),
    "match_branches": placing(match="branches"),
}
# Those that leave copies of the seed the seed, because gates sum to 1 and a token takes whole feed-forwards.
KEEPING = [name for name in PLACEMENTS if not re.match(r"split|blend|drop|match|shared_seed_sum", name)]
KINDS = ("llama", "gpt_neox", "family/gpt2", "family/phi", "family/starcoder2", "family/phi3")
WIDTHS = {"family/phi": {"intermediate_size": 48}}  # a width that some split matches
MATCHED = {"llama", "gpt_neox", "family/gpt2", "family/phi", "family/starcoder2", "family/phi3"}


shown: dict[tuple[str, str], set[bool]] = {}  # (placement, identity): whether it holds, as tests have found


class Made:
    """Dense models on disk, and the mixture of them that is asked for, once each."""

    def __init__(self, root: Path):
        self.root, self.dense, self.mixtures = root, {}, {}

    def sources(self, kind: str, copies: bool = False) -> dict[str, Path]:
        if (kind, copies) not in self.dense:
            where = self.root / f"{kind.replace('/', '-')}-{copies}"
            models = tiny.dense_models(kind, 1 if copies else 2, dtype=torch.float32, **WIDTHS.get(kind, {}))
            for name, model in zip(("seed", "code"), models * 2, strict=False):
                model.save_pretrained(where / name)
            self.dense[kind, copies] = {name: where / name for name in ("seed", "code")}
        return self.dense[kind, copies]

    def mixture(self, kind: str, placement: str, copies: bool = False, prove_it: bool = True) -> Path:
        key = kind, placement, copies
        if key not in self.mixtures:
            sources = self.sources(kind, copies)
            out = self.root / f"{kind.replace('/', '-')}-{placement}-{copies}"
            self.mixtures[key] = written(sources, out, PLACEMENTS[placement])
            if prove_it:
                prove(out, sources)
        return self.mixtures[key]


def written(sources: dict[str, Path], out: Path, choice: dict) -> Path:
    out.mkdir()
    write_mixture(sources["seed"], {"code": sources["code"]}, out, AssembleConfig(**choice))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("placement"))


def loaded(path: Path) -> UpcycledForCausalLM:
    return UpcycledForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


def parts_of(name: str, count: int, width: int, split: int) -> list[reference.Part]:
    """Whose hidden units an expert has, from its name: code:2/1 is the first shard of a copy of code."""
    model, _, number = name.partition("/")
    if model == "blend":
        size = width // count
        return [(one, list(range((int(number) - 1) * size, int(number) * size)), count) for one in ("seed", "code")]
    size, first = width // split, int(number or 1) - 1
    return [(model.partition(":")[0], list(range(first * size, (first + 1) * size)), split)]


def twin(made: Made, kind: str, placement: str, ours: UpcycledForCausalLM, forced=None) -> reference.PlacedMixture:
    """The slow mixture with the routers of `ours`."""
    config, choice = ours.config, PLACEMENTS[placement]
    sources = made.sources(kind)
    models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in sources.items()}
    family = family_of(config.seed)
    mlp = parts(models["seed"])[0][1]
    weight = getattr(mlp, family.down).weight
    width = weight.shape[0 if family.conv1d else 1]
    routers = {part: dict(zip(config.routed, tiny.routers_of(ours, part), strict=True)) for part in config.parts}
    names = sorted({one.partition(":")[0].partition("/")[0] for one in config.experts} - {"blend"})
    attention = [one.partition(":")[0] for one in config.names_of("attention")] if "attention" in config.parts else None
    return reference.PlacedMixture(
        models,
        parts,
        family.down,
        merged=names or ["seed", "code"],
        experts=[parts_of(name, len(config.experts), width, config.split) for name in config.experts],
        ffn_routers=routers["ffn"],
        k=config.num_experts_per_tok,
        scale=config.split if choice["placement"].scale_weights else 1.0,
        attention=attention,
        attention_routers=routers.get("attention"),
        shared=choice["placement"].shared_expert,
        gate=choice["placement"].shared_gate,
        forced=forced,
    )


# Options that the twin knows: drawn units are tested apart; experts of one source exclude one another in routing.py's
# own tests; keys and values that are shared in those of attention; a match is a split.
TWINS = [
    name for name in PLACEMENTS if not re.match(r"drop|one_per", name) and "shared_kv" not in name
    and name != "blend_bam"
]  # fmt: skip


@pytest.mark.parametrize("placement", TWINS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mixture_equals_explicit_sums_over_hidden_units(made, kind, placement):
    ours = loaded(made.mixture(kind, placement))
    ids = tiny.tokens(2, 6)
    if placement.startswith(
        "match"
    ):  # K is no multiple of G: which of the last group's tied shards are taken is arbitrary
        for weight in tiny.routers_of(ours, "ffn"):
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ours(ids).logits, twin(made, kind, placement, ours).logits(ids).float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("placement", TWINS)
@torch.no_grad()
def test_forced_to_an_expert_it_is_that_expert(made, placement):
    ours, ids = loaded(made.mixture("gpt_neox", placement)), tiny.tokens(2, 6)
    last = ours.config.num_experts - 1, ours.config.num_attention_experts - 1
    for forced in ((0, 0), last, (last[0], 0)):
        trace = RoutingTrace(forced={"ffn": forced[0], "attention": forced[1]})
        expected = twin(made, "gpt_neox", placement, ours, forced).logits(ids).float()
        torch.testing.assert_close(ours(ids, trace=trace).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_holds_and_every_count_is_the_models(made, kind, placement):
    """Planned is what gets written; parameters, active ones and cache are the model's own."""
    out, sources = made.mixture(kind, placement), made.sources(kind)
    proof = json.loads((out / "proof.json").read_text())
    assert max(proof["one_hot_errors"].values()) < 1e-5 and proof["gated_sum_error"] < 1e-5
    shown[placement, "one-hot is that expert"] = {True}
    model, choice = loaded(out), AssembleConfig(**PLACEMENTS[placement])
    assert set(proof["one_hot_errors"]) == set(model.config.experts)
    planned, found = explain_plan(sources["seed"], {"code": sources["code"]}, choice), explain(out)
    for field in ("experts", "attention_experts", "routers", "parameters", "active_parameters", "bytes", "tensors"):
        assert getattr(planned, field) == getattr(found, field), field
    dense = Shape.of_config(AutoModelForCausalLM.from_pretrained(sources["seed"]).config.to_dict())
    shape = dense.assembled(choice, ["code"])
    assert shape == Shape.of_config(model.config.to_dict())
    assert shape.parameters == found.parameters == sum(p.numel() for p in model.parameters())
    one = sum(p[0].numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = model.config.num_experts - model.config.num_experts_per_tok
    assert shape.active_parameters == found.active_parameters == shape.parameters - idle * one
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 5
    if not getattr(model.config.seed, "sliding_window", None):  # a window holds fewer tokens
        assert shape.cache_bytes_per_token(4) == held


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_of_the_seed_are_the_seed(made, kind, placement):
    """Or are not, where that is so; of a match it is so where a token takes whole feed-forwards, none scaled down."""
    out = made.mixture(kind, placement, copies=True, prove_it=False)
    seed, ids = AutoModelForCausalLM.from_pretrained(made.sources(kind, copies=True)["seed"]), tiny.tokens()
    ours, theirs = loaded(out)(ids).logits, seed(ids).logits
    config, scaled = loaded(out).config, PLACEMENTS[placement]["placement"].scale_weights
    whole = config.num_experts_per_tok % config.split == 0 and (scaled or config.split == 1)
    same = whole if placement.startswith("match") else placement in KEEPING
    if same:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        assert (ours - theirs).abs().max() > 1e-2
    shown.setdefault((placement, "copies are the seed"), set()).add(same)


@pytest.mark.parametrize("placement", ["seed_copies", "seed_copies_bam"])
@torch.no_grad()
def test_copies_of_the_seed_ignore_the_branches(made, placement):
    """Sparse upcycling: what is no expert is merged of the models that have one, and that is the seed alone."""
    ours, ids = loaded(made.mixture("llama", placement)), tiny.tokens()
    seed = AutoModelForCausalLM.from_pretrained(made.sources("llama")["seed"])
    assert ours.config.experts == ["seed", "seed:2"] and ours.config.expert_sources == ["seed", "seed"]
    torch.testing.assert_close(ours(ids).logits, seed(ids).logits, atol=1e-4, rtol=1e-4)


SUMMING = {
    "topk_softmax": RouterConfig(top_k=4, **WIDE),
    "soft": RouterConfig(kind="soft", top_k=1, **WIDE),
    "all_bare": RouterConfig(top_k=6, gate_order="softmax_topk", **WIDE),
    **{
        scale: RouterConfig(top_k=4, gate_order="softmax_topk", gate_scale=scale, **WIDE)
        for scale in ("sum_to_one", "straight_through")
    },
    **{  # these sum to 1 as long as routers are indifferent
        f"fresh_{scale}": RouterConfig(top_k=4, gate_order="softmax_topk", gate_scale=scale, init=InitConfig(std=1e-6))
        for scale in ("none", "compensate")
    },
}


@pytest.mark.parametrize("gates", SUMMING)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@torch.no_grad()
def test_scaled_virtual_groups_of_the_seed_are_the_seed(made, tmp_path, kind, gates):
    """G shards of each feed-forward, whatever the form of the gates; without the scale they are not."""
    sources, ids = made.sources(kind, copies=True), tiny.tokens()
    seed = AutoModelForCausalLM.from_pretrained(sources["seed"])(ids).logits
    for scale in (True, False):
        choice = placing(SUMMING[gates], split=2, virtual_groups=True, scale_weights=scale, experts=REPEATED)
        ours = loaded(written(sources, tmp_path / f"{scale}", choice))(ids).logits
        if scale:
            torch.testing.assert_close(ours, seed, atol=1e-4, rtol=1e-4)
        else:
            assert (ours - seed).abs().max() > 0.01


def test_shards_of_a_virtual_group_start_with_one_row_and_others_do_not(made):
    rows = tiny.routers_of(loaded(made.mixture("llama", "virtual_groups_shared")), "ffn")[0]
    assert torch.equal(rows[0::2], rows[1::2]) and len(rows.unique(dim=0)) == 3
    assert len(tiny.routers_of(loaded(made.mixture("llama", "split")), "ffn")[0].unique(dim=0)) == 4


# ---------------------------------------------------------------------------------------------------------------- drop


def own_tensors(path: Path, layer: int = 0) -> dict[str, torch.Tensor]:
    """{matrix: (E, hidden units, ...)} of the experts of a layer."""
    found = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if f".{layer}.mlp.experts." in name and not name.endswith("down_proj_bias"):
            for part, matrix in enumerate(tensor.chunk(2, 1) if "gate_up" in name else [tensor]):
                found[f"{name.rpartition('.')[2]}{part}"] = (
                    matrix.transpose(1, 2) if name.endswith("down_proj") else matrix
                )
    return found


@pytest.mark.parametrize("kind", ["llama", "family/gpt2", "family/phi3"])
@pytest.mark.parametrize("fraction", [0.5, 0.3])
def test_dropping_draws_the_same_share_of_units_anew_in_every_matrix(made, tmp_path, kind, fraction):
    sources = made.sources(kind)
    plain = own_tensors(written(sources, tmp_path / "plain", placing()))
    dropped = own_tensors(written(sources, tmp_path / "drop", placing(drop_fraction=fraction)))
    chosen = {}
    for name, before in plain.items():
        after = dropped[name]
        for expert in range(2):
            changed = (before[expert] != after[expert]).reshape(len(before[expert]), -1)
            assert torch.equal(changed.any(1), changed.all(1))  # a unit stays or is new, nothing in between
            chosen.setdefault(expert, []).append(changed.all(1))
            old, new = before[expert][changed.all(1)], after[expert][changed.all(1)]
            if old.numel() > 300:
                assert (new.mean() - old.mean()).abs() < 4 * old.std() / old.numel() ** 0.5
                assert (new.std() / old.std() - 1).abs() < 0.15
    for masks in chosen.values():
        assert all(torch.equal(mask, masks[0]) for mask in masks) and len(masks) == len(plain)
        assert int(masks[0].sum()) == int(fraction * len(masks[0]))
    assert not torch.equal(chosen[0][0], chosen[1][0])  # each expert its own units


def test_units_are_drawn_with_the_moments_of_what_they_replace():
    """Not of the whole matrix, and not around 0; in each matrix from numbers of its own."""
    tensor = torch.zeros(200, 400)
    units = torch.arange(0, 200, 2)
    tensor[units] = 5 + 2 * torch.randn(100, 400)
    found = redrawn(tensor, 0, units, "a")
    assert torch.equal(found[1::2], tensor[1::2])
    assert found[units].mean() == pytest.approx(5, abs=0.05) and found[units].std() == pytest.approx(2, abs=0.05)
    other = redrawn(tensor, 0, units, "b")[units]
    assert torch.corrcoef(torch.stack([found[units].flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_gate_up_and_down_are_drawn_apart(made, tmp_path):
    sources = made.sources("llama")
    plain = own_tensors(written(sources, tmp_path / "plain", placing()))
    dropped = own_tensors(written(sources, tmp_path / "drop", placing(drop_fraction=0.5)))
    noise = []
    for name, before in plain.items():
        rows = (before[0] != dropped[name][0]).reshape(len(before[0]), -1).all(1)
        new = dropped[name][0][rows].flatten()
        noise.append((new - new.mean()) / new.std())
    for first, second in itertools.combinations([one for one in noise if len(one) > 300], 2):
        assert (first * second).mean().abs() < 0.15


@pytest.mark.parametrize(
    ("width", "fraction", "count"), [(100, 0.29, 29), (1000, 0.57, 570), (7, 0.5, 3), (10, 0.05, 0)]
)
def test_the_share_that_is_dropped_is_rounded_down_once(width, fraction, count):
    assert len(dropped_units(width, fraction, "x")) == count


def test_scaled_weights_that_overflow_are_refused(made, tmp_path):
    sources = {name: shutil.copytree(path, tmp_path / name) for name, path in made.sources("llama").items()}
    tensors = load_file(sources["code"] / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 40_000.0
    save_file(tensors, sources["code"] / "model.safetensors", metadata={"format": "pt"})
    choice = placing(split=2, virtual_groups=True, scale_weights=True, more={"dtype": "float16"})
    with pytest.raises(ValueError, match="scale_weights makes weights larger than float16 can hold"):
        written(sources, tmp_path / "moe", choice)


def test_the_last_attention_expert_of_a_blend_is_looked_at(made, tmp_path, monkeypatch):
    """Blends and attention experts have no names in common; each of these is proved with one of those."""
    copy_of = shutil.copytree(made.mixture("llama", "blend_bam"), tmp_path / "moe")
    tensors = load_file(copy_of / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    parts = unstack_heads(tensors[name], 1, 2, 2)
    tensors[name] = stack_heads([unstack_heads(tensors[name], 0, 2, 2), parts.roll(1, 1)], 2).contiguous()
    save_file(tensors, copy_of / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("upcycle.proof._check_hashes", lambda *args: 0)
    with pytest.raises(ValueError, match="the mixture's logits differ"):
        prove(copy_of, made.sources("llama"))


@pytest.mark.parametrize("name", ["code/v2", "code:2"])
def test_names_that_could_be_shards_or_copies_are_refused(made, tmp_path, name):
    sources = made.sources("llama")
    with pytest.raises(ValueError, match=f"name='{name}': expected one without / and :"):
        upcycle.assemble(seed=sources["seed"], branches={name: sources["code"]}, out=tmp_path / "moe")


def test_a_match_gives_a_token_two_shards_at_least():
    """The gate of one alone would be the constant 1; a width where nothing else fits is refused."""
    choice = AssembleConfig(**placing(RouterConfig(), match="seed"))
    wide = {"hidden_size": 32, "intermediate_size": 4096, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="no split up to 16 of the 4096 hidden units"):
        matched(Shape.of_config(tiny.dense_config("llama", **wide).to_dict()), choice, ["code", "law"])


@torch.no_grad()
@pytest.mark.parametrize("how", ["match_seed", "match_branches"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_matched_mixture_decides_alike_in_any_batch_and_cache(made, kind, how):
    """Shards of one group that a token takes in part are told apart by their rows, not by a kernel's rounding."""
    ours, ids = loaded(made.mixture(kind, how)), tiny.tokens(3, 12)
    rows = [router.weight for router in ours.modules() if isinstance(router, Router)]
    if ours.config.num_experts_per_tok % ours.config.split:
        assert all(len({tuple(row.tolist()) for row in weight}) == len(weight) for weight in rows)
    together, cache = ours(ids).logits, DynamicCache(config=ours.config)
    steps = [ours(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(12)]
    tiny.assert_same_logits(torch.cat(steps, 1), together)
    tiny.assert_same_logits(ours(ids[1:2]).logits, together[1:2])


def test_what_is_drawn_depends_on_seed_name_and_layer_only(made, tmp_path):
    sources = made.sources("llama")
    experts = {"drawn": ("seed", "code"), "turned": ("code", "seed")}
    found = {
        name: own_tensors(written(sources, tmp_path / name, placing(experts=order, drop_fraction=0.5)))
        for name, order in experts.items()
    }
    for name, tensor in found["drawn"].items():
        assert torch.equal(tensor, found["turned"][name].flip(0)), name
    again = written(sources, tmp_path / "again", placing(drop_fraction=0.5, more={"rng_seed": 2}))
    assert not torch.equal(own_tensors(again)["down_proj0"], found["drawn"]["down_proj0"])
    first, second = (own_tensors(again, layer) for layer in (0, 1))
    kept = next(own_tensors(written(sources, tmp_path / "kept", placing()), layer) for layer in (0, 1))
    assert not torch.equal(first["down_proj0"] != kept["down_proj0"], second["down_proj0"] != kept["down_proj0"])


# --------------------------------------------------------------------------------------------------------------- match


@pytest.mark.parametrize("how", ["match_seed", "match_branches"])
@pytest.mark.parametrize("kind", sorted(MATCHED))
def test_matched_btx_is_as_large_as_bam(made, tmp_path, kind, how):
    """Total and active parameters within 1 %, counted in both built models; the note names both."""
    sources = made.sources(kind)
    one = RouterConfig(top_k=1, gate_order="softmax_topk", gate_scale="straight_through")
    counts = {}
    for name, path in (
        ("bam", written(sources, tmp_path / "bam", BAM | {"router": one})), ("btx", made.mixture(kind, how))
    ):  # fmt: skip
        model = loaded(path)
        shard = sum(p[0].numel() for n, p in model.named_parameters() if ".experts." in n)
        total = sum(p.numel() for p in model.parameters())
        idle = model.config.num_experts - model.config.num_experts_per_tok
        counts[name] = total, total - idle * shard
    for ours, theirs in zip(counts["btx"], counts["bam"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.01)
    (note,) = [note for note in explain(made.mixture(kind, how)).notes if note.startswith("matched to BAM: ")]
    for number in (*counts["btx"], *counts["bam"]):
        assert f"{number:,}" in note


def test_matching_adds_copies_of_the_seed_or_of_all_in_turn(made):
    seed = loaded(made.mixture("llama", "match_seed")).config
    branches = loaded(made.mixture("llama", "match_branches")).config
    assert seed.split == branches.split == 4 and seed.experts[:8] == branches.experts[:8]
    assert seed.experts[:5] == ["seed/1", "seed/2", "seed/3", "seed/4", "code/1"]
    assert seed.experts[8:] == [f"seed:2/{n + 1}" for n in range(seed.num_experts - 8)]
    longer = matched(
        Shape.of_config(tiny.dense_config("llama").to_dict()),
        AssembleConfig(placement=PlacementConfig(match="branches")), ["a", "b", "c"],
    )  # fmt: skip
    assert longer.experts > 4 * longer.split
    assert branches.expert_sources[8:] == ["seed"] * min(4, branches.num_experts - 8)
    rows = tiny.routers_of(loaded(made.mixture("llama", "match_branches")), "ffn")[0]
    apart = (rows[8] - rows[branches.num_experts - 1]).norm() / rows[8].norm()  # one group, told apart by 1 %
    assert 0 < apart < 0.05 < (rows[0] - rows[8]).norm() / rows[8].norm()


def test_a_width_that_no_split_matches_is_refused_with_the_nearest():
    shape = Shape.of_config(tiny.dense_config("llama", intermediate_size=37).to_dict())
    with pytest.raises(ValueError) as error:
        matched(shape, AssembleConfig(placement=PlacementConfig(match="seed")), ["code"])
    assert str(error.value).startswith(
        "placement.match=seed: no split up to 16 of the 37 hidden units comes within 1% of BAM in total and in active "
        "parameters; the nearest is split 1, 3 shards, 2 a token: "
    )


# --------------------------------------------------------------------------------------------------- the proof has teeth

FAULTS = {
    "a unit moves": lambda tensor: tensor.roll(1, -1),
    "an expert is another's": lambda tensor: tensor.roll(1, 0),
    "one value is off": lambda tensor: tensor + 0.5 * (torch.arange(tensor.numel()) == 3).view(tensor.shape),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if not name.startswith("seed_copies")])
def test_the_proof_fails_when_an_experts_tensor_is_changed(made, tmp_path, placement, fault):
    copy_of = shutil.copytree(made.mixture("gpt_neox", placement), tmp_path / "moe")
    tensors = load_file(copy_of / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[name] = FAULTS[fault](tensors[name]).contiguous()
    save_file(tensors, copy_of / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the tensors of its branch"):
        prove(copy_of, made.sources("gpt_neox"))


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if not name.startswith("seed_copies")])
def test_the_logits_alone_tell_that_an_expert_is_not_its_sources(made, tmp_path, placement, monkeypatch):
    """The hashes say nothing here; nor would they if assembly itself had cut the wrong units."""
    copy_of = shutil.copytree(made.mixture("gpt_neox", placement), tmp_path / "moe")
    tensors = load_file(copy_of / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[name][-1] = tensors[name][-1].roll(1, -1)
    save_file(tensors, copy_of / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("upcycle.proof._check_hashes", lambda *args: 0)
    with pytest.raises(ValueError, match=r"forced to expert .* the mixture's logits differ"):
        prove(copy_of, made.sources("gpt_neox"))


@pytest.mark.parametrize("placement", ["shared_seed", "shared_seed_sum", "shared_merged"])
@pytest.mark.parametrize("only", ["", "_check_hashes _check_merged", "_check_hashes _check_merged largest_difference"])
def test_the_proof_fails_when_the_shared_expert_is_changed(made, tmp_path, placement, only, monkeypatch):
    """Whichever checks are switched off, the next one sees it."""
    copy_of = shutil.copytree(made.mixture("llama", placement), tmp_path / "moe")
    tensors = load_file(copy_of / "model.safetensors")
    name = next(name for name in tensors if name.endswith("shared_expert.down_proj.weight"))
    tensors[name] = tensors[name].roll(1, 1).contiguous()
    save_file(tensors, copy_of / "model.safetensors", metadata={"format": "pt"})
    for check in only.split():
        monkeypatch.setattr(f"upcycle.proof.{check}", lambda *args: 0)
    if placement == "shared_merged" and only:  # its tensors are only known as what was written
        monkeypatch.setattr(
            "upcycle.dense_reference.DenseReference._shared", _from_disk(made.mixture("llama", placement))
        )
    said = "not the average|not hold the tensors" if not only else "logits differ|differs from the gated sum"
    with pytest.raises(ValueError, match=said):
        prove(copy_of, made.sources("llama"))


def _from_disk(mixture: Path):
    def shared(self, piece):
        return [Checkpoint(mixture).get(self.shared[source].target) for source in piece.sources]

    return shared


def test_a_model_that_it_was_made_from_must_be_given(made):
    sources = made.sources("llama")
    with pytest.raises(ValueError, match="was made from seed, code; seed is not given to prove it against"):
        prove(made.mixture("llama", "split"), {"code": sources["code"]})


# -------------------------------------------------------------------------------------------- using it: disk, generation


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "family/gpt2"])
@torch.no_grad()
def test_saving_loading_and_generating(made, tmp_path, kind, placement):
    """A saved copy has the same tensors and logits; generation picks the same tokens with every cache and without one."""
    ours, ids = loaded(made.mixture(kind, placement)), tiny.tokens(2, 5)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="eager").eval()
    tiny.assert_same_tensors(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert again.config.to_dict()["experts"] == ours.config.experts
    assert torch.equal(tiny.aligned(again)(ids).logits, tiny.aligned(ours)(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    expected = ours.generate(ids, use_cache=False, **options)
    static = {"cache_implementation": "static", "disable_compile": True}
    for cache in ({}, static, static | {"prefill_chunk_size": 2}):
        assert torch.equal(ours.generate(ids, **options, **cache), expected), cache
    past = DynamicCache(config=ours.config)
    steps = [ours(ids[:, :3], past_key_values=past, use_cache=True).logits]
    steps.append(ours(ids[:, 3:], past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), ours(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_training_reaches_every_weight_and_checkpointing_changes_nothing(made, placement):
    mixture, ids = loaded(made.mixture("llama", placement)).train(), tiny.tokens(4, 12)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            mixture.activation_checkpointing_enable()
        mixture.zero_grad()
        out = mixture(ids, labels=ids)
        assert set(out.aux_losses) <= {"balance"} and out.loss.isfinite()
        out.loss.backward()
        found.append(tiny.gradients_of(mixture))
    tiny.assert_same_tensors(*found, rtol=0, atol=0)
    silent = [name for name, gradient in found[0].items() if not gradient.any()]
    assert not [name for name in silent if ".router." not in name], silent
    if PLACEMENTS[placement]["placement"].experts != "seed" and placement != "virtual_groups":
        assert not silent  # copies of one feed-forward, or one group of shards, teach a router nothing yet


def job(made, data: Path, placement: str, out: str, **changes) -> dict:
    """Six steps of training of the Llama mixture with that placement."""
    domains = {domain: str(data / domain) for domain in ("low", "high")}
    where = {"model": str(made.mixture("llama", placement)), "data": domains, "out": str(data / out / placement)}
    return where | {"train": settings()} | changes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("placement-data")
    two_domains(root)
    return root


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_run_goes_on_bit_for_bit(made, data, placement):
    run_job(job(made, data, placement, "straight"))
    run_job(job(made, data, placement, "cut", stop=5, checkpoint_steps=3))
    run_job(job(made, data, placement, "cut", checkpoint_steps=3))
    straight, cut = (Checkpoint(data / out / placement) for out in ("straight", "cut"))
    assert straight.names == cut.names
    for name in straight.names:
        assert torch.equal(straight.get(name), cut.get(name)), name
    shown[placement, "goes on bit for bit"] = {True}


@pytest.fixture(scope="module")
def two_ranks(made, data) -> Path:
    launch([job(made, data, placement, "ranks") for placement in PLACEMENTS], data, "ddp")
    return data


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_ranks_are_one(made, two_ranks, placement):
    run_job(job(made, two_ranks, placement, "single"))
    ours, single = (rows(two_ranks / out / placement) for out in ("ranks", "single"))
    assert largest_difference(ours, single) <= 1e-4
    shown[placement, "two ranks are one"] = {True}


def test_the_table_in_the_docs_is_what_ran():
    """Whatever ran; the slow column counts where the slow tests ran."""
    columns = ["copies are the seed", "one-hot is that expert", "goes on bit for bit", "two ranks are one"]
    if {(placement, column) for placement in PLACEMENTS for column in columns[:3]} - set(shown):
        pytest.skip("not all tests of placement ran and passed in this process")
    words = {(True,): "yes", (False,): "no", (False, True): "depends"}
    table = [
        [placement, *(words[tuple(sorted(shown.get((placement, column), {True})))] for column in columns)]
        for placement in PLACEMENTS
    ]
    assert_table("routing.md", "placement", ["placement", *columns], table)


def test_layers_are_counted_from_either_end():
    assert routed_layers((-1, 0), 4) == (0, 3) and routed_layers((3, 2, 1, 0), 4) is None is routed_layers(None, 4)
    for layers, message in (
        ((0, 4), "the seed has 4 layers and no layer 4; expected 0 to 3, or -1 to -4 from the end"),
        ((-5,), "no layer -5"),
        ((3, -1), r"names a layer twice: of 4 layers they are \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            routed_layers(layers, 4)


@torch.no_grad()
def test_reports_name_the_layers_and_experts_that_were_measured(made):
    ours = loaded(made.mixture("llama", "some_layers"))
    split = loaded(made.mixture("llama", "split_bam"))
    for model, layers, names in (
        (ours, [1], {"ffn": ["seed", "code"]}),
        (split, [0, 1], {"ffn": ["seed/1", "seed/2", "code/1", "code/2"], "attention": ["seed", "code"]}),
    ):
        counter = RoutingCounter(model.config, Vocabulary(np.arange(tiny.VOCAB)), EvalConfig(sequence_length=9))
        for domain in ("low", "high"):
            ids, trace = tiny.tokens(), RoutingTrace()
            counter.start(domain, np.append(ids.flatten().numpy(), 3), np.array([0, 9, 19]))
            model(ids, trace=trace)
            counter.add(trace, torch.ones(2, 9, dtype=torch.bool), 0)
        summary = counter.summary(ALONE)
        for part, experts in names.items():
            assert summary[part]["layers"] == layers and summary[part]["experts"] == experts
            assert len(summary[part]["mutual_information"]) == len(layers)
            assert len(summary[part]["share"]["low"][0]) == len(experts)


@pytest.mark.parametrize("placement", ["some_layers_bam", "some_layers", "shared_seed", "split_bam"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "family/phi3", "family/qwen3"])
def test_parallel_plans_name_parts_that_exist_and_leave_no_feed_forward_out(made, kind, placement):
    mixture = loaded(made.mixture(kind, placement))
    names = {name for name, _ in (*mixture.named_modules(), *mixture.named_parameters())}
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    assert set(mixture.tp_plan) <= names and set(mixture.ep_plan) <= names
    if mixture.config.seed.base_model_tp_plan:
        dense = {name for name in names if re.search(r"mlp\.(shared_expert\.)?\w+\.weight$", name)}
        cut = {name.removesuffix(".weight") for name in dense if "router" not in name}
        assert cut <= set(mixture.tp_plan)


# --------------------------------------------------------------------------------------------------------------- export


def test_shards_are_experts_of_a_native_class(tmp_path):
    models = tiny.dense_models("llama", 2, dtype=torch.float32, attention_bias=False)
    for name, model in zip(("seed", "code"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    sources = {name: tmp_path / name for name in ("seed", "code")}
    for placement, format in (("split", "mixtral"), ("virtual_groups", "mixtral"), ("blend", "mixtral")):
        moe = written(sources, tmp_path / placement, PLACEMENTS[placement])
        assert upcycle.export(moe, tmp_path / f"{placement}-out").format == format
    for placement, reason in (
        ("some_layers", "only its layers 1 are mixtures"),
        ("shared_seed", r"every token takes a shared expert with a fixed share \(shared_gate=half\)"),
        ("one_per_domain", "a token takes one expert of each source at most"),
    ):
        moe = written(sources, tmp_path / placement, PLACEMENTS[placement])
        exported = upcycle.export(moe, tmp_path / f"{placement}-out")
        assert exported.format == "remote_code" and re.search(reason, "; ".join(exported.reasons))


# -------------------------------------------------------------------------------------------------------------- refused

SWITCH = RouterConfig(kind="switch", top_k=1, gate_order="softmax_topk", gate_scale="straight_through")
TEXTS = InitConfig(kind="domain_centroid")
REFUSED: dict[str, tuple[dict, str]] = {
    "layer twice": ({"layers": (0, 0)}, "expected at least one layer and none twice"),
    "no layer": ({"layers": ()}, "expected at least one layer"),
    "no expert": ({"experts": ()}, "expected two sources by name or more"),
    "gate of nothing": ({"shared_gate": "sum"}, "shared_gate=sum has no effect with shared_expert=none"),
    "part of a group": (
        {"split": 2, "virtual_groups": True, "router": RouterConfig(top_k=3)},
        "top_k=3 counts shards and is no multiple of placement.split=2",
    ),
    "groups of one": ({"split": 2, "virtual_groups": True, "router": SWITCH}, "that can take all shards"),
    "match of BAM": ({"match": "seed", "more": BAM}, "makes a mixture with one merged attention as large as BAM"),
    "match of soft": ({"match": "seed", "router": RouterConfig(kind="soft", top_k=1)}, "got attention=merged, router.kind=soft"),
    "one of one": (
        {"one_per_domain": True, "router": RouterConfig(top_k=1, router_gradient="none")}, "has no effect with router.kind=top_k, top_k=1"
    ),
    "tied shards": ({"split": 2, "router": RouterConfig(), "more": BAM | {"tie": "sublayers"}}, "feed-forward experts are not those of attention"),
    "tied blends": ({"blend": True, "router": RouterConfig(), "more": BAM | {"tie": "sublayers"}}, "with placement.blend=true feed-forward"),
    "texts of blends": (
        {"blend": True, "more": {"attention": "mixture", "attention_router": RouterConfig(kind="soft", top_k=1, init=TEXTS)}},
        "attention_router.init.kind=domain_centroid .* no feed-forward expert is whole",
    ),
    "texts of copies": ({"experts": REPEATED, "router": RouterConfig(init=TEXTS)}, "copies of one source, .* would start alike"),
    "an oracle of attention beside shards": (
        {"split": 2, "more": {"attention": "mixture", "attention_router": RouterConfig(kind="oracle", top_k=1)}},
        "attention_router.kind=oracle .* it has none of its own",
    ),
    "groups of zeros": (
        {"split": 2, "virtual_groups": True, "router": RouterConfig(init=InitConfig(kind="zeros"))}, "makes all shards alike"
    ),
    "groups in noise": (
        {"split": 2, "virtual_groups": True, "router": RouterConfig(noise=NoiseConfig(std=0.1))}, "would tear virtual groups apart"
    ),
    "match without the seed": ({"match": "seed", "router": RouterConfig(), "more": {"include_seed": False}}, "got include_seed=false"),
    "match of another top_k": ({"match": "seed", "router": RouterConfig(top_k=3)}, "router.top_k=3 has no effect with placement.match"),
    "one expert": ({"experts": ("code",)}, "expected two sources by name or more"),
    "seed said twice": ({"experts": REPEATED, "more": {"include_seed": False}}, "include_seed=false has no effect"),
    "merged of the seed": ({"shared_expert": "merged", "more": {"merge": "seed"}}, "is the seed's own; write shared_expert=seed"),
    "texts of shards": (
        {"split": 2, "router": RouterConfig(top_k=2, init=InitConfig(kind="domain_centroid"))},
        "router.init.kind=domain_centroid .* with placement.split=2 no feed-forward expert is whole",
    ),
    "seed first": (
        {"split": 2, "router": RouterConfig(top_k=2, pool=PoolConfig(per="segment"))},
        r"with placement.split=2 no expert is it; use pool.first=uniform with kind=soft",
    ),
    "seed first, drawn anew": (
        {"drop_fraction": 0.5, "router": RouterConfig(top_k=2, pool=PoolConfig(per="prefix"))}, "placement.drop_fraction=0.5"
    ),
    "oracle of shards": ({"split": 2, "router": RouterConfig(kind="oracle", top_k=1)}, "it has none of its own"),
}  # fmt: skip
REFUSED_LATER: dict[str, tuple[dict, str]] = {
    "odd split": ({"split": 3}, "placement.split=3 does not divide the 40 hidden units of a feed-forward, expected one of 1, 2, 4, 5, 8"),
    "odd blend": ({"blend": True, "experts": REPEATED}, "as many chunks as there are sources, 3, which does not divide its 40"),
    "unknown source": ({"experts": ("seed", "cod")}, r"placement.experts names 'cod', expected seed or .*; did you mean code\?"),
    "layer out of range": ({"layers": (2,)}, "the seed has 2 layers and no layer 2"),
    "nothing dropped": ({"drop_fraction": 0.01}, "of an expert's 40 hidden units is none"),
    "sources all different": ({"one_per_domain": True}, "has no effect: each source has one expert"),
    "more than sources": (
        {"one_per_domain": True, "experts": REPEATED, "router": RouterConfig(top_k=3)}, r"top_k=3 exceeds the 2 sources \(seed, code\)"
    ),
    "more than sources of attention": (
        {
            "one_per_domain": True, "experts": REPEATED,
            "more": {"attention": "mixture", "attention_router": RouterConfig(top_k=3)},
        },
        r"attention_router.top_k=3 exceeds the 2 sources",
    ),
    "an idle branch": ({"experts": ("seed", "seed")}, "leaves out code: those branches would be trained, or read, in vain"),
    "more than shards": ({"split": 2, "router": RouterConfig(top_k=5)}, r"num_experts_per_tok\)=5 is not between 1 and the 4 experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        AssembleConfig(**placing(**settings))


@pytest.mark.parametrize("name", REFUSED_LATER)
def test_settings_that_the_seed_or_the_branches_do_not_allow_are_refused(made, tmp_path, name):
    settings, message = REFUSED_LATER[name]
    with pytest.raises(ValueError, match=message):
        written(made.sources("llama"), tmp_path / "moe", placing(**settings))
    assert not list((tmp_path / "moe").iterdir())


def test_a_run_refuses_them_before_it_starts():
    from launch.config import build
    from tests.test_config import composed

    for changes, message in (
        ({"layers": [9]}, r"assemble.placement.layers=\[9\]: the seed has \d layers and no layer 9"),
        ({"split": 7}, r"assemble.placement.split=7 does not divide the \d+ hidden units"),
    ):
        raw = copy.deepcopy(composed())
        for mixture in raw["mixtures"].values():
            mixture["assemble"]["placement"] |= changes
        with pytest.raises(ValueError, match=message):
            build(raw)
    raw = copy.deepcopy(composed())
    assemble = raw["mixtures"]["btx"]["assemble"]
    assemble["placement"]["split"], assemble["router"]["top_k"] = 2, 99
    with pytest.raises(ValueError, match=r"assemble.router.top_k=99 exceeds the \d+ experts \(seed/1, seed/2, "):
        build(raw)
