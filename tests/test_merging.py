"""Whole models merged: by which method each tensor goes, out of which files, into which; as dense models and in mixtures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import upcycle
from tests.domains import write_tokens
from tests.tiny import FAMILY_CONFIGS, dense_config, dense_models
from upcycle.assembly import write_mixture
from upcycle.checkpoint import Checkpoint
from upcycle.config import CurvatureConfig
from upcycle.dense_merge import write_merged
from upcycle.explain import explain
from upcycle.families import family_of
from upcycle.merge import METHODS, check_merge, needed_statistics, readers
from upcycle.merge_config import ROLES, MergeConfig, RoleConfig, from_record
from upcycle.merged import merge_in_words
from upcycle.merger import Merger, Statistics
from upcycle.merging import Member, Merging
from upcycle.mixture_config import AssembleConfig
from upcycle.pieces import dense_config as config_of_seed
from upcycle.pieces import plan_pieces
from upcycle.placement_config import PlacementConfig
from upcycle.proof import prove
from upcycle.roles import tensor_facts
from upcycle.stages import measure_curvature
from upcycle.store import Run

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("seed", "code", "law")
KINDS = ("fisher", "gram", "kfac", "hessian")
WAYS = [(name, {}) for name in METHODS if name != "camex"] + [
    ("camex", {"curvature": "fisher", "alpha": 0.9}), ("camex", {"curvature": "kfac"}), ("camex", {"curvature": "identity"}),
    ("mats", {"curvature": "fisher"}), ("gradient_matching", {"curvature": "hessian", "damping": 1e4}),
]  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "llama_tied", "family/gpt2"])
def models(request, tmp_path_factory) -> dict[str, Path]:
    kind, tied = request.param.removesuffix("_tied"), request.param.endswith("_tied")
    return write_models(tmp_path_factory.mktemp("models"), kind, tie_word_embeddings=tied)


def write_models(root: Path, kind: str, **changes) -> dict[str, Path]:
    """Three continuations of one model, in small shards, as plain transformers writes them."""
    made = dense_models(kind, 3, dtype=torch.float32, **changes)
    for name, model in zip(NAMES, made, strict=True):
        with torch.no_grad():
            for own, first in zip(model.parameters(), made[0].parameters(), strict=True):
                if model is not made[0]:
                    own.copy_(first + 0.1 * own)
        model.save_pretrained(root / name, max_shard_size="30KB")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def curvature(models, tmp_path_factory) -> dict[str, list[Path]]:
    """Every kind of every model, each in a directory of its own."""
    root = tmp_path_factory.mktemp("curvature")
    data = {name: write_tokens(root / f"text-{name}", rng_seed=n) for n, name in enumerate(NAMES)}
    found = {}
    for name in NAMES:
        found[name] = [root / f"{kind}-{name}" for kind in KINDS]
        for kind, out in zip(KINDS, found[name], strict=True):
            out.mkdir()
            samples = CurvatureConfig(kinds=(kind,), sequences=40, sequence_length=8)
            config = {"curvature": samples, "proportions": {name: 1.0}}
            measure_curvature(config, out=out, run=Run(), model=models[name], data=data)
    return found


def merged(models, out: Path, config: MergeConfig | None = None, **more) -> dict:
    out.mkdir(parents=True)
    branches = {name: path for name, path in models.items() if name != "seed"}
    return write_merged(models["seed"], branches, out, config or MergeConfig(), **more)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


# What tensors are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FAMILY_CONFIGS))
def test_every_tensor_of_every_family_has_its_role(kind):
    config = dense_config(f"family/{kind}")
    family, facts = family_of(config), tensor_facts(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    for name in model.state_dict():
        found, parts = facts[name], name.split(".")
        if any("norm" in part or part.startswith("ln_") for part in parts):
            expected = "norm"
        elif family.attention in parts:
            expected = "attention"
        elif family.mlp in parts:
            expected = "mlp"
        else:
            expected = "head" if name.startswith(("lm_head", "embed_out")) else "embedding"
        assert found.role == expected, name
        assert found.layer == (int(parts[2]) if family.layers in parts else None)
        linear = linears.get(name.removesuffix(".weight"))
        tied = found.role == "head" and config.tie_word_embeddings
        if linear is None or tied or not name.endswith(".weight"):
            assert found.in_axis is None, name
        else:
            assert found.in_axis == (0 if isinstance(linear, Conv1D) else 1), name


# Dense models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", WAYS, ids=str)
def test_each_tensor_is_what_its_method_makes_of_the_models(models, curvature, tmp_path, method, options):
    """With weights of the models, and the statistics that belong to the tensor."""
    config = MergeConfig(method=method, options=options, weights={"code": 2.0, "seed": 0.5})
    made = merged(models, tmp_path / "out", config, statistics=curvature)
    ours, all_of = tensors_of(tmp_path / "out"), {name: tensors_of(path) for name, path in models.items()}
    weights, statistics = {"seed": 0.5, "code": 2.0, "law": 1.0}, {name: Statistics(*curvature[name]) for name in NAMES}
    keys, dense = needed_statistics(method, options), AutoModelForCausalLM.from_pretrained(models["seed"])
    axes, averaged = axes_of(dense), 0
    for name in Checkpoint(models["seed"]).names:
        own = {who: dict(statistics[who].of(keys, name)) for who in NAMES}
        of_linears = {"gram", "kfac_in"} & set(keys)
        if of_linears and axes.get(name) is None:
            averaged += 1
        members = {who: Member(all_of[who][name], weights[who], own[who]) for who in NAMES}
        expected = METHODS[method](Merging(name, members, members["seed"], axes.get(name)), **options)
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-7, msg=name)
        assert not torch.equal(ours[name], all_of["law"][name])
    assert made["averaged"] == ({method: averaged} if averaged else {})


def axes_of(model) -> dict[str, int]:
    head = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    kinds = {Conv1D: 0, torch.nn.Linear: 1}
    return {
        f"{name}.weight": kinds[type(module)]
        for name, module in model.named_modules()
        if type(module) in kinds and module is not head
    }


def test_systems_that_are_not_solved_are_counted(models, curvature, tmp_path):
    made = merged(models, tmp_path / "few", MergeConfig(method="mats", options={"iterations": 1}), statistics=curvature)
    linears = sum(one is not None for one in (f.in_axis for f in tensor_facts_of(models["seed"]).values()))
    assert 0 < made["unconverged"] <= linears
    assert f"unsolved    {made['unconverged']} tensors" in merge_in_words(tmp_path / "few")
    made = merged(
        models, tmp_path / "many", MergeConfig(method="mats", options={"iterations": 5000}), statistics=curvature
    )
    assert "unconverged" not in made


def tensor_facts_of(path: Path) -> dict:
    return tensor_facts(AutoModelForCausalLM.from_pretrained(path).config)


def test_roles_go_their_own_way(models, tmp_path):
    config = MergeConfig(
        method="ties",
        options={"density": 0.5},
        roles={
            "norm": RoleConfig(method="average"),
            "embedding": RoleConfig(method="seed"),
            "mlp": RoleConfig(method="ties"),
        },
    )
    merged(models, tmp_path / "own", config)
    whole = {
        "attention": MergeConfig(method="ties", options={"density": 0.5}),
        "head": MergeConfig(method="ties", options={"density": 0.5}),
        "mlp": MergeConfig(method="ties"),
        "norm": MergeConfig(),
        "embedding": MergeConfig(method="seed"),
    }
    ours = tensors_of(tmp_path / "own")
    facts = tensor_facts(AutoModelForCausalLM.from_pretrained(models["seed"]).config)
    for role, way in whole.items():
        merged(models, tmp_path / role, way)
        theirs = tensors_of(tmp_path / role)
        named = [name for name in Checkpoint(models["seed"]).names if facts[name].role == role]
        assert named or role == "head"
        assert all(torch.equal(ours[name], theirs[name]) for name in named)


def test_neither_order_nor_shards_matter(models, tmp_path):
    config = MergeConfig(method="dare_ties", options={"drop": 0.5})
    merged(models, tmp_path / "one", config)
    other = {name: models[name] for name in ("law", "code")}
    for name, path in other.items():  # in one file, and the merge in many
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / name)
    (tmp_path / "many").mkdir()
    turned = {name: tmp_path / name for name in other}
    write_merged(models["seed"], turned, tmp_path / "many", config, max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert one.names == many.names and all(torch.equal(one.get(name), many.get(name)) for name in one.names)


def test_a_merged_directory_is_an_ordinary_one(models, tmp_path):
    """Of the seed's dtypes, or one that is asked for; a tied head stays tied."""
    half = {}
    for name, path in models.items():
        half[name] = tmp_path / name
        AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16).save_pretrained(half[name])
    merged(half, tmp_path / "bf16")
    merged(half, tmp_path / "fp32", dtype="float32")
    found, wide = Checkpoint(tmp_path / "bf16"), Checkpoint(tmp_path / "fp32")
    assert found.names == Checkpoint(half["seed"]).names
    for name in found.names:
        mean = torch.stack([Checkpoint(path).get(name).double() for path in half.values()]).mean(0)
        assert found.get(name).dtype == torch.bfloat16 and wide.get(name).dtype == torch.float32
        torch.testing.assert_close(wide.get(name).double(), mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(found.get(name), wide.get(name).to(torch.bfloat16))  # fp32 until it is written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert loaded.dtype == torch.float32
    if loaded.config.tie_word_embeddings:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_values_that_a_dtype_cannot_hold_are_refused(models, tmp_path):
    config = MergeConfig(method="task_arithmetic", options={"scale": 1e6})
    with pytest.raises(
        ValueError, match=r"merge=task_arithmetic of \S+ makes .*expected finite values that float16 can hold"
    ):
        merged(models, tmp_path / "out", config, dtype="float16")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_written_says_how_it_was_made(models, curvature, tmp_path):
    config = MergeConfig(
        method="fisher", options={"floor": 1e-3}, weights={"law": 3.0}, roles={"norm": RoleConfig(method="average")}
    )
    made = merged(models, tmp_path / "out", config, statistics={name: paths[:1] for name, paths in curvature.items()})
    assert made == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert from_record(made["merge"]) == config and made["models"] == ["seed", "code", "law"]
    assert made["curvature"]["law"][0]["tokens"] == {"law": 320} and made["curvature"]["law"][0]["kinds"] == ["fisher"]
    seed, code = tensors_of(models["seed"]), tensors_of(models["code"])
    names = Checkpoint(models["seed"]).names
    norm = torch.cat([(code[name] - seed[name]).flatten().double() for name in names]).norm().item()
    assert made["roles"]["all"]["norms"]["code"] == pytest.approx(norm, rel=1e-6)
    assert made["roles"]["all"]["entries"] == sum(seed[name].numel() for name in names)
    assert sum(row["entries"] for row in made["layers"]) == made["roles"]["all"]["entries"]
    ties = made["roles"]["all"]["ties"]
    assert ties["trimmed"] + ties["agreed"] + ties["conflict"] == made["roles"]["all"]["entries"]
    text = merge_in_words(tmp_path / "out")
    assert (
        "fisher (floor 0.001); norm: average; weights: law 3" in text
        and "law: fisher on 40 sequences of 8 tokens (law 320)" in text
    )
    rows = {line.split()[0] for line in text.splitlines()[-len(made["roles"]) :]}
    assert rows == set(made["roles"]) <= {*ROLES, "all"}
    assert len(merge_in_words(tmp_path / "out", by_layer=True).splitlines()) == len(text.splitlines()) + len(
        made["layers"]
    )


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        AssembleConfig(),
        AssembleConfig(attention="mixture", kv="shared"),
        AssembleConfig(placement=PlacementConfig(shared_expert="merged", layers=(1,))),
    ],
    ids=["btx", "bam_shared_kv", "shared expert, one layer"],
)
@pytest.mark.parametrize("method", ["ties", "dare", "fisher", "regmean", "mats", "gradient_matching"])
def test_what_is_no_expert_is_merged_as_the_dense_models_are(models, curvature, tmp_path, choice, method):
    """Keys and values that are shared, shared experts and layers that are no mixtures too; norms go another way here."""
    merge = MergeConfig(method=method, weights={"code": 2.0}, roles={"norm": RoleConfig(method="seed")})
    choice = AssembleConfig(**{**vars(choice), "merge": merge})
    branches = {name: models[name] for name in ("code", "law")}
    (tmp_path / "moe").mkdir()
    config = write_mixture(models["seed"], branches, tmp_path / "moe", choice, statistics=curvature)
    merged(models, tmp_path / "dense", merge, statistics=curvature)
    moe, dense = Checkpoint(tmp_path / "moe"), Checkpoint(tmp_path / "dense")
    pieces = [piece for piece in plan_pieces(config, dense.names) if piece.origin == "merged"]
    assert pieces
    for piece in pieces:
        assert torch.equal(moe.get(piece.target), piece.cut(dense.get(piece.sources[0]))), piece.target
    proof = prove(tmp_path / "moe", models)
    facts = tensor_facts(config_of_seed(config))
    found = [facts[piece.sources[0]] for piece in pieces]
    norms = sum(one.role == "norm" for one in found)
    averaged = sum(one.role != "norm" and one.in_axis is None for one in found) if method in ("regmean", "mats") else 0
    assert proof["merged_tensors_compared"] == (len(pieces) if method in ("ties", "dare") else norms + averaged)
    record = json.loads((tmp_path / "moe" / "assembly.json").read_text())
    assert record.get("averaged", {}) == ({method: averaged} if averaged else {})
    origins = {row.target: row.origin for row in explain(tmp_path / "moe").tensors}
    for piece, one in zip(pieces, found, strict=True):
        other = "averaged" if averaged and one.in_axis is None else f"merged by {method}"
        assert origins[piece.target] == ("the seed's" if one.role == "norm" else other)


