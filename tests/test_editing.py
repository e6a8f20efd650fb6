"""Editing a mixture: what joins it is the branch's, what stays is untouched, and one expert alone is a dense model again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from launch.cli import WORDS
from tests.tiny import assert_same_tensors, dense_models, routers_of, tokens
from upcycle import dense, editing, edits
from upcycle.assembly import write_mixture
from upcycle.checkpoint import Checkpoint, CheckpointWriter
from upcycle.configuration import UpcycledConfig
from upcycle.dense_merge import write_merged
from upcycle.explain import explain
from upcycle.families import family_of
from upcycle.mixture_config import AssembleConfig, PlacementConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.pieces import placed_whole, plan_pieces
from upcycle.proof import _check_hashes, prove
from upcycle.router import RoutingTrace
from upcycle.router_config import LossesConfig, PoolConfig, RouterConfig

NAMES = ("seed", "code", "law", "math")
KINDS = ("llama", "gpt_neox", "family/gpt2", "llama_tied", "family/olmo2")
SOFT = RouterConfig(kind="soft", top_k=1)
ONE = RouterConfig(top_k=1, gate_order="softmax_topk", gate_scale="straight_through")
BIASED = RouterConfig(top_k=2, bias_rate=0.01)
CHOICES = {
    "btx": {},
    "btx_soft": {"router": SOFT, "tie": "skip"},
    "btx_bias": {"router": BIASED, "tie": "layers"},
    "btx_hash": {"router": RouterConfig(kind="hash", top_k=1)},
    "btx_uniform": {"router": RouterConfig(kind="uniform", top_k=1)},
    "btx_random": {"router": RouterConfig(trained=False)},
    "bam": {"attention": "mixture", "router": ONE},
    "bam_top2": {"attention": "mixture", "attention_router": RouterConfig(top_k=2)},
    "bam_shared_kv": {"attention": "mixture", "kv": "shared", "tie": "sublayers"},
}
PAIRS = [
    *(("llama", choice) for choice in CHOICES),
    *((kind, choice) for kind in KINDS[1:3] for choice in ("btx", "bam", "bam_shared_kv")),
    ("llama_tied", "bam_shared_kv"), ("family/olmo2", "bam"), ("family/olmo2", "bam_shared_kv"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A seed and three branches of each family, by kind; math is the one that is added."""

    def made(kind: str) -> dict[str, Path]:
        root = tmp_path_factory.getbasetemp() / "sources" / kind.replace("/", "-")
        if not root.is_dir():
            changes = {"tie_word_embeddings": kind.endswith("_tied")} if kind.startswith("llama") else {}
            models = dense_models(kind.removesuffix("_tied"), 4, dtype=torch.float32, **changes)
            for name, model in zip(NAMES, models, strict=True):
                model.save_pretrained(root / name, max_shard_size="30KB")
        return {name: root / name for name in NAMES}

    return made


def assembled(sources: dict[str, Path], out: Path, names=NAMES[1:3], **choices) -> Path:
    """With weights that training has moved: experts and rest are no source's any more."""
    out.mkdir(parents=True)
    write_mixture(sources["seed"], {name: sources[name] for name in names}, out, AssembleConfig(**choices))
    return out


def trained(directory: Path) -> Path:
    """As training leaves it: every tensor moved a little, the routers a lot, the balancing biases away from 0."""
    model = UpcycledForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            size = 0.5 if ".router." in name else 0.02
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    record = (directory / "assembly.json").read_text()
    shutil.rmtree(directory)
    model.save_pretrained(directory)
    (directory / "assembly.json").write_text(record)
    return directory


def loaded(directory: Path):
    return UpcycledForCausalLM.from_pretrained(directory).eval()


def forced(model, expert: int):
    return model(tokens(), trace=RoutingTrace(forced=expert)).logits


def dense_with(branch: Path, mixture, own: list[str]):
    """The branch with every tensor but those with `own` in their names taken from the mixture's merged rest."""
    dense = AutoModelForCausalLM.from_pretrained(branch).eval()
    family, rest = family_of(dense.config), mixture.state_dict()
    with torch.no_grad():
        for name, tensor in dense.state_dict().items():
            inside = name.removeprefix(f"{family.decoder}.")
            target = name if inside == name else f"model.decoder.{inside}"
            if not any(part in name for part in own):
                tensor.copy_(rest[target])
    return dense


