"""The first weights of routers: what is drawn, what the texts say, and which texts are read."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import upcycle
from tests import reference
from tests.domains import write_tokens
from tests.tiny import VOCAB, dense_models, mixture_of, tokens
from upcycle import text_rows
from upcycle.assembly import write_mixture
from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.explain import explain
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.proof import prove
from upcycle.router import Router, RoutingTrace
from upcycle.router_config import InitConfig, PoolConfig, RouterConfig
from upcycle.router_init import drawn_rows, rows_towards
from upcycle.text_rows import domain_texts, texts_of_routers, write_text_rows

NAMES = ("seed", "code", "law")
MIXTURES = [("merged", "expert"), ("mixture", "expert"), ("mixture", "shared")]
TEXT_KINDS = ("prompt_embedding", "hidden_mean", "hidden_last", "domain_centroid")
# Of different lengths, so that one batch of them has padding.
IDS = {
    "seed": [[5, 9, 33, 12], [44, 8]],
    "code": [[17, 4, 60, 21, 9, 50, 3], [30], [12, 12, 58]],
    "law": [[25, 26, 27, 28, 29], [7, 41, 19]],
}
PROMPTS = {name: tuple(" ".join(f"w{i}" for i in ids) for ids in texts) for name, texts in IDS.items()}
# The mixture runs in fp32, its twin in float64; rows have entries of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def write_tokenizer(directory):
    """The word w17 is the token 17; special tokens that a text must not get: w0 to w2."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    words.post_processor = start  # which no prompt must get
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(directory)


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def sources(request, tmp_path_factory):
    """Three dense models of one family with a tokenizer."""
    root = tmp_path_factory.mktemp(request.param)
    for name, model in zip(NAMES, dense_models(request.param, 3, dtype=torch.float32), strict=True):
        model.save_pretrained(root / name)
        write_tokenizer(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {name: write_tokens(root / name, rng_seed=n) for n, name in enumerate(("general", "code", "law"))}


def init_of(kind, **more):
    prompts = {} if kind == "domain_centroid" or kind not in TEXT_KINDS else PROMPTS
    read = {} if kind == "zeros" else {"std": 1.0}
    return InitConfig(kind=kind, prompts=prompts, **read | (more if kind == "domain_centroid" else {}))


def both(kind, attention="merged", kv="expert", **more):
    """Settings in which every router starts from `kind`; more: of domain_centroid."""
    init = init_of(kind, **more)
    wide = {"attention_router": RouterConfig(kind="soft", top_k=1, init=init)} if attention == "mixture" else {}
    return AssembleConfig(router=RouterConfig(init=init), attention=attention, kv=kv, **wide)


def assemble(sources, out, choice, data=None, order=NAMES[1:]):
    out.mkdir()
    write_mixture(sources["seed"], {name: sources[name] for name in order}, out, choice, data=data)
    return rows_in(out)


def rows_in(directory):
    found = Checkpoint(directory)
    return {name: found.get(name) for name in found.names if name.endswith("router.weight")}


def places(directory):
    """The place ("ffn" | "attention", layer) of each router weight."""
    model = UpcycledForCausalLM.from_pretrained(directory)
    routers = {f"{name}.weight": module.name for name, module in model.named_modules() if isinstance(module, Router)}
    return {name: (place.split(".")[0], int(place.split(".")[1])) for name, place in routers.items()}


def twin_of(sources, attention, kv):
    dense = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in sources.values()]
    unused = [torch.zeros(3, 32)] * 2
    return reference.ReferenceMixture(dense, unused, "topk_softmax", 2, "none", attention, kv, unused)


# -------------------------------------------------------------------------------------------------------------- drawn


def test_zeros_route_every_token_alike(sources, tmp_path):
    assemble(sources, tmp_path / "moe", both("zeros"))
    trace = RoutingTrace()
    UpcycledForCausalLM.from_pretrained(tmp_path / "moe").eval()(tokens(), trace=trace)
    assert all(torch.all(routing.gates == 0.5) for routing in trace.of("ffn"))