@pytest.mark.parametrize("role", ["attention", "norm", "embedding"])
def test_the_proof_sees_a_merged_tensor_that_is_not(models, tmp_path, role):
    merge = MergeConfig(
        method="ties", roles={"norm": RoleConfig(method="average"), "embedding": RoleConfig(method="seed")}
    )
    branches = {name: models[name] for name in ("code", "law")}
    (tmp_path / "moe").mkdir()
    config = write_mixture(models["seed"], branches, tmp_path / "moe", AssembleConfig(merge=merge))
    facts = tensor_facts(config_of_seed(config))
    pieces = plan_pieces(config, Checkpoint(models["seed"]).names)
    target = next(p.target for p in pieces if p.origin == "merged" and facts[p.sources[0]].role == role)
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    tensors[target].view(-1)[0] += 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    said = {
        "attention": "the ties merge of the experts'",
        "norm": "the average of the experts'",
        "embedding": "the seed's own",
    }
    with pytest.raises(ValueError, match=said[role]):
        prove(tmp_path / "moe", models)


# Wrong settings and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "tie"}, "merge='tie' is not known; expected one of .*did you mean ties"),
        ({"options": {"density": 0.3}}, "merge=average has no option 'density'; expected none"),
        ({"method": "ties", "options": {"density": 3.0}}, "merge=ties: density=3.0: .*the default is 0.2"),
        ({"method": "seed", "options": {"scale": 1.0}}, "merge=seed is the seed's tensor as it is, and has no option 'scale'"),
        ({"weights": {"cod": 2.0}}, r"merge.weights.cod: not one of the models that are merged \(seed, code\); did you mean code"),
        ({"weights": {"seed": 0, "code": 0}}, "merge.weights are 0 for all models"),
        ({"method": "seed", "weights": {"code": 2.0}}, "merge.weights have no effect where every tensor is the seed's own"),
        ({"roles": {"norm": {"method": "average"}}}, "merge.roles.norm says what holds for all tensors"),
        ({"roles": {"norm": {"method": "dare", "options": {"dorp": 0.1}}}}, "merge.roles.norm: merge=dare has no option 'dorp'"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_merge(MergeConfig(**settings), ["seed", "code"])


def test_which_curvature_of_which_models_is_read():
    ties = MergeConfig(method="ties", roles={"mlp": RoleConfig(method="regmean")}, weights={"code": 0})
    assert readers(ties, ["seed", "code", "law"]) == {"gram": ["seed", "law"]}
    assert readers(MergeConfig(method="mats"), ["code"]) == {"kfac": ["code"]}
    matching = MergeConfig(method="gradient_matching", weights={"seed": 0})
    assert readers(matching, ["seed", "code"]) == {"fisher": ["seed", "code"]}
    assert readers(MergeConfig(method="mats", options={"curvature": "identity"}), ["code"]) == {}


def test_curvature_that_is_not_there_is_named(models, curvature, tmp_path):
    some = {name: curvature[name] for name in ("seed", "code")}
    with pytest.raises(
        ValueError, match=r"reads the curvature \(fisher\) of seed, code, law, and that of law is not given"
    ):
        merged(models, tmp_path / "a", MergeConfig(method="fisher"), statistics=some)
    with pytest.raises(
        ValueError, match=r"empty: no curvature there; expected curvature.json and curvature.safetensors"
    ):
        (tmp_path / "empty").mkdir()
        Statistics(tmp_path / "empty")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "curvature.json").write_text("{}")
    (damaged / "curvature.safetensors").write_bytes(
        (curvature["code"][0] / "curvature.safetensors").read_bytes()[:1000]
    )
    with pytest.raises(ValueError, match=r"curvature.safetensors: not a whole safetensors file"):
        Statistics(damaged)


