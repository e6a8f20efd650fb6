"""Assembly: what each tensor of a mixture came from, proved after writing; what does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from tests import reference
from tests.tiny import dense_models, routers_of, tokens
from upcycle import merge, routing
from upcycle.assembly import plan_pieces, write_mixture
from upcycle.checkpoint import Checkpoint
from upcycle.dense_merge import write_merged
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.proof import prove
from upcycle.router_config import InitConfig, RouterConfig
from upcycle.router_init import drawn_rows

MIXTURES = [("merged", "expert"), ("mixture", "expert"), ("mixture", "shared")]
NAMES = ("seed", "code", "law")


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "llama_tied"])
def sources(request, tmp_path_factory):
    """Three dense models of one family, in small shards, as plain transformers writes them."""
    root = tmp_path_factory.mktemp(request.param)
    kind, tied = request.param.removesuffix("_tied"), request.param.endswith("_tied")
    for name, model in zip(NAMES, dense_models(kind, 3, dtype=torch.float32, tie_word_embeddings=tied), strict=True):
        model.save_pretrained(root / name, max_shard_size="30KB")
    return {name: root / name for name in NAMES}


def assemble(sources, out, **choices):
    out.mkdir()
    branches = {name: path for name, path in sources.items() if name != "seed"}
    return write_mixture(sources["seed"], branches, out, AssembleConfig(**choices))


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
def test_mixture_on_disk_equals_the_reference_mixture(sources, tmp_path, attention, kv):
    assemble(sources, tmp_path / "moe", attention=attention, kv=kv, router=RouterConfig(init=InitConfig(std=0.5)))
    ours = UpcycledForCausalLM.from_pretrained(tmp_path / "moe").eval()
    dense = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in sources.values()]
    attention_routers = [w.double() for w in routers_of(ours, "attention")] or None
    twin = reference.ReferenceMixture(
        dense,
        ffn_routers=[w.double() for w in routers_of(ours, "ffn")],
        attention_routers=attention_routers,
        router="topk_softmax",
        k=2,
        attention=attention,
        kv=kv,
    )
    logits = ours(tokens()).logits.double()
    torch.testing.assert_close(logits, twin.logits(tokens()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
def test_proof_holds_and_is_written(sources, tmp_path, attention, kv):
    assemble(sources, tmp_path / "moe", attention=attention, kv=kv)
    proof = prove(tmp_path / "moe", sources)
    assert proof["mean_gate_sum"] == pytest.approx(1) and max(proof["one_hot_errors"].values()) < 1e-5
    assert proof == json.loads((tmp_path / "moe" / "proof.json").read_text())


def test_paper_gates_are_said_to_scale_down(sources, tmp_path):
    router = RouterConfig(top_k=1, gate_order="softmax_topk", gate_scale="none")
    assemble(sources, tmp_path / "moe", router=router)
    assert prove(tmp_path / "moe", sources)["mean_gate_sum"] == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("tensor", ["experts.down_proj", "o_proj.weight", "dense.weight"])
def test_proof_fails_when_experts_change_places(sources, tmp_path, tensor):
    assemble(sources, tmp_path / "moe", attention="mixture")
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    name = next((name for name in tensors if name.endswith(tensor)), None)
    if name is None:  # the other family's name for it
        return
    axis = 1 if name.endswith("weight") else 0
    seed, code, law = tensors[name].chunk(3, dim=axis)
    tensors[name] = torch.cat([seed, law, code], dim=axis).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expert 'code' does not hold the tensors of its branch"):
        prove(tmp_path / "moe", sources)


def test_proof_fails_when_a_merged_tensor_reaches_an_expert(sources, tmp_path, monkeypatch):
    """Hashes fixed up to match, so that only the comparison of logits can see it."""
    assemble(sources, tmp_path / "moe")
    path = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("experts.down_proj"))
    tensors[name][1] = tensors[name].mean(0)
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr("upcycle.proof._check_hashes", lambda *args: 0)
    with pytest.raises(ValueError, match="forced to expert 'code' the mixture's logits differ"):
        prove(tmp_path / "moe", sources)


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
def test_every_tensor_is_accounted_for(sources, attention, kv, tmp_path):
    config = assemble(sources, tmp_path / "moe", attention=attention, kv=kv)
    names = Checkpoint(sources["seed"]).names
    pieces = plan_pieces(config, names)
    assert {name for piece in pieces for name in piece.sources} == set(names)
    with pytest.raises(ValueError, match="no rule for these tensors of the checkpoints: model.decoder.surprise"):
        plan_pieces(config, [*names, f"{'gpt_neox' if 'neox' in str(sources) else 'model'}.surprise"])
    router = [piece for piece in pieces if piece.origin == "fresh"]
    assert len(router) == config.seed.num_hidden_layers * (2 if attention == "mixture" else 1)


def test_shards_are_small_and_indexed(sources, tmp_path):
    assemble(sources, tmp_path / "one")
    assemble(sources, tmp_path / "many", max_shard_bytes=40_000)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 1 and max(path.stat().st_size for path in shards) < 60_000
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert one.names == many.names
    assert all(torch.equal(one.get(name), many.get(name)) for name in one.names)


def test_dtype_is_the_seeds_or_the_one_asked_for(sources, tmp_path):
    assemble(sources, tmp_path / "moe", dtype="bfloat16")
    found = Checkpoint(tmp_path / "moe")
    for name in found.names:
        assert found.get(name).dtype == (torch.float32 if "router" in name else torch.bfloat16)
    prove(tmp_path / "moe", sources)


def test_drawn_routers_depend_on_name_and_rng_seed_only():
    normal = InitConfig()
    assert torch.equal(drawn_rows((3, 8), "x", normal, 1), drawn_rows((3, 8), "x", normal, 1))
    assert not torch.equal(drawn_rows((3, 8), "x", normal, 1), drawn_rows((3, 8), "y", normal, 1))
    assert not torch.equal(drawn_rows((3, 8), "x", normal, 1), drawn_rows((3, 8), "x", normal, 2))
    assert drawn_rows((400, 400), "x", normal, 1).std() == pytest.approx(0.02, rel=0.02)
    assert not drawn_rows((3, 8), "x", InitConfig(kind="zeros"), 1).any()


def test_soup_is_the_average(sources, tmp_path):
    (tmp_path / "soup").mkdir()
    branches = {name: path for name, path in sources.items() if name != "seed"}
    write_merged(sources["seed"], branches, tmp_path / "soup")
    soup, parts = Checkpoint(tmp_path / "soup"), [Checkpoint(path) for path in sources.values()]
    for name in soup.names:
        expected = reference.weighted_average([part.get(name) for part in parts])
        torch.testing.assert_close(soup.get(name).double(), expected, atol=1e-6, rtol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "soup")(tokens())


def test_one_call_makes_and_proves_a_mixture(sources, tmp_path):
    branches = {"code": sources["code"], "law": sources["law"]}
    path = upcycle.assemble(seed=sources["seed"], branches=branches, out=tmp_path / "moe", method="bam_shared_kv")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.experts == ["seed", "code", "law"] and model.config.kv == "shared"
    assert (path / "proof.json").is_file()
    with pytest.raises(ValueError, match="exists already"):
        upcycle.assemble(seed=sources["seed"], branches=branches, out=tmp_path / "moe")
    with pytest.raises(ValueError, match="method='bamm' is not known; expected one of bam, "):
        upcycle.assemble(seed=sources["seed"], branches=branches, out=tmp_path / "x", method="bamm")
    with pytest.raises(
        ValueError, match=r"num_experts_per_tok\)=5 is not between 1 and the 3 experts \(seed, code, law\)"
    ):
        upcycle.assemble(seed=sources["seed"], branches=branches, out=tmp_path / "x", router={"top_k": 5})
    assert not (tmp_path / "x").exists()


def changed_copy(source, to, config=None, tensors=None):
    """A copy of a checkpoint with some fields of its config, or some tensors, replaced."""
    model = AutoModelForCausalLM.from_pretrained(source)
    state = model.state_dict()
    for name, value in (tensors or {}).items():
        state[name].copy_(value)
    model.save_pretrained(to)
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return to


def test_checkpoints_that_do_not_fit_are_refused(sources, tmp_path):
    def attempt(branch, name="code"):
        (tmp_path / "moe").mkdir(exist_ok=True)
        write_mixture(sources["seed"], {name: branch}, tmp_path / "moe", AssembleConfig())

    with pytest.raises(ValueError, match="a branch is called 'seed'"):
        attempt(sources["code"], name="seed")
    ours = AutoConfig.from_pretrained(sources["seed"])
    rope = {**ours.rope_parameters, "rope_theta": 5.0}
    other = changed_copy(sources["code"], tmp_path / "rope", {"rope_parameters": rope})
    with pytest.raises(ValueError, match=r"branch 'code' .*rope.* against the seed .*: rope_parameters is .*5\.0"):
        attempt(other)
    if ours.model_type == "gpt_neox":
        other = changed_copy(sources["code"], tmp_path / "sequential", {"use_parallel_residual": False})
        with pytest.raises(ValueError, match="use_parallel_residual is False, expected the seed's True"):
            attempt(other)
    embedding = next(name for name in Checkpoint(sources["code"]).names if "embed" in name)
    poisoned = shutil.copytree(sources["code"], tmp_path / "nan")
    shard = poisoned / Checkpoint(poisoned).files[embedding]
    tensors = load_file(shard)
    tensors[embedding][3, 3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"nan: .*embed.* holds NaN or infinite values"):
        attempt(poisoned)


def test_another_tokenizer_is_refused(sources, tmp_path):
    seed, code = (shutil.copytree(sources[name], tmp_path / name) for name in ("seed", "code"))
    (seed / "tokenizer.json").write_text('{"a": 1}')
    (code / "tokenizer.json").write_text('{"a": 2}')
    (tmp_path / "moe").mkdir()
    with pytest.raises(ValueError, match="tokenizer.json differs; experts must read the same tokens"):
        write_mixture(seed, {"code": code}, tmp_path / "moe", AssembleConfig())


def test_checkpoints_of_older_transformers_are_the_same_model(sources, tmp_path):
    """rope_theta at the top of config.json; buffers saved; the head under its old name: all mean today's."""
    old = shutil.copytree(sources["seed"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config["rotary_emb_base" if "neox" in config["model_type"] else "rope_theta"] = theta
    if "neox" in config["model_type"]:
        config["rotary_pct"] = 0.5
    (old / "config.json").write_text(json.dumps(config))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(extra, old / "model-extra.safetensors")
    index = json.loads((old / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    assemble(sources | {"seed": old}, tmp_path / "moe")
    prove(tmp_path / "moe", sources | {"seed": old})


LOADS_ELSEWHERE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "upcycle":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "UpcycledForCausalLM" and "upcycle" not in sys.modules
"""
LOADS_HERE = """
import sys
import upcycle.modeling
from transformers import AutoModelForCausalLM
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__ == "UpcycledForCausalLM"
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOADS_ELSEWHERE, LOADS_HERE], ids=["without the package", "with it"])
def test_an_assembled_mixture_loads_in_another_process(sources, tmp_path, code):
    branches = {name: path for name, path in sources.items() if name != "seed"}
    path = upcycle.assemble(seed=sources["seed"], branches=branches, out=tmp_path / "moe", method="bam")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    if code is LOADS_HERE:
        environment["PYTHONPATH"] = str(Path(upcycle.__file__).parent.parent)
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda gates, n: 0.3 * gates / gates.sum(-1, keepdim=True), "promises gates that sum to 1"),
        (lambda gates, n: gates / gates.sum(-1, keepdim=True), None),
    ],
)
def test_proof_fails_when_gates_break_their_promise(sources, tmp_path, monkeypatch, fault, message):
    router = RouterConfig(top_k=1, gate_order="softmax_topk", gate_scale="straight_through")
    assemble(sources, tmp_path / "moe", router=router)
    monkeypatch.setitem(routing.GATE_SCALES, "straight_through", fault)
    if message is None:
        prove(tmp_path / "moe", sources)
    else:
        with pytest.raises(ValueError, match=message):
            prove(tmp_path / "moe", sources)