def test_orthogonal_rows_are_at_right_angles_and_as_long_as_a_normal_draw():
    init = InitConfig(kind="orthogonal", std=0.02)
    rows = drawn_rows((4, 4096), "x", init, 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4) * 0.02**2 * 4096)
    normal = drawn_rows((4, 4096), "x", InitConfig(std=0.02), 1)
    assert rows.norm(dim=1).mean() == pytest.approx(normal.norm(dim=1).mean().item(), rel=0.02)
    assert torch.equal(rows, drawn_rows((4, 4096), "x", init, 1))
    assert not torch.allclose(rows, drawn_rows((4, 4096), "y", init, 1))
    assert not torch.allclose(rows, drawn_rows((4, 4096), "x", init, 2))


def test_orthogonal_frames_are_uniform():
    """No direction is preferred: over many names the entries have mean 0 and the same size."""
    init = InitConfig(kind="orthogonal", std=1.0)
    rows = torch.stack([drawn_rows((2, 4), str(name), init, 1) for name in range(4000)])
    assert rows.mean(0).abs().max() < 0.06 and (rows.pow(2).mean(0) - 1).abs().max() < 0.1


def test_more_orthogonal_rows_than_dimensions_are_refused():
    with pytest.raises(ValueError, match="9 experts cannot have rows at right angles in a hidden size of 8"):
        drawn_rows((9, 8), "x", InitConfig(kind="orthogonal"), 1)


# --------------------------------------------------------------------------------------------------- means -> rows


def test_rows_equal_the_twin():
    means = torch.randn(5, 16) * torch.tensor([1.0, 3, 0.1, 8, 2])[:, None] + 4 * torch.randn(16)
    expected = torch.stack(reference.rows_towards(list(means.double()), 0.3))
    torch.testing.assert_close(rows_towards(means, 0.3), expected.float())


@pytest.mark.parametrize("rng_seed", range(20))
def test_each_mean_has_its_largest_logit_at_home_and_the_mean_token_none(rng_seed):
    """Whatever the geometry: sources of very different sizes around a large common part."""
    generator = torch.Generator().manual_seed(rng_seed)
    sizes = torch.tensor([0.1, 1.0, 10.0, 3.0])[:, None]
    means = 50 * torch.randn(12, generator=generator) + sizes * torch.randn(4, 12, generator=generator)
    means = means.double()
    rows = rows_towards(means, 0.02).double()
    assert torch.equal((means @ rows.T).argmax(1), torch.arange(4))
    assert (rows @ means.mean(0)).abs().max() < 1e-4
    torch.testing.assert_close(rows.norm(dim=1), torch.full((4,), 0.02 * math.sqrt(12), dtype=torch.float64))


def test_what_rows_share_changes_no_gate():
    rows, hidden, shared = torch.randn(4, 8).double(), torch.randn(9, 8).double(), torch.randn(8).double()
    torch.testing.assert_close((hidden @ (rows - shared).T).softmax(-1), (hidden @ rows.T).softmax(-1))


def test_a_mean_without_a_direction_gets_zeros():
    axis = torch.eye(3)
    assert not rows_towards(torch.stack([axis[0]] * 3), 1.0).any()
    rows = rows_towards(torch.stack([axis[0] + axis[1], axis[0] - axis[1], axis[0]]), 1.0)
    assert rows[:2].any(1).all() and not rows[2].any()