def test_a_linear_that_is_too_large_for_factors_is_averaged(models, tmp_path):
    out = tmp_path / "gram"
    out.mkdir()
    data = {"text": write_tokens(tmp_path / "text")}
    samples = CurvatureConfig(kinds=("gram",), sequences=2, sequence_length=8, largest_factor=35)
    measure_curvature(
        {"curvature": samples, "proportions": {"text": 1.0}}, out=out, run=Run(), model=models["seed"], data=data
    )
    seed = Checkpoint(models["seed"])
    config = AutoModelForCausalLM.from_pretrained(models["seed"]).config
    merger = Merger(MergeConfig(method="regmean"), seed, config, list(NAMES), {name: Statistics(out) for name in NAMES})
    measured = {name for name in seed.names if Statistics(out).has("gram", name)}
    facts = tensor_facts(config)
    for name in seed.names:
        merging = merger.merging(name, {who: seed.get(name) for who in NAMES})
        assert (merging.in_axis is not None) == (name in measured)
    assert measured < {name for name in seed.names if facts[name].in_axis is not None}


# Beside mergekit -----------------------------------------------------------------------------------------------------

MERGEKIT = {
    "average": ("linear", {}, {}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.4}, {"scale": 0.4}),
    "ties": ("ties", {"lambda": 0.7}, {"density": 0.3, "scale": 0.7}),
}