@pytest.mark.parametrize("wrong", [sum, lambda tensors: tensors[-1].float()])
def test_proof_fails_when_the_rest_is_not_the_average(sources, tmp_path, monkeypatch, wrong):
    of_merging = lambda merging: wrong([member.tensor.float() for member in merging.members.values()])  # noqa: E731
    monkeypatch.setitem(merge.METHODS, "average", merge.Method(of_merging, "wrong"))
    assemble(sources, tmp_path / "moe")
    with pytest.raises(ValueError, match="is not the average of"):
        prove(tmp_path / "moe", sources)


def test_unreadable_checkpoints_are_refused(sources, tmp_path):
    with pytest.raises(ValueError, match="no config.json there"):
        Checkpoint(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(sources["seed"] / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        ValueError, match=r"expected weights in safetensors, found pytorch_model.bin, which may run code"
    ):
        Checkpoint(pickled)
    torn = shutil.copytree(sources["seed"], tmp_path / "torn")
    shard = sorted(torn.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint = Checkpoint(torn)
        [checkpoint.get(name) for name in checkpoint.names]
    shard.unlink()
    with pytest.raises(ValueError, match="the index names this shard but it is missing"):
        [checkpoint.get(name) for checkpoint in [Checkpoint(torn)] for name in checkpoint.names]