@pytest.mark.parametrize(("kind", "choice"), PAIRS)
def test_an_added_expert_alone_is_the_branch_inside_the_mixtures_rest(sources, tmp_path, kind, choice):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES[choice]))
    edited = upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    before, after = loaded(moe), loaded(tmp_path / "out")
    assert after.config.experts == [*NAMES] == [*edited.experts] and edited.difference < 1e-5
    for expert in range(3):
        torch.testing.assert_close(forced(after, expert), forced(before, expert))
    if choice != "bam_shared_kv":  # there the keys and values of one projection are merged, the queries not
        family = family_of(after.config.seed)
        own = [f".{family.mlp}."] + [f".{family.attention}."] * (after.config.attention == "mixture")
        dense = dense_with(made["math"], after, own)
        torch.testing.assert_close(forced(after, 3), dense(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_added_to_shared_keys_and_values_has_its_queries_and_outputs_alone(sources, tmp_path, kind):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES["bam_shared_kv"]))
    upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    after, branch = loaded(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(made["math"])
    config, family = branch.config, family_of(branch.config)
    dense = dense_with(made["math"], after, [f".{family.mlp}.", f".{family.attention}."])
    rest, heads, size = after.state_dict(), config.num_attention_heads, config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for name, tensor in dense.state_dict().items():
            target = name.replace(f"{family.decoder}.", "model.decoder.", 1)
            if name.split(".")[-2] in ("k_proj", "v_proj", "k_norm"):
                tensor.copy_(rest[target])
            elif family.fused and f".{family.fused}." in name:
                stem, kind_of = target.rsplit(".", 1)
                key, value = (rest[f"{stem}.{part}.{kind_of}"] for part in ("key", "value"))
                rows = tensor.t() if family.conv1d else tensor
                if family.conv1d:
                    rows[config.hidden_size :] = torch.cat([key, value])
                else:
                    parts = rows.view(heads, 3, size, *rows.shape[1:])
                    parts[:, 1], parts[:, 2] = (one.view(parts[:, 1].shape) for one in (key, value))
    torch.testing.assert_close(forced(after, 3), dense(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "choice"), PAIRS)
def test_what_was_added_is_removed_without_a_trace(sources, tmp_path, kind, choice):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES[choice]))
    upcycle.add_expert(moe, made["math"], tmp_path / "more", "math", prove=False)
    upcycle.remove_expert(tmp_path / "more", "math", tmp_path / "back", prove=False)
    ours, theirs = Checkpoint(moe), Checkpoint(tmp_path / "back")
    assert ours.names == theirs.names
    for name in ours.names:
        assert torch.equal(ours.get(name), theirs.get(name)), name
    assert ours.config == theirs.config
    records = [json.loads((path / "assembly.json").read_text()) for path in (moe, tmp_path / "back")]
    added, removed = records[1].pop("edits")
    assert records[0] == records[1] and (added["added"], removed) == ("math", {"removed": "math"})


@pytest.mark.parametrize(("kind", "choice"), PAIRS)
def test_removing_an_expert_leaves_the_others_and_their_rows(sources, tmp_path, kind, choice):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", NAMES[1:], **CHOICES[choice]))
    edited = upcycle.remove_expert(moe, "code", tmp_path / "out")
    before, after = loaded(moe), loaded(tmp_path / "out")
    assert [*edited.experts] == after.config.experts == ["seed", "law", "math"] and edited.difference < 1e-5
    for now, was in enumerate((0, 2, 3)):
        torch.testing.assert_close(forced(after, now), forced(before, was))
    for name, tensor in after.state_dict().items():
        if ".router." in name:
            assert torch.equal(tensor, before.state_dict()[name][[0, 2, 3]])


def test_every_gate_reaches_the_new_expert_where_routers_take_all(sources, tmp_path):
    made = sources("llama")
    moe = assembled(made, tmp_path / "moe", **CHOICES["btx_soft"] | {"attention": "mixture"})
    upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    config = loaded(tmp_path / "out").config
    assert config.num_experts_per_tok == config.attention_router["top_k"] == 4
    assert loaded(moe).config.num_experts_per_tok == 3


