"""Export: a mixture as a native class gives the same numbers, in the layout that class saves; what is not equal is said."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import upcycle
from tests.routers import CASES
from tests.tiny import (
    assert_same_tensors,
    dense_config,
    dense_models,
    gradients_of,
    left_padding,
    mixture_of,
    route,
    tokens,
)
from upcycle import exporting
from upcycle.assembly import write_mixture
from upcycle.card import read_facts
from upcycle.checkpoint import Checkpoint
from upcycle.configuration import UpcycledConfig
from upcycle.losses import router_losses
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.native import notes, obstacles
from upcycle.routing import GATE_SCALES

PLAIN = {"attention_bias": False}  # tests/tiny.py's llama has biases
SCALED = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["original_max_position_embeddings"] = 16
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
BARE = {"router": "softmax_topk"}
SCALED_TO_ONE = {**BARE, "gate_scale": "sum_to_one"}

# (dense family, changes to it, choices of the mixture, the class that it equals)
EQUAL = {
    "llama": ("llama", PLAIN, {}, "mixtral"),
    "llama_top1": ("llama", PLAIN, {"num_experts_per_tok": 1}, "mixtral"),
    "llama_all": ("llama", PLAIN, {**BARE, "num_experts_per_tok": 3}, "mixtral"),
    "llama_soft": ("llama", PLAIN, {"router": "soft"}, "mixtral"),
    "llama_sum_to_one": ("llama", {**PLAIN, "rope_parameters": SCALED}, SCALED_TO_ONE, "mixtral"),
    "llama_head_dim": ("llama", {**PLAIN, "head_dim": 12, "rms_norm_eps": 1e-2, "hidden_act": "gelu"}, {}, "mixtral"),
    "llama_tied": ("llama", {**PLAIN, "tie_word_embeddings": True}, {}, "mixtral"),
    "llama_bare": ("llama", PLAIN, BARE, "qwen2_moe"),
    "mistral": ("family/mistral", {}, {}, "mixtral"),
    "mistral_bare": ("family/mistral", {}, BARE, "qwen2_moe"),
    "qwen2": ("family/qwen2", {}, {}, "qwen2_moe"),
    "qwen2_bare": ("family/qwen2", {}, BARE, "qwen2_moe"),
    "qwen3": ("family/qwen3", {}, {}, "qwen3_moe"),
    "qwen3_windows_bare": ("family/qwen3", WINDOWS, BARE, "qwen3_moe"),
    "olmo2": ("family/olmo2", {}, {}, "flex_olmo"),
    "olmo2_bare": ("family/olmo2", {"attention_bias": True}, BARE, "flex_olmo"),
}


def saved(directory: Path, kind: str, changes: dict | None = None, choices: dict | None = None) -> Path:
    """A mixture of three dense models on disk, as training saves it."""
    mixture_of(dense_models(kind, 3, dtype=torch.float32, **(changes or {})), **(choices or {})).save_pretrained(
        directory
    )
    return directory


@pytest.fixture(scope="module", params=EQUAL)
def pair(request, tmp_path_factory):
    """(mixture, the native model that export made of it, what export said)."""
    root = tmp_path_factory.mktemp(request.param)
    kind, changes, choices, wanted = EQUAL[request.param]
    exported = upcycle.export(saved(root / "moe", kind, changes, choices), root / "native")
    assert (exported.format, exported.reasons) == (wanted, ())
    native = AutoModelForCausalLM.from_pretrained(root / "native").eval()
    return UpcycledForCausalLM.from_pretrained(root / "moe").eval(), native, exported


def test_native_logits_are_the_mixtures(pair):
    ours, native, exported = pair
    assert type(native).__module__.startswith("transformers.models.")
    batch, mask = tokens(sequence=12), left_padding(0, 5, sequence=12)
    for attention_mask in (None, mask):
        kept = torch.ones_like(batch) if attention_mask is None else attention_mask
        logits = [model(batch, attention_mask=attention_mask).logits[kept.bool()] for model in (ours, native)]
        torch.testing.assert_close(*logits)
    assert exported.difference < 1e-6


def test_native_generates_what_the_mixture_generates(pair):
    ours, native, _ = pair
    batch, mask = tokens(sequence=6), left_padding(0, 3, sequence=6)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    texts = [model.generate(batch, attention_mask=mask, generation_config=settings) for model in (ours, native)]
    assert torch.equal(*texts) and texts[0].shape == (2, 14)


def test_native_files_are_what_save_pretrained_writes(pair, tmp_path):
    """The same names, numbers and config: other tools know that layout."""
    _, native, exported = pair
    native.save_pretrained(tmp_path / "theirs")
    ours, theirs = Checkpoint(exported.path), Checkpoint(tmp_path / "theirs")
    assert ours.names == theirs.names and any(".experts.2." in name for name in ours.names)
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in ours.names)
    assert ours.config == theirs.config


def test_settings_reach_the_native_config(tmp_path):
    moe = saved(
        tmp_path / "moe",
        "family/mistral",
        {"rope_parameters": SCALED},
        {"balance": "switch", "balance_coefficient": 0.03},
    )
    upcycle.export(moe, tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["rope_parameters"] == SCALED and config["sliding_window"] == 4 and config["head_dim"] == 12
    assert config["router_aux_loss_coef"] == 0.03 and config["output_router_logits"] is False
    assert config["num_local_experts"] == 3 and config["num_experts_per_tok"] == 2


def test_against_hf_mixtral(tmp_path):
    """Cross-entropy and the gradient of every parameter; the experts' tensors are stacked alike in both."""
    upcycle.export(saved(tmp_path / "moe", "llama", PLAIN), tmp_path / "native")
    models = [
        UpcycledForCausalLM.from_pretrained(tmp_path / "moe"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "native"),
    ]
    batch, mask = tokens(sequence=12), left_padding(0, 5, sequence=12)
    losses = [
        model.eval()(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss for model in models
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    ours = {
        name.replace("model.decoder.", "model.").replace(".router.", ".gate."): g
        for name, g in gradients_of(models[0]).items()
    }
    assert all(gradient.any() for name, gradient in ours.items() if "experts" in name or "gate.weight" in name)
    assert_same_tensors(ours, gradients_of(models[1]))


def test_hf_balance_loss_differs_as_the_docstring_says():
    """On one layer theirs is K times ours; layers that collapse on different experts look balanced to theirs."""
    logits = torch.randn(12, 4)
    one = [route("topk_softmax", logits, 2)]
    ours = router_losses(one, torch.ones(2, 6, dtype=torch.bool), "switch", "micro_batch")["balance"] / 12
    torch.testing.assert_close(load_balancing_loss_func((logits,), 4, 2), 2 * ours)
    collapsed = [torch.zeros(12, 2).index_fill_(1, torch.tensor(expert), 50.0) for expert in (0, 1)]
    both = [route("topk_softmax", one, 1) for one in collapsed]
    ours = router_losses(both, torch.ones(2, 6, dtype=torch.bool), "switch", "micro_batch")["balance"] / 12
    assert ours == pytest.approx(2) and load_balancing_loss_func(tuple(collapsed), 2, 1) == pytest.approx(1)


def test_shared_expert_is_silent_and_stays_silent(tmp_path):
    exported = upcycle.export(saved(tmp_path / "moe", "family/qwen2"), tmp_path / "native")
    assert any("shared expert" in note and "width 32 and zero weights" in note for note in exported.notes)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    shared = {name: parameter for name, parameter in native.named_parameters() if "shared_expert" in name}
    assert len(shared) == 2 * 4 and not any(parameter.any() for parameter in shared.values())
    native(tokens(), labels=tokens()).loss.backward()
    assert not any(parameter.grad.any() for parameter in shared.values())


def test_bf16_stays_bf16_and_the_router_fp32(tmp_path):
    mixture = mixture_of(dense_models("llama", 3, dtype=torch.float32, **PLAIN)).to(torch.bfloat16)
    for layer in mixture.model.decoder.layers:
        layer.mlp.router.float()
    mixture.save_pretrained(tmp_path / "moe")
    upcycle.export(tmp_path / "moe", tmp_path / "native")
    found = Checkpoint(tmp_path / "native")
    for name in found.names:
        assert found.get(name).dtype == (torch.float32 if "moe.gate" in name else torch.bfloat16), name
    assert found.config["dtype"] == "bfloat16"


def test_shards_hold_the_same_tensors(tmp_path):
    moe = saved(tmp_path / "moe", "llama", PLAIN)
    upcycle.export(moe, tmp_path / "one")
    upcycle.export(moe, tmp_path / "many", max_shard_bytes=40_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "many")
    assert one.names == many.names and all(torch.equal(one.get(name), many.get(name)) for name in one.names)


REFUSED = {
    "attention": ("llama", PLAIN, {"attention": "mixture"}, "mixtral", "its attention is a soft mixture of 3 experts, and Mixtral has one attention a layer"),
    "bias": ("llama", {}, {}, "mixtral", "the seed has attention_bias=True, and Mixtral has no bias on the attention's output"),
    "mlp_bias": ("llama", {**PLAIN, "mlp_bias": True}, {}, "mixtral", "the seed has mlp_bias=True, and the experts of Mixtral have no biases"),
    "bare": ("llama", PLAIN, BARE, "mixtral", "its gates are softmax_topk's bare probabilities, and Mixtral divides them by their sum"),
    "compensate": ("family/qwen2", {}, {**BARE, "gate_scale": "compensate"}, "qwen2_moe", "gate_scale='compensate' multiplies the gates, and Qwen2-MoE has no such factor"),
    "windows": ("family/qwen3", {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}, {}, "qwen3_moe", "its layers differ in attention (sliding and full), and Qwen3-MoE has one kind for all layers"),
    "family": ("family/olmo2", {}, {}, "mixtral", "the seed is a olmo2, and Mixtral has the decoder layer of llama and mistral"),
    "olmoe": ("family/olmo2", {}, {}, "olmoe", "OLMoE norms the inputs of its sublayers and, over all heads at once, queries and keys; no dense family here has that layer (OLMo-2 norms the outputs: its class is FlexOlmo)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_equal_is_refused_with_the_reason(case, tmp_path):
    kind, changes, choices, format, why = REFUSED[case]
    moe = saved(tmp_path / "moe", kind, changes, choices)
    with pytest.raises(ValueError) as error:
        upcycle.export(moe, tmp_path / "native", format=format)
    name = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE"}[format]
    assert str(error.value) == (
        f'format={format!r}: the mixture is not a {name}: {why}. Use format="remote_code", which keeps it as it is'
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("bare", "family", "olmoe")])
def test_auto_says_the_reason_and_writes_a_bundle(case, tmp_path):
    kind, changes, choices, _, why = REFUSED[case]
    moe = saved(tmp_path / "moe", kind, changes, choices)
    exported = upcycle.export(moe, tmp_path / "out")
    assert (exported.format, exported.reasons, exported.difference) == ("remote_code", (why,), None)
    assert f"- No native class: {why}.\n" in (tmp_path / "out" / "README.md").read_text()
    ours, theirs = (UpcycledForCausalLM.from_pretrained(path) for path in (moe, tmp_path / "out"))
    assert_same_tensors(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_a_family_without_a_native_class_is_said(tmp_path):
    exported = upcycle.export(saved(tmp_path / "moe", "gpt_neox"), tmp_path / "out")
    assert exported.reasons == (
        "the seed is a gpt_neox, and none of Mixtral, Qwen2-MoE, Qwen3-MoE, FlexOlmo, OLMoE has its decoder layer",
    )


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk", "soft"])
def test_gates_that_sum_to_one(router):
    """The rule that decides between the native routers, against the routers themselves."""
    logits = torch.randn(20, 3)
    for scale, top_k in itertools.product(GATE_SCALES, (1, 2, 3)):
        config = UpcycledConfig(dense_config("llama", **PLAIN), "abc", top_k, router, scale)
        gates = route(router, logits, config.num_experts_per_tok, scale).gates
        assert config.gates_sum_to_one == torch.allclose(gates.sum(-1), torch.ones(20)), (scale, top_k)
        assert bool(obstacles(config, "mixtral")) != config.gates_sum_to_one


# Routers that transformers' classes have too; no other may be written as one of them.
NATIVE = {
    "top-k, then softmax", "softmax, then top-k, sum to one", "softmax, then top-1, straight through", "soft",
    "random, never trained", "noise and jitter",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_other_router_becomes_a_native_class(name):
    choices = {"experts": ["seed", "code", "law"], **CASES[name].ffn()}
    config = UpcycledConfig(dense_config("llama", **PLAIN), **choices)
    assert bool(obstacles(config, "mixtral")) == (name not in NATIVE)


def test_what_a_native_class_does_not_train_with_is_said():
    fields = {"router_options": {"noise_std": 0.1, "trained": False}, "entropy_coefficient": 0.1}
    said = " ".join(
        notes(UpcycledConfig(dense_config("llama", **PLAIN), **fields, similarity_coefficient=0.2), "mixtral")
    )
    for words in ("similarity loss (0.2)", "entropy loss (0.1)", "without the noise", "are never trained"):
        assert words in said


def test_a_wrong_native_model_never_appears(tmp_path, monkeypatch):
    moe = saved(tmp_path / "moe", "llama", PLAIN)

    def swapped(*args):
        for name, tensor in native_tensors(*args):
            yield name.replace(".w1.", ".w?.").replace(".w3.", ".w1.").replace(".w?.", ".w3."), tensor

    def short(*args):
        yield from list(native_tensors(*args))[1:]

    native_tensors = exporting.native_tensors
    monkeypatch.setattr(exporting, "native_tensors", swapped)
    with pytest.raises(ValueError, match=r"as Mixtral its logits differ by .* of the largest, expected at most 0.0001"):
        upcycle.export(moe, tmp_path / "native")
    monkeypatch.setattr(exporting, "native_tensors", short)
    with pytest.raises(ValueError, match=r"as Mixtral, missing keys: lm_head.weight \(1 in all\)"):
        upcycle.export(moe, tmp_path / "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]


def test_wrong_arguments_are_explained(tmp_path):
    moe = saved(tmp_path / "moe", "llama", PLAIN)
    dense = tmp_path / "dense"
    dense_models("llama", 1, dtype=torch.float32)[0].save_pretrained(dense)
    with pytest.raises(ValueError) as error:
        upcycle.export(moe, tmp_path / "x", format="mixtrel")
    assert str(error.value) == (
        "format='mixtrel' is not known; expected one of auto, mixtral, qwen2_moe, qwen3_moe, flex_olmo, olmoe, remote_code"
    )
    with pytest.raises(ValueError) as error:
        upcycle.export(moe, dense)
    assert (
        str(error.value) == f"out={dense} exists already and is not an empty directory; name one that is, or a new one"
    )
    with pytest.raises(ValueError) as error:
        upcycle.export(dense, tmp_path / "x")
    assert str(error.value) == (
        f"{dense}: model_type is 'llama', expected 'upcycled'; export takes a mixture that `upcycle` assembled or trained"
    )


def test_a_bundle_of_other_tensors_is_refused(tmp_path):
    moe = saved(tmp_path / "moe", "gpt_neox")
    config = json.loads((moe / "config.json").read_text())
    config["experts"].append("math")
    config["expert_sources"].append("math")
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"moe: model.decoder.layers.0.mlp.experts.down_proj has shape \(3, 32, 48\), expected \(4, 32, 48\) \(10 such tensors in all\)",
    ):
        upcycle.export(moe, tmp_path / "out")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    root = tmp_path_factory.mktemp("assembled")
    names = ("seed", "code", "law")
    for name, model in zip(names, dense_models("llama", 3, dtype=torch.float32, **PLAIN), strict=True):
        model.save_pretrained(root / name)
    (root / "moe").mkdir()
    write_mixture(root / "seed", {name: root / name for name in names[1:]}, root / "moe", AssembleConfig())
    (root / "moe" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    return root / "moe"


def test_card_says_what_is_recorded(assembled, tmp_path):
    exported = upcycle.export(assembled, tmp_path / "my-moe")
    card = (tmp_path / "my-moe" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "other", "license_name": None, "license_link": None, "base_model": None, "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["mixture-of-experts", "branch-train-mix"],
    }  # fmt: skip
    assert "license: other  # fill in" in front and body.startswith("\n# my-moe\n")
    assert (
        "| experts, in order | seed, code, law |" in body
        and "| routers | topk_softmax, top 2 of 3, gate_scale none |" in body
    )
    assert "| all other weights | average |" in body and "No measurement is recorded here." in body
    prints = [
        line.split(" | ")[1].strip(" |")
        for line in body.splitlines()
        if line.startswith(("| seed | ", "| code | ", "| law | "))
    ]
    assert (
        len(prints) == 4 and len({*prints[1:]}) == 3 and all(len(found) == 64 for found in prints[1:])
    )  # the first is the recipe's seed
    assert all(f"- {note}." in body for note in exported.notes) and "trust_remote_code" not in body
    assert json.loads((tmp_path / "my-moe" / "generation_config.json").read_text())["temperature"] == 0.5


def test_card_finds_the_assembly_of_a_trained_mixture(assembled, tmp_path):
    """In an artifact store the record lies beside the weights before training."""
    store, moe = tmp_path / "artifacts", saved(tmp_path / "artifacts" / "mix-btx-0123abcd", "llama", PLAIN)
    (store / "assemble-btx-feedbeef").mkdir()
    record = json.loads((assembled / "assembly.json").read_text())
    (store / "assemble-btx-feedbeef" / "assembly.json").write_text(json.dumps(record))
    _stage(moe, "mix/btx", "0123abcd" * 8, {"assemble/btx": "feedbeef" * 8, "tokens/code": "00000000" * 8})
    found = read_facts(moe)
    assert found == replace(read_facts(assembled), stage="mix/btx-0123abcd", tokens=12345)
    assert set(found.fingerprints) == {"seed", "code", "law"} and found.merge == "average"


@pytest.mark.parametrize("format", ["auto", "remote_code"])
def test_nothing_that_is_written_names_this_machine(assembled, tmp_path, format):
    upcycle.export(assembled, tmp_path / "out", format=format)
    for path in (tmp_path / "out").iterdir():
        assert str(assembled.parent).encode() not in path.read_bytes(), path.name
    if format == "remote_code":
        assert "from_pretrained(path, trust_remote_code=True)" in (tmp_path / "out" / "README.md").read_text()


def _stage(directory: Path, name: str, key: str, inputs: dict | None = None) -> None:
    config = {"train": {"tokens": 12345}, "skip_tokens": {}}
    record = {"stage": name, "key": key, "config": config, "inputs": inputs or {}}
    (directory / "stage.json").write_text(json.dumps(record))


def test_card_takes_figures_from_the_report_of_that_very_artifact(tmp_path):
    moe, report = saved(tmp_path / "moe", "llama", PLAIN), tmp_path / "report.json"
    artifacts = {"mix/btx": "0123abcd", "assemble/btx": "feedbeef", "mix/bam": "99999999", "assemble/raw": "77777777"}
    figures = {"train_tokens": 3960832, "perplexity": {"code": 120.59018, "math": 3.2429}}
    report.write_text(
        json.dumps(
            {"models": {"btx": figures, "raw": figures}, "provenance": {"artifacts": artifacts}, "sequence_length": 128}
        )
    )
    with pytest.raises(ValueError) as error:
        upcycle.export(moe, tmp_path / "x", report=report)
    assert str(error.value) == (
        f"report={report}: {moe} is without a stage.json, which that run did not measure; its mixtures: "
        "mix/btx-0123abcd, mix/bam-99999999"
    )
    _stage(moe, "assemble/btx", "feedbeef" * 8)
    with pytest.raises(ValueError, match=r"is assemble/btx \(feedbeef\), which that run did not measure"):
        upcycle.export(moe, tmp_path / "x", report=report)
    _stage(moe, "mix/btx", "0123abcd" * 8)
    upcycle.export(moe, tmp_path / "native", report=report)
    card = (tmp_path / "native" / "README.md").read_text()
    assert "- Made by stage `mix/btx-0123abcd`, trained on 12,345 tokens there." in card
    assert "only what came after): 3,960,832." in card and "in windows of 128 tokens" in card
    assert "| code | 120.6 |\n| math | 3.243 |" in card
    _stage(moe, "assemble/raw", "77777777" * 8)
    assert upcycle.export(moe, tmp_path / "raw", report=report).format == "mixtral"
    with pytest.raises(ValueError, match=r"report=.*config.json: no report of a run; name the report.json of the run"):
        upcycle.export(moe, tmp_path / "x", report=moe / "config.json")


def test_the_word_export(tmp_path, capsys):
    from launch.cli import WORDS

    moe = saved(tmp_path / "moe", "llama", PLAIN, BARE)
    assert WORDS["export"]([str(moe), str(tmp_path / "native")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'native'}: qwen2_moe; logits equal within ") and len(lines) == 3
    assert all(line.startswith("note: ") for line in lines[1:])
    assert WORDS["export"]([str(moe), str(tmp_path / "no"), "--format=mixtral"]) == 2
    assert capsys.readouterr().err.startswith("upcycle: format='mixtral': the mixture is not a Mixtral: its gates are")
    assert WORDS["export"]([str(moe), str(tmp_path / "bundle"), "--format=remote_code"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'bundle'}: remote_code\n"
    assert WORDS["export"]([str(moe), "--formt=x"]) == 2
    got = f"{moe} --formt=x"
    assert capsys.readouterr().err == f"upcycle: export: got {got}, expected DIR OUT [--format=NAME] [--report=FILE]\n"