@pytest.mark.parametrize(
    "kind, changes",
    [("llama", {"attention_bias": False}), ("family/qwen3", {"attention_bias": False}), ("family/gpt2", {})],
)
@pytest.mark.parametrize("method", MERGEKIT)
def test_mergekit_makes_the_same_models(tmp_path, method, kind, changes):
    """Where it computes the same formula, with other weights for each model; its masks of DARE are drawn elsewhere. It leaves
    attention biases of Llamas out, and wants tensors of GPT-NeoX that today's transformers does not write."""
    models = write_models(tmp_path, kind, **changes)
    theirs, parameters, options = MERGEKIT[method]
    weights = {"seed": 0.5, "code": 2.0, "law": 1.0}
    each = [
        {"model": str(models[name]), "parameters": {"weight": weights[name], "density": options.get("density", 1.0)}}
        for name in (NAMES if method == "average" else NAMES[1:])
    ]
    plan = {"merge_method": theirs, "models": each, "dtype": "float32", "parameters": parameters}
    if method == "average":
        each = [one | {"parameters": {"weight": one["parameters"]["weight"]}} for one in each]
        plan |= {"models": each}
    else:
        plan |= {"base_model": str(models["seed"])}
    run_merge(
        MergeConfiguration(**plan),
        str(tmp_path / "theirs"),
        MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"),
    )
    merged(models, tmp_path / "ours", MergeConfig(method=method, options=options, weights=weights))
    ours, other = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    for name in Checkpoint(models["seed"]).names:
        torch.testing.assert_close(ours[name], other[name], rtol=1e-5, atol=1e-6, msg=name)