def test_a_copy_added_to_copies_of_the_seed_is_the_seed(sources, tmp_path):
    for kind in ("llama", "gpt_neox", "family/gpt2"):
        seed = sources(kind)["seed"]
        copies = {"seed": seed, "code": seed, "law": seed}
        for choice in ("btx", "bam", "bam_shared_kv"):
            where = tmp_path / kind / choice
            moe = assembled(copies, where / "moe", **CHOICES[choice])
            edited = upcycle.add_expert(moe, seed, where / "out", "math", router_row="normal")
            assert sum("it is a copy" in note for note in edited.notes) == 3
            logits = loaded(where / "out")(tokens()).logits
            dense = AutoModelForCausalLM.from_pretrained(seed).eval()
            torch.testing.assert_close(logits, dense(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_router_rows_are_what_they_are_said_to_be(sources, tmp_path):
    made = sources("llama")
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES["bam_top2"]))
    old = {name: tensor for name, tensor in loaded(moe).state_dict().items() if ".router." in name}
    assert len(old) == 4
    expected = {
        None: lambda rows: sum(rows) / 3, "mean": lambda rows: sum(rows) / 3, "zeros": lambda rows: 0 * rows[0],
        "law": lambda rows: rows[2],
    }  # fmt: skip
    for how, row in expected.items():
        upcycle.add_expert(moe, made["math"], tmp_path / f"{how}", "math", router_row=how, prove=False)
        after = loaded(tmp_path / f"{how}").state_dict()
        for name, rows in old.items():
            assert torch.equal(after[name][:3], rows)
            torch.testing.assert_close(after[name][3], row(rows))
    drawn = []
    for seed in (1, 1, 2):
        out = tmp_path / f"normal-{len(drawn)}"
        upcycle.add_expert(moe, made["math"], out, "math", router_row="normal", rng_seed=seed, prove=False)
        drawn.append(torch.stack([loaded(out).state_dict()[name][3] for name in old]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std() == pytest.approx(0.02, rel=0.3)


def test_routers_that_are_never_trained_draw_their_new_row_and_biases_get_a_zero(sources, tmp_path):
    made = sources("llama")
    moe = assembled(made, tmp_path / "moe", **CHOICES["btx_random"])
    upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    after = loaded(tmp_path / "out")
    assert not [name for name, _ in after.named_parameters() if ".router." in name]
    for old, new in zip(routers_of(loaded(moe), "ffn"), routers_of(after, "ffn"), strict=True):
        assert torch.equal(new[:3], old) and (new[3] - old.mean(0)).abs().min() > 0
    moe = trained(assembled(made, tmp_path / "biased", **CHOICES["btx_bias"]))
    upcycle.add_expert(moe, made["math"], tmp_path / "more", "math")
    biases = {name: bias for name, bias in loaded(moe).state_dict().items() if name.endswith("router.bias")}
    assert len(biases) == 1 and all(bias.all() for bias in biases.values())  # the second layer follows the first
    for name, bias in biases.items():
        assert torch.equal(loaded(tmp_path / "more").state_dict()[name], torch.cat([bias, torch.zeros(1)]))


def test_a_mean_row_under_one_expert_a_token_is_said_to_get_nothing(sources, tmp_path):
    made = sources("llama")
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES["bam"]))
    edited = upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    (note,) = edited.notes
    assert note.startswith(
        "a mean row never has the largest logit, so the ffn routers, which take one expert, send the"
    )
    trace = RoutingTrace()
    loaded(tmp_path / "out")(tokens(), trace=trace)
    assert all((routing.experts != 3).all() for routing in trace.of("ffn"))
    assert upcycle.add_expert(moe, made["math"], tmp_path / "law", "math", router_row="law").notes == ()


