"""A CAMEx mixture without its curvature: equal to before, plain soft merging, and proved to be."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import upcycle
from tests.test_camex import FORMS, layers_of, mixture_of
from upcycle import folding, soft_merging
from upcycle.explain import explain
from upcycle.folding import fold
from upcycle.modeling import UpcycledForCausalLM


@pytest.mark.parametrize("name", [name for name in FORMS if name not in ("soft_merging", "domain", "previous")])
def test_a_folded_mixture_is_plain_soft_merging_with_equal_logits(name, tmp_path):
    model = mixture_of(FORMS[name], dtype=torch.float32)
    model.save_pretrained(tmp_path / "bent")
    found = fold(tmp_path / "bent", tmp_path / "folded")
    assert found.difference is not None and found.difference < 1e-5
    folded = UpcycledForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert {type(layer.experts) for layer in layers_of(folded)} == {soft_merging.SoftMergedExperts}
    assert not any("curvature" in name for name in folded.state_dict())
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no curvature, nothing to fold"):
        fold(tmp_path / "folded", tmp_path / "twice")


@pytest.mark.parametrize("case", ["bfloat16", "one_segment"])
def test_a_fold_that_leaves_the_curvature_out_is_noticed(case, tmp_path, monkeypatch):
    """Also where rounding would hide it, and where the first segment is all that the positions hold."""
    options = {"tokens": 64} if case == "one_segment" else {}
    model = mixture_of(FORMS["ca"], dtype=torch.bfloat16 if case == "bfloat16" else torch.float32, **options)
    model.save_pretrained(tmp_path / "bent")
    assert fold(tmp_path / "bent", tmp_path / "right").difference < 1e-5

    def careless(model, directory):
        for layer in layers_of(model):
            layer.experts.double()
            for key, one in layer.experts.named_parameters():
                if "curvature_" in key:
                    one.data.copy_(torch.eye(one.shape[-1]).expand_as(one))
        return right(model, directory)

    right = folding._folded_tensors
    monkeypatch.setattr(folding, "_folded_tensors", careless)
    with pytest.raises(ValueError, match="folded mixture's logits differ by"):
        fold(tmp_path / "bent", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_folded_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    mixture_of(FORMS["previous"], dtype=torch.float32).save_pretrained(tmp_path / "chained")
    with pytest.raises(ValueError, match="no fixed experts are equal to it"):
        fold(tmp_path / "chained", tmp_path / "out")
    mixture_of(FORMS["ca"], dtype=torch.float32).save_pretrained(tmp_path / "bent")
    wrong = folding._folded_tensors
    monkeypatch.setattr(folding, "_folded_tensors", lambda *given: {n: 1.1 * t for n, t in wrong(*given).items()})
    with pytest.raises(ValueError, match="folded mixture's logits differ by"):
        fold(tmp_path / "bent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damaged_record(where):
    (where / "assembly.json").write_text('{"tensors": 3}')
    return "assembly.json"


def not_a_number(where):
    state = load_file(where / "model.safetensors")
    name = next(name for name in state if "curvature_" in name)
    state[name].view(-1)[0] = float("nan")
    save_file(state, where / "model.safetensors", {"format": "pt"})
    return f"{name} holds NaN or infinity"


def no_number(where):
    config = json.loads((where / "config.json").read_text())
    config["combine"]["alpha"] = "x"
    (where / "config.json").write_text(json.dumps(config))
    return "combine.alpha='x', expected float"


@pytest.mark.parametrize("damage", [damaged_record, not_a_number, no_number])
@pytest.mark.parametrize("prove", [True, False])
def test_damage_is_named_before_anything_is_folded(damage, prove, tmp_path):
    mixture_of(FORMS["ca"], dtype=torch.float32).save_pretrained(tmp_path / "bent")
    expected = damage(tmp_path / "bent")
    with pytest.raises(ValueError, match=re.escape(expected)):
        fold(tmp_path / "bent", tmp_path / "out", prove=prove)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", ["uniform", "seed"])
def test_the_record_of_a_folded_mixture_is_of_its_own_tensors(first, tmp_path):
    """A base that travelled is gone where scores sum to 1. What the mixture was trained as is said."""
    for name, model in zip(("seed", "code", "law"), tiny.dense_models("llama", dtype=torch.float32), strict=True):
        model.save_pretrained(tmp_path / name)
    own = {"router": {"pool": {"tokens": 4, "first": first}}, "combine": {"base": "mean"}}
    branches = {name: tmp_path / name for name in ("code", "law")}
    made = upcycle.assemble(
        seed=tmp_path / "seed", branches=branches, out=tmp_path / "bent", method="camex_dynamic", **own
    )
    record = {"function": "train_model", "stage": "mix/x", "key": "0123456789", "config": {}}
    (tmp_path / "bent" / "stage.json").write_text(json.dumps(record))
    fold(made, tmp_path / "out")
    found = explain(tmp_path / "out")
    assert found.parameters == sum(
        tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values()
    )
    assert not any("base_" in row.target for row in found.tensors)
    assert any("trained before that (stage mix/x-01234567)" in note for note in found.notes)