# The call ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:branch .* does not look like a continuation")
def test_one_call_merges(models, tmp_path):
    branches = {name: models[name] for name in ("code", "law")}
    out = upcycle.merge_models(
        seed=models["seed"], branches=branches, out=tmp_path / "new" / "ties", method="ties", density=0.5
    )
    merged(models, tmp_path / "stage", MergeConfig(method="ties", options={"density": 0.5}))
    one, other = Checkpoint(out), Checkpoint(tmp_path / "stage")
    assert all(torch.equal(one.get(name), other.get(name)) for name in one.names)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ties"]
    assert upcycle.merge.METHODS is METHODS


@pytest.mark.filterwarnings("ignore:branch .* does not look like a continuation")
def test_one_call_measures_what_the_method_reads(models, tmp_path):
    branches = {name: models[name] for name in ("code", "law")}
    data = {name: write_tokens(tmp_path / f"text-{name}", rng_seed=n) for n, name in enumerate(NAMES)}
    samples = {"sequences": 40, "sequence_length": 8}
    call = {"seed": models["seed"], "branches": branches, "method": "fisher"}
    out = upcycle.merge_models(**call, out=tmp_path / "out", data=data, samples=samples)
    made = json.loads((out / "merge.json").read_text())
    assert {name: found[0]["tokens"] for name, found in made["curvature"].items()} == {
        name: {name: 320} for name in NAMES
    }
    assert not list(tmp_path.glob("tmp*"))
    del data["law"]
    with pytest.raises(
        ValueError, match="merge=fisher reads the curvature of seed, code, law, and data has no text of law"
    ):
        upcycle.merge_models(**call, out=tmp_path / "none", data=data)
    with pytest.raises(ValueError, match=r"data=\{seed, code\} has no effect: merge=ties reads no curvature of it"):
        upcycle.merge_models(**call | {"method": "ties"}, out=tmp_path / "none", data=data)
    with pytest.raises(ValueError, match="samples has no effect: merge=ties reads no curvature"):
        upcycle.merge_models(**call | {"method": "ties"}, out=tmp_path / "none", samples=samples)
    with pytest.raises(ValueError, match="sequence_lenght: unknown key; did you mean sequence_length"):
        upcycle.merge_models(**call, out=tmp_path / "none", samples={"sequence_lenght": 8})
    with pytest.raises(ValueError, match="exists already and is not an empty directory"):
        upcycle.merge_models(**call | {"method": "ties"}, out=out)
    with pytest.raises(ValueError, match="samples.sequence_length=65 exceeds the seed's 64 positions"):
        upcycle.merge_models(
            **call, out=tmp_path / "none", data=data | {"law": data["seed"]}, samples={"sequence_length": 65}
        )
    with pytest.raises(ValueError, match="dtype='fp16' is not known; expected float32, bfloat16, float16"):
        upcycle.merge_models(**call | {"method": "ties"}, out=tmp_path / "none", dtype="fp16")
    with pytest.raises(ValueError, match="branches is empty, expected at least one"):
        upcycle.merge_models(seed=models["seed"], branches={}, out=tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"merge=fisher reads the curvature \(fisher\) of the models, which this call does not measure"
    ):
        upcycle.assemble(seed=models["seed"], branches=branches, out=tmp_path / "none", merge="fisher")
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:branch .* does not look like a continuation")
def test_an_option_of_a_method_is_one_of_the_call(models, tmp_path):
    branches = {name: models[name] for name in ("code", "law")}
    upcycle.merge_models(
        seed=models["seed"], branches=branches, out=tmp_path / "mats", method="mats", curvature="identity"
    )
    merged(models, tmp_path / "average")
    one, other = tensors_of(tmp_path / "mats"), tensors_of(tmp_path / "average")
    for name in Checkpoint(models["seed"]).names:  # C = I
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_role_that_nothing_has_is_refused(models, tmp_path):
    other = MergeConfig(roles={"other": RoleConfig(method="ties")})
    with pytest.raises(ValueError, match="merge.roles.other has no effect: no tensor that is merged has that role"):
        merged(models, tmp_path / "out", other)
    bam = AssembleConfig(attention="mixture", merge=MergeConfig(roles={"attention": RoleConfig(method="ties")}))
    (tmp_path / "moe").mkdir()
    with pytest.raises(ValueError, match="merge.roles.attention has no effect"):
        write_mixture(models["seed"], {name: models[name] for name in ("code", "law")}, tmp_path / "moe", bam)


@pytest.mark.filterwarnings("ignore:branch .* does not look like a continuation")
def test_a_crash_leaves_nothing_that_looks_like_a_model(models, tmp_path, monkeypatch):
    branches = {name: models[name] for name in ("code", "law")}
    monkeypatch.setattr("upcycle.dense_merge.copy_companions", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upcycle.merge_models(seed=models["seed"], branches=branches, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
