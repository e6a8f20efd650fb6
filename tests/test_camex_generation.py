"""Cached generation of mixtures whose weights are merged: once a decision, with the tokens of a generation that keeps nothing."""

from __future__ import annotations

import pytest
import tiny
import torch

from tests.test_camex import FORMS, layers_of, mixture_of
from upcycle import soft_merging


@pytest.mark.parametrize("name", FORMS)
def test_generation_merges_weights_only_where_a_decision_is_new(name, monkeypatch):
    """Segments of 4 tokens: of 12 steps after a prompt of 8, three begin a segment; a base that travels is needed at every step. The tokens are those
    of a generation that keeps nothing, for beams that change places too."""
    model, calls = mixture_of(FORMS[name], tokens=4), []
    kept_back = soft_merging.SoftMergedExperts.merge
    monkeypatch.setattr(
        soft_merging.SoftMergedExperts, "merge", lambda self, *given: calls.append(1) or kept_back(self, *given)
    )
    ids = tiny.tokens(2, 8)
    found = model.generate(ids, max_new_tokens=13, min_new_tokens=13, do_sample=False)
    per_layer = 0 if model.config.combine["update"] in ("travel", "previous_merged") else 3
    assert len(calls) == per_layer * len(layers_of(model))
    beams = model.generate(ids[:1], max_new_tokens=13, min_new_tokens=13, do_sample=False, num_beams=2)
    monkeypatch.setattr(soft_merging.SoftMergedExperts, "generates", lambda *_: False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=13, min_new_tokens=13, do_sample=False))
    assert torch.equal(
        beams, model.generate(ids[:1], max_new_tokens=13, min_new_tokens=13, do_sample=False, num_beams=2)
    )


@pytest.mark.parametrize("name", ["soft_merging", "ca", "per_layer"])
def test_generation_that_keeps_weights_pads_and_computes_in_bf16_as_one_that_does_not(name, monkeypatch):
    """Prompts of two lengths, whose segments begin at different steps; the weights are merged in autocast's dtype."""
    model = mixture_of(FORMS[name], tokens=4, dtype=torch.float32)
    ids, mask = tiny.tokens(2, 8), tiny.left_padding(3, 0, sequence=8)

    def generated(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=9,
                min_new_tokens=9,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences, torch.stack(out.logits).float()

    kept = {autocast: generated(autocast) for autocast in (False, True)}
    monkeypatch.setattr(soft_merging.SoftMergedExperts, "generates", lambda *_: False)
    for autocast, (sequences, logits) in kept.items():
        expected, others = generated(autocast)
        assert torch.equal(sequences, expected)
        torch.testing.assert_close(logits, others, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)
