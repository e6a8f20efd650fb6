"""A CAMEx mixture without its curvature: equal to before, plain soft merging, and proved to be."""

from __future__ import annotations

import pytest
import tiny
import torch

from tests.test_camex import FORMS, layers_of, mixture_of
from upcycle import folding, soft_merging
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

    def careless(model):
        for layer in layers_of(model):
            layer.experts.double()
            for key, one in layer.experts.named_parameters():
                if "curvature_" in key:
                    one.data.copy_(torch.eye(one.shape[-1]).expand_as(one))
        return right(model)

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
    monkeypatch.setattr(folding, "_folded_tensors", lambda model: {n: 1.1 * t for n, t in wrong(model).items()})
    with pytest.raises(ValueError, match="folded mixture's logits differ by"):
        fold(tmp_path / "bent", tmp_path / "out")
    assert not (tmp_path / "out").exists()