@pytest.mark.parametrize("choice", ["btx", "bam"])
def test_layers_that_are_not_routed_stay_dense(sources, tmp_path, choice):
    made = sources("gpt_neox")
    moe = assembled(made, tmp_path / "moe", **CHOICES[choice])
    config = json.loads((moe / "config.json").read_text())
    # The first layer becomes an ordinary one: its merged tensors are the seed's here.
    seed, model = Checkpoint(made["seed"]), loaded(moe)
    model.config.routed_layers = [1]
    sparse = UpcycledForCausalLM._from_config(model.config)
    state = model.state_dict()
    dense = {name.replace("gpt_neox.", "model.decoder."): seed.get(name) for name in seed.names}
    sparse.load_state_dict({name: state.get(name, dense.get(name)) if "layers.0." not in name else dense[name] for name in sparse.state_dict()})  # fmt: skip
    shutil.rmtree(moe)
    sparse.save_pretrained(moe)
    assert config["routed_layers"] is None
    edited = upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    assert edited.difference < 1e-5 and loaded(tmp_path / "out").config.routed_layers == [1]
    upcycle.remove_expert(tmp_path / "out", "math", tmp_path / "back")
    assert_same_tensors(loaded(tmp_path / "back").state_dict(), sparse.state_dict(), atol=0, rtol=0)
    upcycle.to_dense(tmp_path / "out", tmp_path / "dense", expert="math")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(found(tokens()).logits, forced(loaded(tmp_path / "out"), 3), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize(("kind", "choice"), PAIRS)
def test_one_expert_as_a_dense_model_is_the_mixture_forced_to_it(sources, tmp_path, kind, choice):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES[choice]))
    edited = upcycle.to_dense(moe, tmp_path / "dense", expert="code", max_shard_bytes=30_000)
    assert edited.difference < 1e-5 and edited.experts == ("code",)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    seed = AutoModelForCausalLM.from_pretrained(made["seed"])
    assert type(dense) is type(seed)
    torch.testing.assert_close(dense(tokens()).logits, forced(loaded(moe), 1), atol=1e-4, rtol=1e-4)
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["btx", "bam", "bam_shared_kv"])
def test_the_merge_of_all_experts_is_the_mean_of_each_as_a_dense_model(sources, tmp_path, kind, choice):
    made = sources(kind)
    moe = trained(assembled(made, tmp_path / "moe", **CHOICES[choice]))
    edited = upcycle.to_dense(moe, tmp_path / "dense")
    assert edited.experts == NAMES[:3] and edited.difference is None
    for name in NAMES[:3]:
        upcycle.to_dense(moe, tmp_path / name, expert=name, prove=False)
    one = [Checkpoint(tmp_path / name) for name in NAMES[:3]]
    whole = Checkpoint(tmp_path / "dense")
    assert whole.names == one[0].names == Checkpoint(made["seed"]).names
    for name in whole.names:
        expected = sum(checkpoint.get(name).double() for checkpoint in one) / 3
        torch.testing.assert_close(whole.get(name).double(), expected, atol=1e-6, rtol=1e-6)


def test_the_merge_of_a_fresh_mixture_is_the_soup(sources, tmp_path):
    made = sources("gpt_neox")
    (tmp_path / "soup").mkdir()
    write_merged(made["seed"], {name: made[name] for name in NAMES[1:3]}, tmp_path / "soup")
    upcycle.to_dense(assembled(made, tmp_path / "moe", **CHOICES["bam"]), tmp_path / "dense")
    soup, dense = Checkpoint(tmp_path / "soup"), Checkpoint(tmp_path / "dense")
    assert soup.names == dense.names and all(torch.equal(soup.get(name), dense.get(name)) for name in soup.names)
    assert {key: value for key, value in soup.config.items() if soup.config != dense.config} == {}


def test_a_dense_model_keeps_dtype_tokenizer_and_nothing_of_the_mixture(sources, tmp_path):
    made = sources("llama")
    moe = assembled(made, tmp_path / "moe", dtype="bfloat16")
    (moe / "tokenizer_config.json").write_text("{}")
    upcycle.to_dense(moe, tmp_path / "dense", expert="law")
    found = Checkpoint(tmp_path / "dense")
    assert {found.stored_dtype(name) for name in found.names} == {"BF16"} and found.config["dtype"] == "bfloat16"
    assert {path.name for path in (tmp_path / "dense").iterdir()} <= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    assert found.config["architectures"] == ["LlamaForCausalLM"] and "experts" not in found.config
    law = Checkpoint(made["law"])
    for name in law.names:
        if ".mlp." in name:
            assert torch.equal(found.get(name), law.get(name).bfloat16())


# ---------------------------------------------------------------------------------------------- records, mistakes, crashes