# ----------------------------------------------------------------------------------------------- texts -> mean -> rows


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_rows_from_texts_equal_the_twin(sources, data, tmp_path, kind, attention, kv):
    """Every router of every layer, from the input it really sees: after its own norm, which in GPT-NeoX's parallel layers
    is another for the attention than for the feed-forward."""
    choice = both(kind, attention, kv, tokens=60)
    rows = assemble(sources, tmp_path / "moe", choice, data if kind == "domain_centroid" else None)
    texts = IDS
    if kind == "domain_centroid":
        texts = {name: [one.tolist() for one in domain_texts(data[name], 60).ids] for name in ("code", "law")}
        texts = {"seed": [one.tolist() for one in domain_texts(data["general"], 60).ids]} | texts
    twin, found = twin_of(sources, attention, kv), places(tmp_path / "moe")
    assert len(rows) == (4 if attention == "mixture" else 2)
    for name, row in rows.items():
        means = [reference.mean_seen(twin, texts[n], e, found[name], kind) for e, n in enumerate(NAMES)]
        expected = torch.stack(reference.rows_towards(means, 1.0))
        torch.testing.assert_close(row.double(), expected, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
    prove(tmp_path / "moe", sources)


def test_routers_of_one_layer_see_different_things(sources, tmp_path):
    """So that the test before this one would notice a router that got the other's input."""
    rows = assemble(sources, tmp_path / "moe", both("hidden_mean", "mixture"))
    by_place = {place: rows[name] for name, place in places(tmp_path / "moe").items()}
    assert len(by_place) == 4
    for layer in (0, 1):
        assert (by_place["ffn", layer] - by_place["attention", layer]).abs().max() > 0.1
    for part in ("ffn", "attention"):
        assert (by_place[part, 0] - by_place[part, 1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["hidden_mean", "hidden_last"])
def test_batches_and_padding_change_nothing(sources, tmp_path, monkeypatch, kind):
    together = assemble(sources, tmp_path / "together", both(kind, "mixture"))
    monkeypatch.setattr(text_rows, "BATCH_TEXTS", 1)
    alone = assemble(sources, tmp_path / "alone", both(kind, "mixture"))
    for name, rows in alone.items():
        torch.testing.assert_close(together[name], rows, **CLOSE)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_the_order_of_experts_permutes_the_rows(sources, data, tmp_path, kind):
    given = data if kind == "domain_centroid" else None
    first = assemble(sources, tmp_path / "first", both(kind, "mixture"), given)
    second = assemble(sources, tmp_path / "second", both(kind, "mixture"), given, order=("law", "code"))
    for name, rows in first.items():
        torch.testing.assert_close(second[name], rows[[0, 2, 1]], **CLOSE)


def test_the_same_settings_give_the_same_bits(sources, data, tmp_path):
    for kind in (*TEXT_KINDS, "orthogonal"):
        one, two = (assemble(sources, tmp_path / f"{kind}{n}", both(kind, "mixture"), data) for n in (1, 2))
        assert all(torch.equal(one[name], two[name]) for name in one), kind


def test_parts_may_start_in_different_ways(sources, data, tmp_path):
    centroid, mean = both("domain_centroid", "mixture"), both("hidden_mean", "mixture")
    choice = AssembleConfig(
        router=RouterConfig(init=init_of("hidden_mean")), attention="mixture",
        attention_router=RouterConfig(kind="soft", top_k=1, init=init_of("domain_centroid")),
    )  # fmt: skip
    mixed = assemble(sources, tmp_path / "mixed", choice, data)
    for name, place in places(tmp_path / "mixed").items():
        alike = mean if place[0] == "ffn" else centroid
        if not (tmp_path / place[0]).exists():
            assemble(sources, tmp_path / place[0], alike, data)
        assert torch.equal(mixed[name], rows_in(tmp_path / place[0])[name])


def test_small_shards_half_precision_and_untrained_routers_keep_everything_else(sources, tmp_path):
    init = init_of("hidden_mean")
    for name, settings in {"text": init, "drawn": InitConfig()}.items():
        choice = AssembleConfig(
            router=RouterConfig(init=settings, trained=False), dtype="bfloat16", max_shard_bytes=20_000
        )
        assemble(sources, tmp_path / name, choice)
    text, drawn = Checkpoint(tmp_path / "text"), Checkpoint(tmp_path / "drawn")
    assert len(set(text.files.values())) > 2 and text.files == drawn.files
    for name in text.names:
        assert torch.equal(text.get(name), drawn.get(name)) == ("router" not in name)
    prove(tmp_path / "text", sources)


@pytest.mark.parametrize("tie", ["layers", "sublayers", "skip"])
def test_tied_routers_have_rows_where_they_have_weights(sources, tmp_path, tie):
    init, plain = init_of("hidden_mean"), InitConfig()
    choice = AssembleConfig(
        router=RouterConfig(init=plain if tie == "sublayers" else init), attention="mixture", tie=tie,
        attention_router=RouterConfig(kind="soft", top_k=1, init=init),
    )  # fmt: skip
    rows = assemble(sources, tmp_path / "moe", choice)
    untied = assemble(sources, tmp_path / "untied", both("hidden_mean", "mixture"))
    assert len(rows) == {"layers": 2, "sublayers": 2, "skip": 4}[tie]
    assert all(torch.equal(rows[name], untied[name]) for name in rows)
    prove(tmp_path / "moe", sources)


@pytest.mark.parametrize("kind", ["hash", "uniform", "oracle"])
def test_routers_without_weights_need_no_rows(sources, tmp_path, kind):
    attention = RouterConfig(kind="soft", top_k=1, init=init_of("hidden_last"))
    choice = AssembleConfig(router=RouterConfig(kind=kind, top_k=1), attention="mixture", attention_router=attention)
    rows = assemble(sources, tmp_path / "moe", choice)
    assert len(rows) == 2 and all(row.any() for row in rows.values())


@pytest.mark.parametrize("router", [
    RouterConfig(kind="expert_choice", top_k=1, init=init_of("hidden_mean")),
    RouterConfig(kind="sample_top1", top_k=1, gate_order="softmax_topk", init=init_of("hidden_mean")),
    RouterConfig(kind="top_k", pool=PoolConfig(per="segment", tokens=2), init=init_of("hidden_mean")),
    RouterConfig(bias_rate=0.1, init=init_of("hidden_mean")),
])  # fmt: skip
def test_the_kind_of_router_changes_no_row(sources, tmp_path, router):
    """Everything is forced while the texts are read."""
    plain = assemble(sources, tmp_path / "plain", both("hidden_mean"))
    ours = assemble(sources, tmp_path / "ours", AssembleConfig(router=router))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_experts_of_one_source_get_one_row(tmp_path):
    """The states are those of the source's first expert; sources count once each in the mean."""
    dense = dense_models("llama", 3, dtype=torch.float32)
    three = mixture_of([*dense[:2], dense[1]], expert_sources=["seed", "code", "code"])
    two = mixture_of(dense[:2], expert_sources=["seed", "code"])
    # The same merged rest in both.
    two.load_state_dict(
        {n: t for n, t in three.state_dict().items() if "router" not in n and "experts" not in n}, strict=False
    )
    choice, rows = both("hidden_mean"), {}
    for name, mixture in {"two": two, "three": three}.items():
        mixture.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
        texts = texts_of_routers(mixture.config, choice, tmp_path / name, {})
        write_text_rows(tmp_path / name, choice, texts)
        rows[name] = rows_in(tmp_path / name)
    for name, found in rows["three"].items():
        assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
        torch.testing.assert_close(found[:2], rows["two"][name], **CLOSE)


# --------------------------------------------------------------------------------------------------- which texts


def test_a_domains_texts_are_its_training_split_spread_out_and_never_twice(tmp_path):
    write_tokens(tmp_path / "code")
    stream = np.arange(1000, dtype=np.uint16)
    for split in ("train", "valid", "test"):
        np.save(tmp_path / "code" / f"{split}.tokens.npy", stream if split == "train" else stream[:0] + 7)
    for wanted, window in ((250, 100), (1000, 64), (3000, 64), (1, 512), (999, 333)):
        texts = domain_texts(tmp_path / "code", wanted, window)
        together = np.concatenate(texts.ids)
        count = min(wanted, 1000)
        assert len(together) == count == texts.said["tokens"] == len(set(together.tolist()))
        assert max(map(len, texts.ids)) <= window and np.all(np.diff(together.astype(int)) > 0)
        assert sum(weight.sum() for weight in texts.weights) == pytest.approx(1)
        assert len({weight for weights in texts.weights for weight in weights}) == 1
        if wanted == 250:  # from one end to the other
            assert together[0] == 0 and together[-1] == 999


def test_what_the_routers_read_is_on_record(sources, data, tmp_path):
    choice = AssembleConfig(
        router=RouterConfig(init=init_of("domain_centroid", tokens=60)), attention="mixture",
        attention_router=RouterConfig(kind="soft", top_k=1, init=init_of("hidden_mean")),
    )  # fmt: skip
    assemble(sources, tmp_path / "moe", choice, data)
    record = json.loads((tmp_path / "moe" / "assembly.json").read_text())["router_init"]
    texts = record["router"]["texts"]
    assert {source: (one["domain"], one["split"], one["tokens"]) for source, one in texts.items()} == {
        "seed": ("general", "train", 60), "code": ("code", "train", 60), "law": ("law", "train", 60),
    }  # fmt: skip
    assert record["attention_router"]["texts"]["code"] == {"prompts": list(PROMPTS["code"]), "tokens": 11}


def test_validation_and_test_text_shape_no_row(sources, data, tmp_path):
    first = assemble(sources, tmp_path / "first", both("domain_centroid"), data)
    spoilt = {name: shutil.copytree(path, tmp_path / name) for name, path in data.items()}
    for path in spoilt.values():
        for split in ("valid", "test"):
            for file in path.glob(f"{split}.*"):
                file.write_bytes(b"no array")
    second = assemble(sources, tmp_path / "second", both("domain_centroid"), spoilt)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_seed_without_a_domain_has_the_logit_of_the_mean_token(sources, data, tmp_path):
    given = {name: data[name] for name in ("code", "law")}
    rows = assemble(sources, tmp_path / "moe", both("domain_centroid"), given)
    assert all(not row[0].any() and row[1:].any(1).all() for row in rows.values())


# ----------------------------------------------------------------------------------------------------- it routes


@pytest.mark.parametrize("with_general", [True, False])
def test_centroids_send_each_domains_text_to_its_expert(tmp_path, with_general):
    """Domains of disjoint tokens, whose embeddings lie around a direction of each domain: a case in which it must hold.

    On text that the routers were not made from, in every layer, the own expert wins most tokens; drawn rows do not.
    """
    edges = {"general": (3, 20), "code": (20, 40), "law": (40, VOCAB)}
    tokens_of = {n: write_tokens(tmp_path / n, 60, rng_seed, *e) for rng_seed, (n, e) in enumerate(edges.items())}
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(3, 32, generator=generator)
    paths = {}
    for name, model in zip(NAMES, dense_models("llama", 3, dtype=torch.float32), strict=True):
        with torch.no_grad():
            for direction, (low, high) in zip(directions, edges.values(), strict=True):
                model.model.embed_tokens.weight[low:high] += 2 * direction
        model.save_pretrained(tmp_path / "models" / name)
        paths[name] = tmp_path / "models" / name
    if not with_general:
        del tokens_of["general"]
    expected = {"general": 0, "code": 1, "law": 2}

    def share_of_own(choice, out):
        """Over layers and domains the smallest share of tokens whose largest logit is their own expert's."""
        assemble(paths, out, choice, tokens_of if choice.router.init.needs_text else None)
        model, shares = UpcycledForCausalLM.from_pretrained(out).eval(), []
        for domain, path in tokens_of.items():
            ids = torch.from_numpy(np.load(path / "test.tokens.npy")[:600].astype(np.int64)).view(-1, 30)
            trace = RoutingTrace()
            model(ids, trace=trace)
            shares += [
                (routing.logits.argmax(1) == expected[domain])[ids.flatten() > 2].float().mean().item()
                for part in model.config.parts
                for routing in trace.of(part)
            ]
        return min(shares)

    assert share_of_own(both("domain_centroid", "mixture", tokens=400), tmp_path / "centroid") > 0.8
    assert share_of_own(both("normal", "mixture"), tmp_path / "normal") < 0.5


# --------------------------------------------------------------------------------------- the seed's other weights


@pytest.mark.parametrize("include_seed", [True, False])
@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
def test_merge_seed_leaves_the_seeds_own_tensors(sources, tmp_path, attention, kv, include_seed):
    """The mixture forced to an expert is the seed with that expert's parts, which the proof compares; here every tensor that
    is no expert, to the bit."""
    choice = AssembleConfig(merge="seed", attention=attention, kv=kv, include_seed=include_seed)
    assemble(sources, tmp_path / "moe", choice)
    dense = [AutoModelForCausalLM.from_pretrained(sources[name]) for name in NAMES[not include_seed :]]
    seed = AutoModelForCausalLM.from_pretrained(sources["seed"]).state_dict()
    found = {row.target: row for row in explain(tmp_path / "moe").tensors}
    rest = [row for row in found.values() if row.origin == "the seed's"]
    ours = Checkpoint(tmp_path / "moe")
    whole = [row for row in rest if ours.shape(row.target) == tuple(seed[row.sources[0]].shape)]
    assert all(row.experts == ["seed"] and row.files.keys() == {"seed"} for row in rest)
    assert len(whole) >= 5 and all(torch.equal(ours.get(row.target), seed[row.sources[0]]) for row in whole)
    assert not any(row.origin == "averaged" for row in found.values()) and len(dense) == 2 + include_seed
    experts = {name: path for name, path in sources.items() if include_seed or name != "seed"}
    prove(tmp_path / "moe", experts | {"seed": sources["seed"]})


def test_proof_fails_when_the_rest_is_not_the_seeds(sources, tmp_path):
    assemble(sources, tmp_path / "moe", AssembleConfig(merge="seed"))
    path = tmp_path / "moe" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("norm.weight"))
    stored[name] = stored[name] + 1e-6
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm.weight is not the seed's own"):
        prove(tmp_path / "moe", sources)


@pytest.mark.parametrize("name", ["frankenmoe_random", "frankenmoe_embed", "frankenmoe_hidden"])
def test_frankenmoe_presets_work_for_the_demos_branches(tmp_path, name):
    """Seed, code, law and math: untrained routers, the seed's other weights, and prompts that need no setting."""
    from tests.test_bring_your_own import write_models

    write_models(tmp_path, max_position_embeddings=512)
    branches = {"code": tmp_path / "B", "law": tmp_path / "C", "math": tmp_path / "B"}
    planned = upcycle.assemble(seed=tmp_path / "A", branches=branches, method=name, dry_run=True)
    path = upcycle.assemble(seed=tmp_path / "A", branches=branches, out=tmp_path / "moe", method=name)
    assert [row.origin for row in planned.tensors] == [row.origin for row in explain(path).tensors]
    assert {row.origin for row in planned.tensors} == {"the seed's", "stacked", "fresh"}
    model = AutoModelForCausalLM.from_pretrained(path)
    assert not any("router" in name for name, _ in model.named_parameters()) and len(rows_in(path)) == 2
    norms = torch.stack([rows.norm(dim=1) for rows in rows_in(path).values()])
    assert norms.mean().item() == pytest.approx(0.02 * math.sqrt(32), rel=0.15)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("init", "given", "message"),
    [
        (InitConfig(kind="hidden_mean", prompts={"seed": ("w4",), "cod": ("w5",), "law": ("w6",)}), (),
         r"router\.init\.prompts has no texts of code, .*got those of seed, cod, law; .*did you mean cod"),
        (InitConfig(kind="hidden_mean", prompts={"code": ("w4",), "law": ("w5",)}), (),
         r"router\.init\.prompts has no texts of seed, "),
        (InitConfig(kind="hidden_mean", prompts=PROMPTS | {"law": ()}), (), r"has no texts of law, "),
        (InitConfig(kind="hidden_mean", prompts=PROMPTS | {"law": ("w7", "  ")}), (),
         r"router\.init\.prompts\.law: text 2 is empty"),
        (InitConfig(kind="hidden_last", prompts=PROMPTS | {"law": ("w7", "w8 " * 65)}), (),
         r"text 2 of law has 65 tokens, expected 1 to 64"),
        (InitConfig(kind="hidden_mean", prompts=dict.fromkeys(NAMES, ("w7 w9",))), (), None),
        (InitConfig(kind="prompt_embedding", prompts=dict.fromkeys(NAMES, ("w7 w9",))), (),
         r"router ffn\.0 the texts of seed look like those of all"),
        (InitConfig(kind="domain_centroid"), (), r"needs the training text of every branch's domain, got none: none is "
         r"called code, law"),
        (InitConfig(kind="domain_centroid"), ("general", "laws", "code"),
         r"got those of general, laws, code: none is called law; .*did you mean laws"),
    ],
)  # fmt: skip
def test_texts_that_are_missing_or_say_nothing_are_refused(sources, data, tmp_path, init, given, message):
    texts = {name: data["law" if name == "laws" else name] for name in given}
    choice = AssembleConfig(router=RouterConfig(init=init))
    if (
        message is None
    ):  # the same texts, but other experts read them: the second layer could tell; the first sees no expert
        message = r"router ffn\.0 the texts of seed look like those of all"
    with pytest.raises(ValueError, match=message):
        assemble(sources, tmp_path / "moe", choice, texts)