def test_explain_tells_what_came_from_where_after_edits(sources, tmp_path):
    made = sources("llama")
    moe = assembled(made, tmp_path / "moe", **CHOICES["bam_shared_kv"])
    stage = {"stage": "mix/bam", "key": "0123abcd" * 8, "function": "train_model", "inputs": {}}
    (moe / "stage.json").write_text(json.dumps(stage))
    upcycle.add_expert(moe, made["math"], tmp_path / "more", "math", router_row="law")
    upcycle.remove_expert(tmp_path / "more", "law", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    found = explain(tmp_path / "out")
    assert found.experts == ["seed", "code", "math"] and found.parameters is not None
    assert found.notes == [
        "edited: expert math was added (first rows in the routers: law); trained before that (stage mix/bam-0123abcd), which "
        "no origin here shows",
        "edited: expert law was taken out",
    ]
    rows = {row.target: row for row in found.tensors}
    math = Checkpoint(made["math"])
    for name, row in rows.items():
        if row.origin == "stacked":
            assert row.experts == ["seed", "code", "math"], name
            assert row.files["math"] == [math.files[source] for source in row.sources]
        elif row.origin == "averaged":  # law's part in the average is still there
            assert row.experts == ["seed", "code", "law"] and len(row.files) == 3, name
    words = " ".join(str(found).split())
    assert "self_attn.k_proj.weight model.layers.*.self_attn.k_proj.weight, of 3 models" in words
    assert found.proof and set(found.proof["one_hot_errors"]) == {"seed", "code", "math"}


def test_norms_that_each_expert_has_of_its_own_move_with_it(sources, tmp_path):
    """OLMo-2 has one norm for queries and one for keys; in BAM they are copied, one an expert, and numbered."""
    made = sources("family/olmo2")
    moe = assembled(made, tmp_path / "moe", NAMES[1:], **CHOICES["bam"])
    upcycle.remove_expert(moe, "code", tmp_path / "out")
    rows = {row["target"]: row for row in json.loads((tmp_path / "out" / "assembly.json").read_text())["tensors"]}
    found = Checkpoint(tmp_path / "out")
    for index, name in enumerate(("seed", "law", "math")):
        target = f"model.decoder.layers.1.self_attn.q_norm.norms.{index}.weight"
        assert torch.equal(found.get(target), Checkpoint(made[name]).get("model.layers.1.self_attn.q_norm.weight"))
        assert list(rows[target]["sha256"]) == [name]
    assert not [name for name in found.names if ".norms.3." in name] and set(rows) == set(found.names)


def test_the_proof_of_assembly_holds_for_experts_that_joined_later(sources, tmp_path):
    """Hashes in assembly.json are those of the branch: what `proof.prove` compares with the stacked tensors."""
    for kind in ("llama", "family/gpt2", "family/olmo2"):
        made = sources(kind)
        moe = assembled(made, tmp_path / kind / "moe", **CHOICES["bam"])
        upcycle.add_expert(moe, made["math"], tmp_path / kind / "out", "math")
        mixture, config = Checkpoint(tmp_path / kind / "out"), loaded(tmp_path / kind / "out").config
        pieces = plan_pieces(config, Checkpoint(made["math"]).names)
        stacked = [piece for piece in pieces if piece.origin == "stacked"]
        copied = [piece for piece in pieces if piece.origin == "copied"]
        checkpoints = {name: Checkpoint(made[name]) for name in config.experts}
        count = _check_hashes(mixture, pieces, placed_whole(config), checkpoints)
        assert count == 4 * sum(len(piece.sources) for piece in stacked) + len(copied)
        proof = prove(tmp_path / kind / "out", {name: made[name] for name in config.experts})
        assert proof["expert_tensors_hashed"] == count and max(proof["one_hot_errors"].values()) < 1e-5


def test_a_mixture_without_a_record_says_so(sources, tmp_path):
    made = sources("llama")
    moe = assembled(made, tmp_path / "moe")
    (moe / "assembly.json").unlink()
    edited = upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    assert (
        edited.notes[0].startswith("the mixture has no assembly.json") and not (tmp_path / "out/assembly.json").exists()
    )


def test_top_k_is_lowered_to_the_experts_left_and_said(sources, tmp_path):
    made = sources("llama")
    both = {"router": RouterConfig(top_k=3), "attention": "mixture", "attention_router": RouterConfig(top_k=3)}
    moe = assembled(made, tmp_path / "moe", **both)
    edited = upcycle.remove_expert(moe, "code", tmp_path / "out")
    assert edited.notes == (
        "top_k of the ffn routers is lowered from 3 to 2: a token cannot have more",
        "top_k of the attention routers is lowered from 3 to 2: a token cannot have more",
    )
    config = loaded(tmp_path / "out").config
    assert config.num_experts_per_tok == config.attention_router["top_k"] == 2
    fields = json.loads((moe / "config.json").read_text())
    fields |= {"expert_sources": ["seed", "code", "code"], "one_per_source": True, "num_experts_per_tok": 2}
    fields["attention_router"]["top_k"] = 2
    (moe / "config.json").write_text(json.dumps(fields))
    edited = upcycle.remove_expert(moe, "seed", tmp_path / "one")
    assert edited.notes[0].startswith(
        "top_k of the ffn routers is lowered from 2 to 1: a token cannot have more; the gate is"
    )


def test_what_fewer_experts_make_meaningless_is_switched_off_and_said(sources, tmp_path):
    made = sources("llama")
    losses = LossesConfig(balance="switch", balance_coefficient=0.01)
    moe = assembled(made, tmp_path / "moe", router=RouterConfig(top_k=2, losses=losses))
    edited = upcycle.remove_expert(moe, "code", tmp_path / "two")
    assert edited.notes[0].startswith("the switch balance of the ffn routers is switched off")
    config = loaded(tmp_path / "two").config
    assert (config.balance, config.balance_coefficient, config.num_experts_per_tok) == ("none", 0.0, 2)
    placement = PlacementConfig(experts=("seed", "code", "law", "law"), one_per_domain=True)
    moe = assembled(made, tmp_path / "copies", router=RouterConfig(top_k=3), placement=placement)
    few = upcycle.remove_expert(moe, "seed", tmp_path / "few")
    few = upcycle.remove_expert(few.path, "code", tmp_path / "fewer")
    assert few.notes[0].endswith("the gate is then the constant 1, and training teaches these routers nothing")


def test_a_copy_that_is_left_keeps_its_files_in_the_record(sources, tmp_path):
    made = sources("llama")
    placement = PlacementConfig(experts=("seed", "code", "code", "law"))
    moe = assembled(made, tmp_path / "moe", placement=placement)
    upcycle.remove_expert(moe, "code", tmp_path / "out")
    rows = [row for row in explain(tmp_path / "out").tensors if row.origin == "stacked"]
    assert rows and all(row.experts == ["seed", "code:2", "law"] and row.files["code"] for row in rows)


def _moe(sources, tmp_path, **choices):
    return assembled(sources("llama"), tmp_path / "moe", **choices)


def test_wrong_arguments_are_explained(sources, tmp_path):
    made, moe, out = sources("llama"), _moe(sources, tmp_path), tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    cases = {
        f"out={full} exists already and is not an empty directory; name one that is, or a new one": lambda: (
            upcycle.add_expert(moe, made["math"], full, "math")
        ),
        f"{made['law']}: model_type is 'llama', expected 'upcycled'; only a mixture that `upcycle` assembled or trained can be "
        "edited": lambda: upcycle.remove_expert(made["law"], "law", out),
        "name='law': expected one that is none of seed, code, law; choose another": lambda: upcycle.add_expert(
            moe, made["math"], out, "law"
        ),
        "router_row='means' is not known; expected one of mean, zeros, normal, or an expert whose row is copied (seed, code, "
        "law); did you mean mean?": lambda: upcycle.add_expert(moe, made["math"], out, "math", router_row="means"),
        "expert 'laws' is not in the mixture, expected one of seed, code, law; did you mean law?": lambda: (
            upcycle.remove_expert(moe, "laws", out)
        ),
        "expert 'math' is not in the mixture, expected one of seed, code, law.": lambda: upcycle.to_dense(
            moe, out, expert="math"
        ),
        "merge='averag' is not known; expected one of average, weighted; did you mean average?": lambda: (
            upcycle.to_dense(moe, out, merge="averag")
        ),
    }
    for message, attempt in cases.items():
        with pytest.raises(ValueError) as error:
            attempt()
        assert str(error.value) == message
    two = tmp_path / "two"
    upcycle.remove_expert(moe, "code", two)
    with pytest.raises(ValueError, match=r"has 2 experts \(seed, law\), and one alone is no mixture; .*to_dense"):
        upcycle.remove_expert(two, "law", out)
    assert not out.exists()


def test_a_branch_of_another_model_is_refused(sources, tmp_path):
    moe, out = _moe(sources, tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"branch 'math' .*: model_type is 'gpt_neox', expected the seed's 'llama'"):
        upcycle.add_expert(moe, sources("gpt_neox")["math"], out, "math")
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, expected the seed's False"):
        upcycle.add_expert(moe, sources("llama_tied")["math"], out, "math")
    deeper = dense_models("llama", 1, dtype=torch.float32, num_hidden_layers=3)[0]
    deeper.save_pretrained(tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"num_hidden_layers is 3, expected the seed's 2.*trained from this seed"):
        upcycle.add_expert(moe, tmp_path / "deeper", out, "math")
    math = shutil.copytree(sources("llama")["math"], tmp_path / "math")
    (math / "tokenizer.json").write_text('{"a": 1}')
    (moe / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(ValueError, match="tokenizer.json differs; experts must read the same tokens"):
        upcycle.add_expert(moe, math, out, "math")
    (moe / "tokenizer.json").unlink()
    for value, why in ((float("nan"), "are not finite"), (3e38, None)):
        name = "model.layers.1.mlp.up_proj.weight"
        shard = math / Checkpoint(math).files[name]
        tensors = load_file(shard)
        tensors[name][2, 3] = value
        save_file(tensors, shard, metadata={"format": "pt"})
        if why:
            with pytest.raises(ValueError, match=rf"{name} holds values that {why}"):
                upcycle.add_expert(moe, math, out, "math")
    half = assembled(sources("llama"), tmp_path / "half", dtype="float16")
    with pytest.raises(ValueError, match=r"holds values that are more than the mixture's float16 can hold"):
        upcycle.add_expert(half, math, out, "math")
    assert not out.exists()


def test_layouts_that_are_not_known_are_refused(sources, tmp_path, monkeypatch):
    made, moe = sources("llama"), _moe(sources, tmp_path)
    fields = json.loads((moe / "config.json").read_text())
    (moe / "config.json").write_text(json.dumps(fields | {"kv": "shared", "attention": "mixture"}))
    with pytest.raises(ValueError, match=r"moe: model.decoder.layers.0.self_attn.\S+ has shape .* such tensors in all"):
        upcycle.remove_expert(moe, "law", tmp_path / "out")
    (moe / "config.json").write_text(json.dumps(fields | {"gate_scale": "sum_to_one"}))
    monkeypatch.setattr(editing, "KNOWN", editing.KNOWN - {"gate_scale"})
    edit = (
        lambda: upcycle.add_expert(moe, made["math"], tmp_path / "out", "math"),
        lambda: upcycle.remove_expert(moe, "law", tmp_path / "out"),
        lambda: upcycle.to_dense(moe, tmp_path / "out"),
    )
    for attempt in edit:
        with pytest.raises(
            ValueError, match="gate_scale='sum_to_one', and editing knows no mixture with that, expected 'none'"
        ):
            attempt()
    assert not (tmp_path / "out").exists()


def test_an_expert_that_first_segments_go_to_stays(sources, tmp_path):
    moe = _moe(sources, tmp_path, router=RouterConfig(pool=PoolConfig(per="segment", tokens=4)))
    with pytest.raises(
        ValueError, match=r"name='seed': the ffn routers decide per segment, and the first one goes to the"
    ):
        upcycle.remove_expert(moe, "seed", tmp_path / "out")
    upcycle.remove_expert(moe, "code", tmp_path / "out")


@pytest.mark.parametrize("moment", ["tensor", "shard", "config", "proof"])
def test_a_crash_leaves_nothing_that_looks_finished(sources, tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    def killed(*_args, **_kwargs):
        raise Killed

    made, moe = sources("llama"), _moe(sources, tmp_path, attention="mixture")
    if moment == "tensor":
        monkeypatch.setattr(edits, "_new_row", killed)
        monkeypatch.setattr(dense, "_merged", killed)
    elif moment == "shard":
        monkeypatch.setattr(CheckpointWriter, "close", killed)
    elif moment == "config":
        monkeypatch.setattr(UpcycledConfig, "save_pretrained", killed)
        monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", killed)
    else:
        monkeypatch.setattr(editing, "forced_logits", killed)
        monkeypatch.setattr(dense, "forced_logits", killed)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Killed):
        upcycle.add_expert(moe, made["math"], tmp_path / "out", "math", max_shard_bytes=30_000)
    with pytest.raises(Killed):
        upcycle.to_dense(moe, tmp_path / "out", expert="law", max_shard_bytes=30_000)
    if moment != "tensor":
        with pytest.raises(Killed):
            upcycle.remove_expert(moe, "law", tmp_path / "out", max_shard_bytes=30_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_wrong_edit_never_appears(sources, tmp_path, monkeypatch):
    """Planted faults: experts that change places, a branch's part that is another's, a dense model of the wrong expert."""
    made, moe = sources("gpt_neox"), assembled(sources("gpt_neox"), tmp_path / "moe", attention="mixture")
    own = edits._own
    monkeypatch.setattr(edits, "_own", lambda *args: [tensor.flip(0) for tensor in own(*args)])
    with pytest.raises(
        ValueError, match=r"forced to expert 'math' the edited mixture's logits differ by .* nothing was"
    ):
        upcycle.add_expert(moe, made["math"], tmp_path / "out", "math")
    tensors = editing.edited_tensors

    def swapped(*args):
        for name, tensor in tensors(*args):
            yield name, tensor.flip(0) if name.endswith("experts.down_proj") else tensor

    monkeypatch.setattr(editing, "edited_tensors", swapped)
    with pytest.raises(ValueError, match=r"forced to expert 'seed' the edited mixture's logits differ"):
        upcycle.remove_expert(moe, "law", tmp_path / "out")
    monkeypatch.setattr(editing, "edited_tensors", lambda *args: list(tensors(*args))[1:])
    with pytest.raises(ValueError, match=r"is missing \(1 such tensors in all"):
        upcycle.remove_expert(moe, "law", tmp_path / "out")
    parts = dense._parts
    monkeypatch.setattr(dense, "_parts", lambda mixture, piece, experts: parts(mixture, piece, [0]))
    with pytest.raises(
        ValueError, match=r"as a dense model its logits differ from those of the mixture forced to that"
    ):
        upcycle.to_dense(moe, tmp_path / "out", expert="law")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


def test_the_words_add_remove_and_dense(sources, tmp_path, capsys):
    made, moe = sources("llama"), _moe(sources, tmp_path, **CHOICES["bam"])
    more, less, dense = (str(tmp_path / name) for name in ("more", "less", "dense"))
    assert WORDS["add"]([str(moe), str(made["math"]), more, "--name=math"]) == 0
    first, note = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{more}: experts seed, code, law, math; each expert alone gives its logits within ")
    assert note.startswith("note: a mean row never has the largest logit")
    assert (
        WORDS["add"]([str(moe), str(made["math"]), str(tmp_path / "z"), "--name=m", "--router-row=zeros", "--no-proof"])
        == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'z'}: experts seed, code, law, m\n"
    assert not (tmp_path / "z" / "proof.json").exists()
    assert WORDS["remove"]([more, "code", less]) == 0
    assert capsys.readouterr().out.startswith(
        f"{less}: experts seed, law, math; each expert alone gives its logits within "
    )
    assert WORDS["dense"]([less, dense, "--expert=math"]) == 0
    assert capsys.readouterr().out.startswith(
        f"{dense}: dense, expert math; logits equal the mixture's, forced to that"
    )
    assert WORDS["dense"]([less, str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}: dense, average of seed, law, math\n"
    assert WORDS["dense"]([less, str(tmp_path / "x"), "--expert=code"]) == 2
    assert capsys.readouterr().err == "upcycle: expert 'code' is not in the mixture, expected one of seed, law, math.\n"
    for word, arguments, expected in (
        ("add", [more], "DIR BRANCH OUT --name=NAME [--router-row=mean|zeros|normal|EXPERT] [--no-proof]"),
        (
            "add",
            [more, more, more, "--name"],
            "DIR BRANCH OUT --name=NAME [--router-row=mean|zeros|normal|EXPERT] [--no-proof]",
        ),
        ("remove", [more, "law", less, "--no-proof=1"], "DIR NAME OUT [--no-proof]"),
        (
            "dense",
            [less, dense, "--expert=law", "--merge=average"],
            "DIR OUT [--expert=NAME | --merge=average] [--no-proof]",
        ),
    ):
        assert WORDS[word](arguments) == 2
        assert capsys.readouterr().err == f"upcycle: {word}: got {' '.join(arguments)}, expected {expected}\n"


def test_an_edited_mixture_is_exported_like_any_other(sources, tmp_path):
    plain = dense_models("llama", 4, dtype=torch.float32, attention_bias=False)
    for name, model in zip(NAMES, plain, strict=True):
        model.save_pretrained(tmp_path / name)
    made = {name: tmp_path / name for name in NAMES}
    upcycle.add_expert(assembled(made, tmp_path / "moe"), made["math"], tmp_path / "more", "math")
    exported = upcycle.export(tmp_path / "more", tmp_path / "native")
    assert exported.format == "mixtral" and exported.difference < 1e-5
    upcycle.export(tmp_path / "more", tmp_path / "bundle", format="remote_code")
    for out in ("native", "bundle"):
        card = (tmp_path / out / "README.md").read_text()
        assert "| experts, in order | seed, code, law, math |" in card and "not recorded" not in card