def test_copies_of_one_source_cannot_be_told_apart(sources, tmp_path):
    config = UpcycledConfig(experts=["seed", "seed:2"], expert_sources=["seed", "seed"])
    with pytest.raises(ValueError, match=r"all of these come from seed; write router\.init\.kind=normal"):
        texts_of_routers(config, both("hidden_mean"), sources["seed"], {})


def test_a_seed_without_a_tokenizer_is_refused(sources, tmp_path):
    bare = shutil.copytree(sources["seed"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match=r"reads prompts, and the seed's tokenizer could not be loaded from"):
        assemble(sources | {"seed": bare}, tmp_path / "moe", both("hidden_mean"))


def test_tokens_of_another_tokenizer_are_refused(sources, data, tmp_path):
    other = write_tokens(tmp_path / "other", low=VOCAB, high=VOCAB + 1)
    with pytest.raises(ValueError, match=r"of code has the token 61, but the model's vocabulary ends at 60"):
        assemble(sources, tmp_path / "moe", both("domain_centroid"), data | {"code": other})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "hash", "top_k": 1, "init": {"kind": "zeros"}},
            r"init\.kind=zeros has no effect: kind=hash has no weights",
        ),
        ({"init": {"kind": "hidden_mean"}}, r"hidden_mean with no prompts"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        upcycle.api.preset("btx", router=settings | {"losses": {"balance_coefficient": 0.0}})


def test_text_for_a_router_that_has_no_weights_is_refused():
    attention = RouterConfig(kind="soft", top_k=1)
    with pytest.raises(ValueError, match=r"router\.init\.kind=hidden_mean has no effect with tie=sublayers"):
        AssembleConfig(
            router=RouterConfig(init=init_of("hidden_mean")), attention="mixture", attention_router=attention, tie="sublayers"
        )  # fmt: skip


def test_the_call_takes_data_where_a_router_reads_it(sources, data, tmp_path):
    branches = {name: sources[name] for name in ("code", "law")}
    arguments = {"seed": sources["seed"], "branches": branches, "out": tmp_path / "moe"}
    with pytest.raises(
        ValueError, match=r"data={general, code, law} has no effect: no router starts from training text"
    ):
        upcycle.assemble(**arguments, data=data)
    init = {"init": {"kind": "domain_centroid", "tokens": 60}}
    with pytest.raises(ValueError, match=r"needs the training text of every branch's domain, got none"):
        upcycle.assemble(**arguments, router=init)
    path = upcycle.assemble(**arguments, router=init, data={name: str(folder) for name, folder in data.items()})
    assert (path / "proof.json").is_file() and all(rows.any(1).all() for rows in rows_in(path).values())
